"""Blocked local attention with a halo (HaloNet), in one to three dimensions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from visattn.patterns.geometry import Spans
from visattn.patterns.kinds import SpannedPattern
from visattn.patterns.values import PerAxis, aligned, flags, per_axis, whole_numbers
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
        circular: Whether that axis wraps around, so that the halo goes on at its other end.

    Where keys are on a grid of their own, blocks are of queries; they see the keys that they touch, and `halo` keys
    beyond each side.

    Raises:
        ValueError: If a parameter is out of range, here or on the grid it is used with.
    """

    block: PerAxis
    halo: PerAxis
    circular: bool | tuple[bool, ...] = False

    name: ClassVar[str] = "halo"
    two_grids: ClassVar[bool] = True

    def __post_init__(self) -> None:
        values = {
            "block": whole_numbers(self.block, "block", 1, also=(-1,)),
            "halo": whole_numbers(self.halo, "halo", 0),
            "circular": flags(self.circular, "circular"),
        }
        for name, value in aligned(values, self).items():
            object.__setattr__(self, name, value)

    def check(self, grid: tuple[int, ...], keys: tuple[int, ...] | None = None) -> None:
        """Raise a ValueError if the number of axes differs."""
        self.axes(grid, keys)
        per_axis(self.circular, len(grid), "circular")

    def axes(self, grid: tuple[int, ...], keys: tuple[int, ...] | None = None) -> list[tuple[int, int]]:
        """Block and halo per axis, each at most the axis (the halo that of the keys)."""
        blocks, halos = (per_axis(getattr(self, name), len(grid), name) for name in ("block", "halo"))
        rows = zip(grid, keys or grid, blocks, halos, strict=True)
        return [(n if b == -1 else min(b, n), min(h, key_n)) for n, key_n, b, h in rows]

    def spans(self, grid: tuple[int, ...], keys: tuple[int, ...] | None = None) -> list[Spans]:
        """The visible positions of each query, per axis."""
        rings = per_axis(self.circular, len(grid), "circular")
        rows = zip(grid, keys or grid, self.axes(grid, keys), rings, strict=True)
        return [_spans(n, key_n, *axis, circular) for n, key_n, axis, circular in rows]

    def covers(self, grid: tuple[int, ...], keys: tuple[int, ...] | None = None) -> bool:
        """Whether every block with its halo is the whole grid."""
        return all(axis.whole for axis in self.spans(grid, keys))

    def tile(self, grid: tuple[int, ...], volume: int = 64) -> tuple[int, ...]:
        """A box that the block fills, so that its queries share all their keys."""
        return box_shape(tuple(block for block, _ in self.axes(grid)), volume)


def _spans(length: int, keys: int, block: int, halo: int, circular: bool) -> Spans:
    """Visible positions along one axis: the keys that the query's block touches, and `halo` on both sides."""
    first = np.arange(length) // block * block
    last = np.minimum(first + block, length)
    start, stop = first * keys // length - halo, -(-last * keys // length) + halo
    if circular:
        everything = stop - start >= keys
        return Spans(np.where(everything, 0, start), np.where(everything, keys, stop), 1, keys, True)
    return Spans(np.maximum(start, 0), np.minimum(stop, keys), 1, keys)
