"""The deterministic steps that exact schedulers are made of: DDIM, and Euler steps of flow matching."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler

from visattn.pipelines.schedulers.wide import Wide

# What has no inverse, by the name of its setting.
_LOSSY = {
    "clip_sample": "clipping loses values",
    "thresholding": "clipping loses values",
    "stochastic_sampling": "its steps add noise",
    "rescale_betas_zero_snr": "its first step divides by zero",
    "invert_sigmas": "its sigmas run the other way",
}
_PREDICTIONS = ("epsilon", "v_prediction", "sample")


class Steps:
    """Steps between noise levels, D(z, e) = a z + b e, with e what the model says of a state.

    Args:
        settings: Of a DDIM scheduler, or of flow matching if they have a `shift`.

    Attributes:
        flow: Whether e is the velocity of flow matching rather than noise.
        plain: The scheduler that has the settings; it tells the timesteps.

    Raises:
        ValueError: If a setting has no inverse.
    """

    def __init__(self, settings: Mapping[str, Any]) -> None:
        for name, why in _LOSSY.items():
            if settings.get(name):
                raise ValueError(f"{name}={settings[name]!r} has no exact inverse ({why}): give {name}=False")
        self.flow = "shift" in settings
        predicted = settings.get("prediction_type", "epsilon")
        if predicted not in _PREDICTIONS:
            raise ValueError(
                f"prediction_type={predicted!r} must be one of {', '.join(_PREDICTIONS)}; flow matching needs a shift"
            )
        # DDIM clips unless it is told not to.
        self.plain: Any = (
            FlowMatchEulerDiscreteScheduler(**settings)
            if self.flow
            else DDIMScheduler(**{"clip_sample": False, **settings})
        )
        # Noise levels of the states, one more than timesteps: (signal, noise) of DDIM, sigma of flow matching.
        self._levels: list[tuple[float, float]] = []

    def __len__(self) -> int:
        return len(self.plain)

    def set_timesteps(self, *args: Any, **options: Any) -> torch.Tensor:
        """Decide the noise levels; returns the timesteps [N]."""
        self.plain.set_timesteps(*args, **options)
        timesteps = self.plain.timesteps
        if self.flow:
            self._levels = [(1.0, sigma) for sigma in self.plain.sigmas.double().tolist()]
        else:
            kept = self.plain.alphas_cumprod.double()
            each = [*kept[timesteps.cpu().long()].tolist(), float(self.plain.final_alpha_cumprod)]
            self._levels = [(alpha**0.5, (1 - alpha) ** 0.5) for alpha in each]
        return timesteps

    def move(self, z: Wide, e: torch.Tensor, start: int, end: int) -> Wide:
        """The state at level `end` that a step from level `start` gives."""
        a, b = self._factors(start, end)
        return z * a + e * b

    def back(self, z: Wide, e: torch.Tensor, start: int, end: int) -> Wide:
        """The state at level `start` from which a step gives `z` at level `end`."""
        a, b = self._factors(start, end)
        return (z - e * b) / a

    def said(self, output: torch.Tensor, state: Wide, at: int) -> torch.Tensor:
        """What the model's output at a state says: its noise, or the velocity, in float64."""
        z = state.hi
        output = output.to(z.dtype)
        kind = "epsilon" if self.flow else self.plain.config.prediction_type
        signal, noise = self._levels[at]
        if kind == "v_prediction":
            return signal * output + noise * z
        return (z - signal * output) / noise if kind == "sample" else output

    def _factors(self, start: int, end: int) -> tuple[float, float]:
        (signal, noise), (signal_end, noise_end) = self._levels[start], self._levels[end]
        if self.flow:
            return 1.0, noise_end - noise
        a = signal_end / signal
        return a, noise_end - a * noise
