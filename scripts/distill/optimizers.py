"""Optimizers, their learning rates, and how a batch is shared."""

from __future__ import annotations

import math

import torch
from torch import nn

from scripts.distill.settings import RunConfig
from scripts.train.emoji_optimizer import ADAM_SHARE, Muon, Together, is_inner_matrix


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
    """The optimizer of a run; the pattern's own parameters are a group with a rate of their own.

    With muon AdamW has all but the matrices inside blocks, at a share of the rate.
    """
    own: list[nn.Parameter] = []
    inner: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for name, value in trained.items():
        matrix = config.optimizer == "muon" and is_inner_matrix(name, value)
        (own if name.startswith("own.") else inner if matrix else others).append(value)
    share = ADAM_SHARE if config.optimizer == "muon" else 1.0
    rates = ((others, config.rate * share), (own, config.own_lr or config.rate))
    groups = [{"params": values, "lr": rate, "peak": rate} for values, rate in rates if values]
    if config.optimizer == "prodigy":
        from prodigyopt import Prodigy

        return Prodigy(groups, lr=1.0, weight_decay=config.weight_decay)
    parts: list[torch.optim.Optimizer] = []
    if inner:
        parts.append(Muon(inner, config.rate, weight_decay=config.weight_decay))
        parts[0].param_groups[0]["peak"] = config.rate
    if groups:
        # One launch for all parameters; parts of shared ones have no such form.
        fused = all(value.is_cuda for value in trained.values()) and not config.fsdp
        given = {"betas": (0.9, 0.99), "weight_decay": config.weight_decay, "fused": fused}
        parts.append(torch.optim.AdamW(groups, lr=config.rate, **given))
    return parts[0] if len(parts) == 1 else Together(*parts)


def rate_share(step: int, done: float, config: RunConfig) -> float:
    """Learning rate of a step as a share of its peak, when a share `done` of the run is over."""
    warm = min(1.0, (step + 1) / config.warmup) if config.warmup else 1.0
    if config.schedule == "constant":
        return warm
    return warm * (0.02 + 0.98 * (0.5 + 0.5 * math.cos(math.pi * done)))
