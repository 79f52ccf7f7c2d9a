"""Optimizers, their learning rates, and how a batch is shared."""

from __future__ import annotations

import math

import torch
from torch import nn

from scripts.distill.settings import RunConfig


def micro_batches(config: RunConfig, rank: int, processes: int) -> list[slice]:
    """The parts of a step's batch that one process runs, one after the other.

    Raises:
        ValueError: If the batch cannot be shared so.
    """
    micro = config.micro_batch or config.batch // processes
    if config.batch % processes or not micro or (config.batch // processes) % micro:
        raise ValueError(
            f"--batch {config.batch} must be a multiple of {processes} processes x --micro-batch {config.micro_batch}"
        )
    share = config.batch // processes
    return [slice(start, start + micro) for start in range(rank * share, (rank + 1) * share, micro)]


def build_optimizer(trained: dict[str, nn.Parameter], config: RunConfig) -> torch.optim.Optimizer:
    """AdamW or Prodigy; the pattern's own parameters are a group with a rate of their own."""
    own = [value for name, value in trained.items() if name.startswith("own.")]
    others = [value for name, value in trained.items() if not name.startswith("own.")]
    rates = ((others, config.rate), (own, config.own_lr or config.rate))
    groups = [{"params": values, "lr": rate, "peak": rate} for values, rate in rates if values]
    if config.optimizer == "prodigy":
        from prodigyopt import Prodigy

        return Prodigy(groups, lr=1.0, weight_decay=config.weight_decay)
    # One launch for all parameters; parts of shared ones have no such form.
    fused = all(value.is_cuda for value in trained.values()) and not config.fsdp
    return torch.optim.AdamW(groups, lr=config.rate, betas=(0.9, 0.99), weight_decay=config.weight_decay, fused=fused)


def rate_share(step: int, done: float, config: RunConfig) -> float:
    """Learning rate of a step as a share of its peak, when a share `done` of the run is over."""
    warm = min(1.0, (step + 1) / config.warmup) if config.warmup else 1.0
    if config.schedule == "constant":
        return warm
    return warm * (0.02 + 0.98 * (0.5 + 0.5 * math.cos(math.pi * done)))
