"""One denoiser whose predictions are corrected by those with perturbed attention."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from visattn.patterns import Pattern
from visattn.pipelines.guidance.halves import corrected, half_of, prediction_of, with_prediction
from visattn.pipelines.guidance.sums import read_sum
from visattn.pipelines.patch.install import PatchedModel
from visattn.pipelines.patch.sites import Site
from visattn.pipelines.patch.steps import ContextSteps
from visattn.runtime.perturbed import Blur, Perturbed
from visattn.schedule import Schedule, check_dims
from visattn.selectors import Layers

HOOK = "visattn_guidance"
CONTEXT = "visattn_perturbed"
# Caches that keep what modules returned last, whatever the pipeline calls the forward.
MIXING = ("FasterCacheConfig", "PyramidAttentionBroadcastConfig")


class Guided:
    """One denoiser whose predictions are corrected.

    Attributes:
        calls: Its forwards.
        guided: Those that were corrected, by one more forward each.
    """

    def __init__(
        self,
        patched: PatchedModel,
        scale: float,
        by: Pattern | Blur,
        chosen: list[tuple[Site, frozenset[int] | None]],
        strength: float,
        span: tuple[float, float],
    ) -> None:
        model = patched.model
        name = type(model).__name__
        if any(getattr(each, "_compiled_call_impl", None) is not None for each in model.modules()):
            raise ValueError(f"{name} is compiled, which hides its attention modules: guide it uncompiled")
        if any(isinstance(getattr(hook, "__self__", None), Guided) for hook in model._forward_hooks.values()):
            raise ValueError(f"{name} is guided already: call remove() on what guide() returned, and guide it anew")
        if isinstance(by, Pattern):
            check_dims(by, patched.family.dims, name)
        # Nothing of a perturbation is no perturbation, and exactly so.
        self._patched, self._scale, self._by, self._span = patched, scale if strength else 0.0, by, span
        self._perturbed: dict[str, Perturbed] = {}
        for site, heads in chosen:
            assert site.group is not None
            self._perturbed[site.name.path] = Perturbed(patched.run, site.group, by, strength, heads)
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
        calls = sum(each.calls for each in self._perturbed.values())
        paths = list(self._perturbed)
        places = f"{', '.join(paths[:4])}{', ...' if len(paths) > 4 else ''}"
        return (
            f"{name}: {self.guided} of {self.calls} forwards guided by {self._scale:g} times the difference to "
            f"{self._by} in {len(paths)} attention modules ({places}): {self.guided} forwards more, {calls} perturbed "
            "calls"
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
        cache = type(getattr(model, "_cache_config", None)).__name__
        if cache in MIXING:
            raise ValueError(
                f"guide: the cache of {cache} would mix perturbed attention with plain: use one that tells forwards "
                "apart, like FirstBlockCacheConfig or MagCacheConfig"
            )

    def _forward(self, model: torch.nn.Module, given: dict[str, Any]) -> Any:
        """The perturbed prediction."""
        here = self._patched.run.here
        self._busy, here.perturbed = True, self._perturbed
        try:
            if self._context is None:
                found = prediction_of(model(**given))
            else:
                # Caches keep what each kind of call had: this is one of its own.
                with model.cache_context(CONTEXT, **self._context.told):  # type: ignore[operator]
                    found = prediction_of(model(**given))
        finally:
            self._busy, here.perturbed = False, None
        if not any(each.calls for each in self._perturbed.values()):
            raise ValueError(f"guide: {type(model).__name__} did not call {', '.join(self._perturbed)}: choose others")
        return found


def chosen_sites(
    patched: PatchedModel, layers: Layers, heads: Mapping[str, Sequence[int]] | None
) -> list[tuple[Site, frozenset[int] | None]]:
    """The modules that are perturbed, each with its heads, None for all."""
    sites, model = patched.sites, type(patched.model).__name__
    names = [site.name for site in sites]
    if heads is None:
        picked = _middle(sites) if layers is None else layers
        given = Schedule.of("dense", picked).assign(names, model)
        return [(site, None) for site, each in zip(sites, given, strict=True) if each is not None]
    found: dict[int, frozenset[int]] = {}
    for layer, numbers in heads.items():
        chosen = frozenset(numbers)
        if not chosen or not all(isinstance(n, int) and n >= 0 for n in chosen):
            raise ValueError(f"heads[{layer!r}]={numbers!r} must be indices of heads, from 0")
        for i, each in enumerate(Schedule.of("dense", str(layer)).assign(names, model)):
            if each is not None:
                found[i] = found.get(i, frozenset()) | chosen
    return [(sites[i], found[i]) for i in sorted(found)]


def _middle(sites: Sequence[Site]) -> list[str]:
    """Names of the layers in the middle: a UNet's middle block, else a fifth of all."""
    layers = list(dict.fromkeys(site.name.layer for site in sites))
    blocks = [layer for layer in layers if layer.startswith("mid_block")]
    if blocks:
        return blocks
    middle, around = len(layers) // 2, len(layers) // 10
    return layers[middle - around : middle + around + 1]
