"""Distances of a student to its teacher, and the hooks that see attention outputs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional as F

from visattn.watch import Watched


class Recorder:
    """Keeps the attention outputs of some modules during a forward; use it as a context.

    Args:
        modules: Attention modules by path.
        before: Whether to take what enters the output projection; a module without one (a single-stream block
            projects outside of it) gives its output in both cases.
    """

    def __init__(self, modules: Mapping[str, nn.Module], before: bool) -> None:
        self.kept: dict[str, torch.Tensor] = {}
        self._on = False
        for path, module in modules.items():
            projection = getattr(module, "to_out", None)
            if before and isinstance(projection, nn.ModuleList):
                projection[0].register_forward_pre_hook(self._before(path))
            else:
                module.register_forward_hook(self._after(path))

    def __enter__(self) -> Recorder:
        self._on, self.kept = True, {}
        return self

    def __exit__(self, *unused: Any) -> None:
        # Gradient checkpointing runs blocks again in the backward: those outputs are not wanted.
        self._on = False

    def _before(self, path: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            if self._on:
                self.kept[path] = args[0]

        return hook

    def _after(self, path: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            if self._on:
                self.kept[path] = output[0] if isinstance(output, tuple) else output

        return hook


class Rows:
    """Keeps the attention rows of sampled queries: give it to `Handle.watch`, and run a forward inside `of`."""

    def __init__(self) -> None:
        self.kept: dict[str, torch.Tensor] = {}
        self._places: torch.Tensor | None = None

    @contextmanager
    def of(self, places: torch.Tensor) -> Iterator[None]:
        """Context in which rows are kept.

        Args:
            places: Queries [R], as shares of the tokens from 0 to below 1.
        """
        self._places, self.kept = places, {}
        try:
            yield
        finally:
            # Gradient checkpointing runs blocks again in the backward: those rows are not wanted.
            self._places = None

    def __call__(self, watched: Watched) -> None:
        """Keeps the rows [B, H, R, S] of one call."""
        if self._places is not None:
            self.kept[watched.site] = watched.rows((self._places * watched.q.shape[1]).long())


def distance(one: torch.Tensor, other: torch.Tensor, weights: torch.Tensor | None = None) -> torch.Tensor:
    """Mean squared distance of predictions [B, ...], each sample's by its weight [B]."""
    if weights is None:
        return F.mse_loss(one, other)
    return ((one - other).square().flatten(1).mean(1) * weights).mean()


def attention_distance(
    student: Mapping[str, torch.Tensor],
    teacher: Mapping[str, torch.Tensor],
    relative: bool,
    among: dist.ProcessGroup | None = None,
) -> torch.Tensor:
    """Mean over modules of the mean squared distance of attention outputs.

    Args:
        student: Outputs by path.
        teacher: The same of the teacher.
        relative: Divide each by the teacher's mean square: layers differ in size by orders of magnitude. False is
            the loss of CLEAR (Liu et al. 2024, section 3.3).
        among: Processes that have a slab each of the outputs: the mean of what they return is that of the whole.
    """
    found = []
    for path, truth in teacher.items():
        error, square = F.mse_loss(student[path].float(), truth.float()), truth.float().square().mean()
        if among is not None:
            share = torch.tensor(float(truth.numel()), device=truth.device)
            sums = torch.stack([share, share * square])
            dist.all_reduce(sums, group=among)
            error, square = error * share * dist.get_world_size(among) / sums[0], sums[1] / sums[0]
        found.append(error / square.clamp_min(1e-12) if relative else error)
    return torch.stack(found).mean()


def map_distance(rows: Mapping[str, torch.Tensor], truth: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Mean cross-entropy of attention rows to the teacher's.

    Source: Zhang et al., "The Hedgehog & the Porcupine" (ICLR 2024), section 4.2.

    Args:
        rows: Attention of sampled queries to all keys by module [B, H, rows, S]; each row sums to 1.
        truth: The teacher's, of the same modules.
    """
    found = [-(each.float() * rows[path].float().clamp_min(1e-8).log()).sum(-1).mean() for path, each in truth.items()]
    return torch.stack(found).mean()
