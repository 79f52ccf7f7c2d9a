"""How noisy a training example is, what the denoiser sees of it, and what it should predict."""

from __future__ import annotations

from dataclasses import dataclass

import torch

TRAIN_TIMES = 1000.0
KINDS = ("flow", "sample", "epsilon", "v_prediction")
# Errors of a predicted clean sample count as those of the velocity that it implies, down to this share of noise.
LEAST_NOISE = 0.05


@dataclass(frozen=True)
class Noise:
    """The forward process of a sampler.

    Attributes:
        kind: What the denoiser predicts: "flow" (the velocity e - x0), "sample" (x0), "epsilon" or "v_prediction".
        timesteps: Times that the sampler visits, descending, 0 to 1000.
        time_scale: The denoiser's time by the scheduler's.
        alphas: Cumulated alphas [1000]; None for flow matching, x = (1 - s) x0 + s e.
    """

    kind: str
    timesteps: tuple[float, ...]
    time_scale: float = 1.0
    alphas: torch.Tensor | None = None

    def draw(self, count: int, how: str, generator: torch.Generator) -> torch.Tensor:
        """Times [count] from 0 to 1000, one in each `count`-th of the distribution: losses differ most by their noise.

        Args:
            count: Of the batch.
            how: "sampler" follows the density of the sampler's own steps, "uniform", or "logit-normal".
            generator: On the CPU.
        """
        # In any order: parts of a batch have parts of the range by chance alone.
        position = (torch.randperm(count, generator=generator) + torch.rand(count, generator=generator)) / count
        if how == "logit-normal":
            return TRAIN_TIMES * torch.special.ndtri(position.clamp(1e-6, 1 - 1e-6)).sigmoid()
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
        if self.alphas is None:
            share = _like(times / TRAIN_TIMES, clean)
            target = clean if self.kind == "sample" else noise - clean
            return torch.lerp(clean, noise, share), target, times * self.time_scale
        index = times.long().clamp(0, len(self.alphas) - 1)
        alpha = _like(self.alphas.to(clean.device)[index], clean)
        signal, dirt = alpha.sqrt(), (1 - alpha).sqrt()
        targets = {"epsilon": noise, "sample": clean, "v_prediction": signal * noise - dirt * clean}
        return signal * clean + dirt * noise, targets[self.kind], index * self.time_scale

    def weights(self, times: torch.Tensor, errors: str = "velocity") -> torch.Tensor | None:
        """Weights [B] of squared errors at times [B], None for equal ones.

        A sampler of flow matching steps along the velocity (x - x0) / s, so an error of a predicted x0 counts by s.

        Args:
            times: 0 to 1000.
            errors: Which errors are squared: those of the "velocity", or those that the latents have behind the
                "step" of the sampler that begins there, velocity times length, in units of a mean step.

        Raises:
            ValueError: If steps are asked for and the sampler does not step along a velocity.
        """
        share = times / TRAIN_TIMES
        if errors == "step":
            if self.alphas is not None:
                raise ValueError("--errors step is for samplers of flow matching: leave it out for this teacher")
            table = torch.tensor([*self.timesteps, 0.0], device=times.device) / TRAIN_TIMES
            after = torch.bucketize(share, table.flip(0)).clamp(1, len(table) - 1)
            length = (table.flip(0)[after] - table.flip(0)[after - 1]) * (len(table) - 1)
            return (length / share if self.kind == "sample" else length).clamp(max=len(table) - 1) ** 2
        if self.kind != "sample" or self.alphas is not None:
            return None
        return share.clamp(min=LEAST_NOISE) ** -2


def _like(values: torch.Tensor, latents: torch.Tensor) -> torch.Tensor:
    return values.to(latents.dtype).view(-1, *[1] * (latents.ndim - 1))
