"""How noisy a training example is, what the denoiser sees of it, and what it should predict."""

from __future__ import annotations

from dataclasses import dataclass

import torch

TRAIN_TIMES = 1000.0


@dataclass(frozen=True)
class Noise:
    """The forward process of a sampler.

    Attributes:
        kind: "flow" (x = (1 - s) x0 + s e, prediction e - x0), "epsilon" or "v_prediction".
        timesteps: Times that the sampler visits, descending, 0 to 1000.
        time_scale: The denoiser's time by the scheduler's.
        alphas: Cumulated alphas [1000] of the kinds other than flow.
    """

    kind: str
    timesteps: tuple[float, ...]
    time_scale: float = 1.0
    alphas: torch.Tensor | None = None

    def draw(self, count: int, how: str, generator: torch.Generator) -> torch.Tensor:
        """Times [count] from 0 to 1000.

        Args:
            count: Of the batch.
            how: "sampler" follows the density of the sampler's own steps, "uniform", or "logit-normal".
            generator: On the CPU.
        """
        if how == "logit-normal":
            return TRAIN_TIMES * torch.randn(count, generator=generator).sigmoid()
        position = torch.rand(count, generator=generator)
        if how == "uniform":
            return TRAIN_TIMES * position
        table = torch.tensor([*self.timesteps, 0.0])
        position = position * (len(table) - 1)
        low = position.long().clamp(max=len(table) - 2)
        return torch.lerp(table[low], table[low + 1], position - low)

    def mix(self, clean: torch.Tensor, noise: torch.Tensor, times: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Noisy latents, what to predict from them, and the times that the denoiser is told.

        Args:
            clean: [B, ...].
            noise: [B, ...].
            times: [B], 0 to 1000.
        """
        if self.kind == "flow":
            share = _like(times / TRAIN_TIMES, clean)
            return torch.lerp(clean, noise, share), noise - clean, times * self.time_scale
        assert self.alphas is not None
        index = times.long().clamp(0, len(self.alphas) - 1)
        alpha = _like(self.alphas.to(clean.device)[index], clean)
        signal, dirt = alpha.sqrt(), (1 - alpha).sqrt()
        target = noise if self.kind == "epsilon" else signal * noise - dirt * clean
        return signal * clean + dirt * noise, target, index * self.time_scale


def _like(values: torch.Tensor, latents: torch.Tensor) -> torch.Tensor:
    return values.to(latents.dtype).view(-1, *[1] * (latents.ndim - 1))
