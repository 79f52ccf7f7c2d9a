"""One denoiser whose predictions are corrected by those with perturbed attention."""

from __future__ import annotations

import inspect
from typing import Any

import torch

from visattn.pipelines.guidance.halves import corrected, half_of, prediction_of, with_prediction
from visattn.pipelines.guidance.perturbing import Perturbation, check_cache
from visattn.pipelines.guidance.sums import read_sum
from visattn.pipelines.patch.install import PatchedModel
from visattn.pipelines.patch.steps import ContextSteps

HOOK = "visattn_guidance"
CONTEXT = "visattn_perturbed"


class Guided:
    """One denoiser whose predictions are corrected.

    Attributes:
        calls: Its forwards.
        guided: Those that were corrected, by one more forward each.
    """

    def __init__(
        self, patched: PatchedModel, scale: float, perturbation: Perturbation, span: tuple[float, float]
    ) -> None:
        model = patched.model
        if any(isinstance(getattr(hook, "__self__", None), Guided) for hook in model._forward_hooks.values()):
            raise ValueError(
                f"{type(model).__name__} is guided already: call remove() on what guide() returned, and guide it anew"
            )
        self._patched, self._scale, self._span = patched, scale, span
        self._perturbation = perturbation
        self._names = list(inspect.signature(type(model).forward).parameters)[1:]
        self._context: ContextSteps | None = None
        self._hook: Any = None
        self._busy = False
        self.calls = self.guided = 0

    def install(self) -> None:
        """Put the hooks in."""
        model = self._patched.model
        if hasattr(model, "cache_context"):
            self._context = ContextSteps(model, HOOK)
        # After the one that ends the forward for the patch.
        self._hook = model.register_forward_hook(self._correct, with_kwargs=True)

    def remove(self) -> None:
        """Take them out; a second call does nothing."""
        if self._hook is not None:
            self._hook.remove()
            self._hook = None
        if self._context is not None:
            self._context.remove()
            self._context = None

    def said(self) -> str:
        """What happened, in a line."""
        name = type(self._patched.model).__name__
        return (
            f"{name}: {self.guided} of {self.calls} forwards guided by {self._scale:g} times the difference to "
            f"{self._perturbation.said()}: {self.guided} forwards more, {self._perturbation.calls} perturbed calls"
        )

    def _correct(self, model: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        """The hook after a forward: its output, corrected."""
        if self._busy or self._scale == 0:
            return None
        self._check(model)
        self.calls += 1
        if not self._active():
            return None
        given = dict(zip(self._names, args, strict=False)) | kwargs
        batch = len(given[self._patched.family.anchor])
        found = read_sum(model, given, batch, None if self._context is None else self._context.name)
        if found is None:
            return None
        perturbed = self._forward(model, given if found.half == slice(None) else half_of(given, batch, found.half))
        self.guided += 1
        prediction = corrected(prediction_of(output), perturbed, self._scale / found.factor, found.half)
        return with_prediction(output, prediction)

    def _active(self) -> bool:
        start, stop = self._span
        if (start, stop) == (0.0, 1.0):
            return True
        step, total = self._patched.running_step()
        if step is None or not total:
            raise ValueError("guide: start and stop need a scheduler that tells its step: leave them out")
        return round(start * total) <= step < round(stop * total)

    def _check(self, model: torch.nn.Module) -> None:
        if self._patched.removed:
            raise ValueError(
                "guide: the handle of the pipeline was removed: call remove() on what guide() returned, too"
            )
        check_cache(model)

    def _forward(self, model: torch.nn.Module, given: dict[str, Any]) -> Any:
        """The perturbed prediction."""
        self._busy = True
        self._perturbation.begin()
        try:
            if self._context is None:
                found = prediction_of(model(**given))
            else:
                # Caches keep what each kind of call had: this is one of its own.
                with model.cache_context(CONTEXT, **self._context.told):  # type: ignore[operator]
                    found = prediction_of(model(**given))
        finally:
            self._busy = False
            self._perturbation.stop()
        self._perturbation.check_called()
        return found
