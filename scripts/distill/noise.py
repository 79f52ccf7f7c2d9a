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
                "step" of the sampler that begins there (Euler's, or DDIM's), in units of a mean step.
        """
        if errors == "step":
            return self._of_steps(times)
        if self.kind != "sample" or self.alphas is not None:
            return None
        return (times / TRAIN_TIMES).clamp(min=LEAST_NOISE) ** -2

    def _of_steps(self, times: torch.Tensor) -> torch.Tensor:
        table = torch.tensor([0.0, *reversed(self.timesteps)], device=times.device)
        index = torch.bucketize(times, table).clamp(1, len(table) - 1)
        # A step is as long wherever in it a time lies.
        after = (times - table[index] + table[index - 1]).clamp(min=0)
        signal, dirt, next_signal, next_dirt = *self._shares(times), *self._shares(after, index == 1)
        moved = {
            "flow": next_dirt - dirt,
            "sample": next_signal - next_dirt * signal / dirt,
            "epsilon": next_dirt - next_signal * dirt / signal,
            "v_prediction": next_dirt * signal - next_signal * dirt,
        }[self.kind]
        return (len(self.timesteps) * moved).square()

    def _shares(self, times: torch.Tensor, last: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """How much of the clean sample and of the noise there is at some times, behind the last step none."""
        if self.alphas is None:
            dirt = times / TRAIN_TIMES
            return 1 - dirt, dirt.clamp(min=torch.finfo(dirt.dtype).tiny)
        alpha = self.alphas.to(times.device)[times.long().clamp(max=len(self.alphas) - 1)]
        if last is not None:
            # Behind the last step nothing is left of the noise, at time 0 there is some.
            alpha = alpha.where(~last, 1.0)
        return alpha.sqrt(), (1 - alpha).clamp(min=torch.finfo(alpha.dtype).tiny).sqrt()


def _like(values: torch.Tensor, latents: torch.Tensor) -> torch.Tensor:
    return values.to(latents.dtype).view(-1, *[1] * (latents.ndim - 1))
