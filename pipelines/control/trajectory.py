"""The noisy states of given pictures at every step of a run: by inversion, or with drawn noise."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from diffusers import DDIMInverseScheduler, DDIMScheduler, FlowMatchEulerDiscreteScheduler


class EulerInverseScheduler(FlowMatchEulerDiscreteScheduler):
    """Euler steps of flow matching from a picture to noise, as DDIM inversion.

    Each step takes the velocity at the noisier end's time. Not exact; those of `visattn.pipelines.schedulers` are.
    """

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: Any = None,
        sigmas: list[float] | None = None,
        mu: float | None = None,
        timesteps: list[float] | None = None,
    ) -> None:
        """Those of the way from noise, the other way round."""
        # Pipelines read from the names whether they may pass their own.
        super().set_timesteps(num_inference_steps, device, sigmas, mu, timesteps)
        self.sigmas, self.timesteps = self.sigmas.flip(0), self.timesteps.flip(0)


class Trajectory(Protocol):
    """Noisy states of pictures."""

    def at(self, done: int, scheduler: Any) -> torch.Tensor:
        """The states [B, ...] after so many steps from noise, with the scheduler of the run."""
        ...


def plain_scheduler(config: Any) -> Any:
    """DDIM, or Euler steps of flow matching, with the settings of another scheduler."""
    if "shift" in config:
        return FlowMatchEulerDiscreteScheduler.from_config(config)
    return DDIMScheduler.from_config(config, clip_sample=False)


def inverse_scheduler(config: Any) -> Any:
    """The way from pictures to noise of `plain_scheduler`."""
    if "shift" in config:
        return EulerInverseScheduler.from_config(config)
    return DDIMInverseScheduler.from_config(config, clip_sample=False)


class Inverted:
    """States that an inversion went through.

    Args:
        states: From the clean one to noise.
    """

    def __init__(self, states: list[torch.Tensor]) -> None:
        self._states = states

    def at(self, done: int, scheduler: Any) -> torch.Tensor:
        """See `Trajectory`."""
        return self._states[len(self._states) - 1 - done]


class Noised:
    """Pictures with the same drawn noise, as much as a step has.

    Args:
        clean: [B, ...].
        noise: [1, ...].
    """

    def __init__(self, clean: torch.Tensor, noise: torch.Tensor) -> None:
        self._clean, self._noise = clean, noise.expand_as(clean)

    def at(self, done: int, scheduler: Any) -> torch.Tensor:
        """See `Trajectory`."""
        if not done:
            return self._noise.clone()
        if done >= len(scheduler.timesteps):
            return self._clean
        if hasattr(scheduler, "sigmas") and hasattr(scheduler, "scale_noise"):
            level = scheduler.sigmas[done].to(self._clean)
            return level * self._noise + (1 - level) * self._clean
        return scheduler.add_noise(self._clean, self._noise, scheduler.timesteps[done : done + 1])
