"""`visattn.guide`: a pipeline whose predictions keep away from those with disturbed attention."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any

import torch

from visattn.handle import Handle, apply, check_handle
from visattn.patterns import Pattern
from visattn.pipelines.guidance.guided import Guided
from visattn.pipelines.guidance.perturbing import Perturbation, check_options, perturbation_of
from visattn.pipelines.patch.install import PatchedModel
from visattn.pipelines.patch.targets import DENOISERS
from visattn.runtime.perturbed import Blur
from visattn.selectors import Layers


def guide(
    pipe: Any,
    scale: float = 3.0,
    perturb: str | Pattern = "identity",
    *,
    layers: Layers = None,
    heads: Mapping[str, Sequence[int]] | None = None,
    strength: float = 1.0,
    start: float = 0.0,
    stop: float = 1.0,
    handle: Handle | None = None,
    **options: Any,
) -> Guidance:
    """Guide a diffusers pipeline away from what it predicts with disturbed attention, until the handle removes it.

    Each step predicts once more, with the attention of some layers perturbed: p beside c, the prediction with the
    prompt. Added to the sum that the pipeline makes of its predictions is `scale * (c - p)`, with classifier-free
    guidance (one batch or two calls) and without (distilled models). Where the pipeline rescales its guidance, it does
    so afterwards. Perturbed-attention guidance (PAG, https://arxiv.org/abs/2403.17377, section 4); of some heads and in
    part https://arxiv.org/abs/2506.10978; by blurred queries (SEG) https://arxiv.org/abs/2408.00760, section 3.

    Args:
        pipe: A diffusers pipeline, not compiled.
        scale: How strongly, 0 or more; 3 as in the paper.
        perturb: "identity": an image token sees itself and the text. "blur" or "blur(sigma=2)": queries are means over
            the grid, of all tokens or by a Gaussian of so many tokens. Or any pattern, as in `apply`: away from what
            the model would make with it.
        layers: Which layers, as in `apply`; None for the middle block of a UNet, and about a fifth of a transformer's
            layers around its middle one.
        heads: Heads of layers, {"3": [1, 7], "transformer_blocks.5": [0]}, instead of `layers`.
        strength: How much of the perturbation those heads get, from 0 to 1.
        start: Share of the steps that pass before it begins.
        stop: Share of the steps after which it ends.
        handle: That of a pipeline which is patched already; its patterns run in both predictions. None patches it here.
        options: Given to `apply` with `handle=None`, which is "dense" unless `pattern=` says otherwise.

    Returns:
        The handle that reports and undoes; also a context manager.

    Raises:
        ValueError: If an option is out of its range, nothing is selected, the pipeline is compiled or has no denoiser
            that visattn knows; and while it runs, if it does not tell which of its predictions have the prompt.
    """
    by = perturbation_of(perturb)
    check_options(scale, strength, start, stop, layers, heads)
    if isinstance(pipe, torch.nn.Module):
        raise ValueError(
            f"guide() needs the pipeline that adds up the predictions, not {type(pipe).__name__} alone: pass that"
        )
    check_handle(handle)
    if handle is not None and options:
        raise ValueError(f"handle= has its options already: leave {', '.join(sorted(options))} out")
    own = handle is None
    applied = apply(pipe, options.pop("pattern", "dense"), **options) if handle is None else handle
    try:
        return Guidance(pipe, applied, own, scale, by, layers, heads, strength, (start, stop))
    except BaseException:
        if own:
            applied.remove()
        raise


class Guidance:
    """A guided pipeline: says what happened, and undoes it. Also a context manager that undoes it at its end.

    Attributes:
        handle: That of the patched pipeline.
    """

    def __init__(
        self,
        pipe: Any,
        handle: Handle,
        own: bool,
        scale: float,
        by: Pattern | Blur,
        layers: Layers,
        heads: Mapping[str, Sequence[int]] | None,
        strength: float,
        span: tuple[float, float],
    ) -> None:
        self.handle, self._own = handle, own
        denoisers = [getattr(pipe, name, None) for name in DENOISERS]
        if any(hasattr(model, "_orig_mod") for model in denoisers):
            raise ValueError(
                f"a model of {type(pipe).__name__} is compiled, which hides its attention modules: guide it uncompiled"
            )
        found = [each for each in handle.patches if isinstance(each, PatchedModel)]
        found = [each for each in found if any(each.model is model for model in denoisers)]
        if not found:
            raise ValueError(
                f"{type(pipe).__name__} has no denoiser that this handle patched: pass the handle of this pipeline"
            )
        # Nothing of a perturbation is no perturbation, and exactly so.
        scale = scale if strength else 0.0
        self._guided = [
            Guided(patched, scale, Perturbation(patched, by, layers, heads, strength), span) for patched in found
        ]
        for each in self._guided:
            each.install()

    def report(self) -> str:
        """What was perturbed and how often; what else runs in perturbed forwards counts in `handle.report()`."""
        return "\n".join(each.said() for each in self._guided)

    def remove(self) -> None:
        """Predict as before; undoes the patch too if `guide` made it. A second call does nothing."""
        for each in self._guided:
            each.remove()
        if self._own:
            self.handle.remove()

    def __enter__(self) -> Guidance:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.remove()
