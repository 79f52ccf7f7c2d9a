"""A guider for modular pipelines, and for others that have one: classifier-free guidance and perturbed attention."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from diffusers.configuration_utils import register_to_config
from diffusers.guiders.guider_utils import BaseGuidance, GuiderOutput, rescale_noise_cfg

from visattn.handle import Handle, apply
from visattn.pipelines.guidance.perturbing import Perturbation, check_options, perturbation_of
from visattn.pipelines.patch.install import PatchedModel, patched_model
from visattn.selectors import Layers

PLAIN, WITHOUT, PERTURBED = "pred_cond", "pred_uncond", "pred_perturbed"


class PerturbedGuidance(BaseGuidance):
    """Classifier-free guidance plus `scale * (c - p)`, with p predicted under perturbed attention, see `visattn.guide`.

    Takes the place of a pipeline's guider, `pipe.update_components(guider=PerturbedGuidance(...))`. Unlike diffusers'
    `PerturbedAttentionGuidance` it runs in models whose sequences hold text too, and without classifier-free guidance
    (`guidance_scale=1`: distilled models). Models are patched only while they predict p; those that `visattn.apply` has
    patched keep their patterns in all predictions.

    Args:
        guidance_scale: Scale s of classifier-free guidance, `u + s (c - u)`; 1 for none.
        scale: How strongly perturbed attention is kept away from, 0 or more.
        perturb: "identity", "blur", "blur(sigma=2)" or the text of a pattern, as in `guide`.
        layers: Which layers, as in `guide`.
        heads: Heads of layers instead, {"3": [1, 7]}.
        strength: How much of the perturbation they get, from 0 to 1.
        perturb_start: Share of the steps that pass before p is predicted.
        perturb_stop: Share of the steps after which it no longer is.
        guidance_rescale: Rescales the sum as diffusers' guiders do, from 0 to 1.
        use_original_formulation: Whether s counts from c, `c + s (c - u)`.
        start: Share of the steps that pass before classifier-free guidance begins.
        stop: Share of the steps after which it ends.
        enabled: Whether to guide at all.

    Raises:
        ValueError: If an option is out of its range; while it runs, if the model is compiled or unknown to visattn, or
            its cache would mix predictions.
    """

    _input_predictions: ClassVar[list[str]] = [PLAIN, WITHOUT, PERTURBED]

    @register_to_config
    def __init__(
        self,
        guidance_scale: float = 7.5,
        scale: float = 3.0,
        perturb: str = "identity",
        layers: Layers = None,
        heads: Mapping[str, Sequence[int]] | None = None,
        strength: float = 1.0,
        perturb_start: float = 0.0,
        perturb_stop: float = 1.0,
        guidance_rescale: float = 0.0,
        use_original_formulation: bool = False,
        start: float = 0.0,
        stop: float = 1.0,
        enabled: bool = True,
    ) -> None:
        super().__init__(start, stop, enabled)
        check_options(scale, strength, perturb_start, perturb_stop, layers, heads)
        self._by = perturbation_of(perturb)
        self.guidance_scale, self.guidance_rescale = guidance_scale, guidance_rescale
        self.use_original_formulation = use_original_formulation
        self.scale = scale
        self._layers, self._heads, self._strength = layers, heads, strength
        self._span = perturb_start, perturb_stop
        self._running: tuple[Perturbation, Handle | None] | None = None
        self._steps = self._guided = self._calls = 0
        self._said = ""

    @property
    def is_conditional(self) -> bool:
        """Whether the prediction that is prepared has the prompt: all but the second of classifier-free guidance."""
        return not (self._is_cfg_enabled() and self._count_prepared == 2)

    @property
    def num_conditions(self) -> int:
        """Predictions of this step."""
        return len(self._predictions())

    def report(self) -> str:
        """What was perturbed in the steps so far, and how often."""
        return f"{self._guided} of {self._steps} steps guided by {self.scale:g} times the difference to " + (
            f"{self._said}: {self._calls} perturbed calls" if self._said else f"{self._by}"
        )

    def prepare_inputs(self, data: Any) -> list[Any]:
        """The inputs of each prediction of this step, from (with, without the prompt)."""
        return [self._prepare_batch(data, half, name) for name, half in self._predictions()]

    def prepare_inputs_from_block_state(self, data: Any, input_fields: Any) -> list[Any]:
        """The same, from the names of fields of a modular pipeline's state."""
        return [
            self._prepare_batch_from_block_state(input_fields, data, half, name) for name, half in self._predictions()
        ]

    def prepare_models(self, denoiser: torch.nn.Module) -> None:
        """Called before each prediction: the last one is perturbed, if this step has one that is."""
        self._count_prepared += 1
        self._release()
        if self._count_prepared == self.num_conditions:
            self._steps += 1
            if self._is_perturbing():
                self._perturb(denoiser)

    def cleanup_models(self, denoiser: torch.nn.Module) -> None:
        """Called after each prediction."""
        if self._running is None:
            return
        perturbation = self._running[0]
        self._release()
        perturbation.check_called(self._calls)
        self._guided += 1
        self._calls += perturbation.calls
        self._said = perturbation.said()

    def forward(
        self,
        pred_cond: torch.Tensor,
        pred_uncond: torch.Tensor | None = None,
        pred_perturbed: torch.Tensor | None = None,
    ) -> GuiderOutput:
        """The sum of a step's predictions."""
        pred = pred_cond
        if pred_uncond is not None:
            begin = pred_cond if self.use_original_formulation else pred_uncond
            pred = begin + self.guidance_scale * (pred_cond - pred_uncond)
        if pred_perturbed is not None:
            pred = pred + self.scale * (pred_cond - pred_perturbed)
        if self.guidance_rescale > 0:
            pred = rescale_noise_cfg(pred, pred_cond, self.guidance_rescale)
        return GuiderOutput(pred=pred, pred_cond=pred_cond, pred_uncond=pred_uncond)

    def _predictions(self) -> list[tuple[str, int]]:
        """Their names, each with which half of the inputs it takes."""
        found = [(PLAIN, 0)]
        if self._is_cfg_enabled():
            found.append((WITHOUT, 1))
        if self._is_perturbing():
            found.append((PERTURBED, 0))
        return found

    def _is_cfg_enabled(self) -> bool:
        nothing = 0.0 if self.use_original_formulation else 1.0
        return self._within(self._start, self._stop) and not math.isclose(self.guidance_scale, nothing)

    def _is_perturbing(self) -> bool:
        return bool(self.scale and self._strength) and self._within(*self._span)

    def _within(self, start: float, stop: float) -> bool:
        if not self._enabled or self._num_inference_steps is None:
            return self._enabled
        return round(start * self._num_inference_steps) <= self._step < round(stop * self._num_inference_steps)

    def _perturb(self, denoiser: torch.nn.Module) -> None:
        if hasattr(denoiser, "_orig_mod"):
            raise ValueError("guide: the model is compiled, which hides its attention modules: guide it uncompiled")
        patched, handle = patched_model(denoiser), None
        if patched is None:
            handle = apply(denoiser, "dense")
            patched = next(each for each in handle.patches if isinstance(each, PatchedModel))
        try:
            perturbation = Perturbation(patched, self._by, self._layers, self._heads, self._strength)
            perturbation.begin()
        except ValueError:
            if handle is not None:
                handle.remove()
            raise
        self._running = perturbation, handle

    def _release(self) -> None:
        """Leave the model as it was, also where a forward failed."""
        if self._running is not None:
            perturbation, handle = self._running
            self._running = None
            perturbation.stop()
            if handle is not None:
                handle.remove()
