"""How a layout is cut in tiles: boxes of grid tokens and runs of dense tokens."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from visattn.layout import Layout

Ints = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class AxisTiles:
    """One axis of `length` tokens cut in tiles of `size` tokens that are `step` apart.

    With step d the axis falls into d dilation groups (the tokens with equal index mod d); a tile holds
    neighbouring positions of one group, so a dilated window is a plain window between such tiles.
    Tiles are ordered by group, then by position; the last tile of a group may be short.
    """

    length: int
    size: int
    step: int = 1

    @cached_property
    def group_start(self) -> Ints:
        """First tile of each group, and the number of tiles last: [groups + 1]."""
        group = np.arange(min(self.step, self.length))
        members = -(-(self.length - group) // self.step)
        return np.concatenate([[0], np.cumsum(-(-members // self.size))])

    @property
    def tiles(self) -> int:
        """Number of tiles on this axis."""
        return int(self.group_start[-1])

    @cached_property
    def group(self) -> Ints:
        """Dilation group of each tile: [tiles]."""
        return np.repeat(np.arange(len(self.group_start) - 1), np.diff(self.group_start))

    @cached_property
    def first(self) -> Ints:
        """Position in its group of each tile's first token: [tiles]."""
        return (np.arange(self.tiles) - self.group_start[self.group]) * self.size

    @cached_property
    def count(self) -> Ints:
        """Tokens of each tile: [tiles]."""
        members = -(-(self.length - self.group) // self.step)
        return np.minimum(self.size, members - self.first)

    @cached_property
    def tokens(self) -> Ints:
        """Axis index of each slot, -1 where a short tile has none: [tiles, size]."""
        slot = np.arange(self.size)
        index = self.group[:, None] + self.step * (self.first[:, None] + slot)
        return np.where(slot < self.count[:, None], index, -1)


@dataclass(frozen=True, eq=False)
class PartedAxis(AxisTiles):
    """An axis cut in `parts` contiguous parts whose lengths differ by at most one, and those in tiles.

    Every part has equally many tiles, and its tokens are spread evenly over them: none is empty unless tiles of
    one token cut parts of unequal length.
    """

    parts: int = 1

    @property
    def tiles_per_part(self) -> int:
        """Tiles of each part."""
        longest = -(-self.length // self.parts)
        return -(-longest // self.size)

    @cached_property
    def group_start(self) -> Ints:
        """First tile of each part, and the number of tiles last: [parts + 1]."""
        return np.arange(self.parts + 1) * self.tiles_per_part

    @cached_property
    def _bounds(self) -> Ints:
        return np.arange(self.parts + 1) * self.length // self.parts

    @cached_property
    def first(self) -> Ints:
        """Position in its part of each tile's first token: [tiles]."""
        slot = np.arange(self.tiles) % self.tiles_per_part
        return slot * np.diff(self._bounds)[self.group] // self.tiles_per_part

    @cached_property
    def count(self) -> Ints:
        """Tokens of each tile: [tiles]."""
        begin = self._bounds[self.group] + self.first
        return np.diff(np.append(begin, self.length))

    @cached_property
    def tokens(self) -> Ints:
        """Axis index of each slot, -1 where a short tile has none: [tiles, size]."""
        slot = np.arange(self.size)
        index = (self._bounds[self.group] + self.first)[:, None] + slot
        return np.where(slot < self.count[:, None], index, -1)


class Tiling:
    """A layout cut in tiles: prefix runs, then row-major boxes of the grid, suffix runs, extra runs.

    Every tile has `capacity` slots; a box keeps its slots in row-major order also where it is short.

    Attributes:
        layout: The tokens that are cut.
        shape: Slots of a box per axis; a run of dense tokens has prod(shape) slots.
        step: Distance of neighbouring tokens in a box per axis (the dilation).
        extra: Key-only tokens behind the suffix (pooled keys), cut in runs.
        parts: Contiguous parts of the grid per axis whose borders no box crosses.
    """

    def __init__(
        self,
        layout: Layout,
        shape: tuple[int, ...],
        step: tuple[int, ...] | None = None,
        extra: int = 0,
        parts: tuple[int, ...] | None = None,
    ) -> None:
        if len(shape) != layout.dims or min(shape) < 1:
            raise ValueError(f"tile {shape} does not fit grid {layout.grid}: pass {layout.dims} sizes of at least 1")
        self.layout, self.shape, self.extra = layout, tuple(shape), extra
        self.step = step or (1,) * layout.dims
        self.capacity = math.prod(shape)
        self.parts = parts or (1,) * layout.dims
        assert all(d == 1 or p == 1 for d, p in zip(self.step, self.parts, strict=True)), "parts are not dilated"
        self.axes = tuple(
            AxisTiles(n, size, step) if parts == 1 else PartedAxis(n, size, step, parts)
            for n, size, step, parts in zip(layout.grid, self.shape, self.step, self.parts, strict=True)
        )

    @cached_property
    def grid_shape(self) -> tuple[int, ...]:
        """Tiles of the grid per axis."""
        return tuple(axis.tiles for axis in self.axes)

    @cached_property
    def runs(self) -> tuple[int, int, int, int]:
        """Number of tiles in prefix, grid, suffix and extra."""
        dense = [-(-n // self.capacity) for n in (self.layout.prefix, self.layout.suffix, self.extra)]
        return dense[0], math.prod(self.grid_shape), dense[1], dense[2]

    @property
    def tiles(self) -> int:
        """Number of all tiles."""
        return sum(self.runs)

    @property
    def grid_tiles(self) -> slice:
        """Which tiles belong to the grid."""
        return slice(self.runs[0], self.runs[0] + self.runs[1])

    @property
    def length(self) -> int:
        """Number of all tokens, extra ones included."""
        return self.layout.length + self.extra

    @cached_property
    def tokens(self) -> Ints:
        """Sequence index of each slot, -1 where a short tile has none: [tiles, capacity]."""
        layout = self.layout
        suffix_start = layout.prefix + layout.tokens
        return np.concatenate(
            [
                self._run(0, layout.prefix),
                self._boxes() + np.int64(0),
                self._run(suffix_start, layout.suffix),
                self._run(layout.length, self.extra),
            ]
        )

    @cached_property
    def sizes(self) -> Ints:
        """Tokens of each tile: [tiles]."""
        return (self.tokens >= 0).sum(1)

    def _run(self, start: int, count: int) -> Ints:
        tiles = -(-count // self.capacity)
        index = np.arange(tiles * self.capacity).reshape(tiles, self.capacity)
        return np.where(index < count, start + index, -1)

    def _boxes(self) -> Ints:
        """Sequence index of the grid's slots: [grid tiles, capacity]."""
        dims = self.layout.dims
        index, empty = np.zeros((1,) * 2 * dims, np.int64), np.zeros((1,) * 2 * dims, bool)
        for i, axis in enumerate(self.axes):
            view = [1] * 2 * dims
            view[i], view[dims + i] = axis.tokens.shape
            token = axis.tokens.reshape(view)
            index, empty = index * axis.length + token, empty | (token < 0)
        boxes = np.where(empty, -1, index + self.layout.prefix)
        return boxes.reshape(self.runs[1], self.capacity)


def box_shape(grid: tuple[int, ...], volume: int) -> tuple[int, ...]:
    """A cube-like box of `volume` tokens (a power of two) that wastes no slot on short axes.

    Sides are powers of two; an axis never gets more slots than the next power of two of its length.
    """
    sides = [1] * len(grid)
    for _ in range(volume.bit_length() - 1):
        room = [i for i, (side, n) in enumerate(zip(sides, grid, strict=True)) if side < n]
        # Ties go to the last axis: its tokens are neighbours in memory.
        axis = min(room, key=lambda i: (sides[i], -i)) if room else len(grid) - 1
        sides[axis] *= 2
    return tuple(sides)
