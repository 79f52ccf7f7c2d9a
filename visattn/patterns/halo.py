"""Blocked local attention with a halo (HaloNet), in one to three dimensions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from visattn.patterns.geometry import Spans
from visattn.patterns.kinds import SpannedPattern
from visattn.patterns.values import PerAxis, aligned, per_axis, whole_numbers
from visattn.tiling import box_shape


@dataclass(frozen=True)
class Halo(SpannedPattern):
    """Queries of a block see the block and `halo` tokens around it; what lies outside the grid is masked.

    Source: Vaswani et al., "Scaling Local Self-Attention for Parameter Efficient Visual Backbones"
    (CVPR 2021), section 2.2. HaloNet as trained lets its zero padding take part in the softmax: that form is
    `visattn.kernels.halo_padded`.

    Attributes:
        block: Queries per block and axis; -1, or anything longer than the axis, is the whole axis. Where it does
            not divide the axis, the last block is short.
        halo: Tokens seen beyond each side of the block.

    Raises:
        ValueError: If a parameter is out of range, here or on the grid it is used with.
    """

    block: PerAxis
    halo: PerAxis

    name: ClassVar[str] = "halo"

    def __post_init__(self) -> None:
        values = {
            "block": whole_numbers(self.block, "block", 1, also=(-1,)),
            "halo": whole_numbers(self.halo, "halo", 0),
        }
        for name, value in aligned(values, self).items():
            object.__setattr__(self, name, value)

    def check(self, grid: tuple[int, ...]) -> None:
        """Raise a ValueError if the number of axes differs."""
        self.axes(grid)

    def axes(self, grid: tuple[int, ...]) -> list[tuple[int, int]]:
        """Block and halo per axis, each at most the axis."""
        blocks, halos = (per_axis(getattr(self, name), len(grid), name) for name in ("block", "halo"))
        return [(n if b == -1 else min(b, n), min(h, n)) for n, b, h in zip(grid, blocks, halos, strict=True)]

    def spans(self, grid: tuple[int, ...]) -> list[Spans]:
        """The visible positions of each query, per axis."""
        spans = []
        for n, (block, halo) in zip(grid, self.axes(grid), strict=True):
            first = np.arange(n) // block * block
            spans.append(Spans(np.maximum(first - halo, 0), np.minimum(first + block + halo, n)))
        return spans

    def covers(self, grid: tuple[int, ...]) -> bool:
        """Whether every block with its halo is the whole grid."""
        return all((s.start == 0).all() and (s.stop == n).all() for n, s in zip(grid, self.spans(grid), strict=True))

    def tile(self, grid: tuple[int, ...], volume: int = 64) -> tuple[int, ...]:
        """A box that the block fills, so that its queries share all their keys."""
        return box_shape(tuple(block for block, _ in self.axes(grid)), volume)
