"""Patterns that are one interval of keys per axis: the exact box of keys that a query tile sees."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property, reduce

import numpy as np
import torch

from visattn.kernels.tiles.groups import Group
from visattn.layout import Layout
from visattn.memory import check_room
from visattn.patterns.geometry import Bools, Spans
from visattn.tiling import AxisTiles, Ints


@dataclass(frozen=True, eq=False)
class AxisClass:
    """Tiles of one axis that look alike from their first token.

    Attributes:
        query: Axis index of the first query of each tile: [tiles].
        key: Axis index of the first key of each tile: [tiles].
        count: Queries of a tile.
        mask: Visibility: bool [count, keys].
        relative: Position of the first key minus that of the first query, in steps; 0 where they are on other grids.
        step: Distance of neighbouring tokens.
        ring: Keys of a circular axis, behind the last of which the first follows; 0 for one that ends. The first key
            may lie before the axis there.
    """

    query: Ints
    key: Ints
    count: int
    mask: Bools
    relative: int
    step: int
    ring: int = 0

    def keys(self) -> Ints:
        """Axis index of every key of each tile: [tiles, keys]."""
        keys = self.key[:, None] + self.step * np.arange(self.mask.shape[1])
        return keys % self.ring if self.ring else keys


@dataclass(frozen=True, eq=False)
class AxisKinds:
    """How the tiles of one axis look from their first token: numbers alone, as masks of long causal axes are many.

    Attributes:
        axis: The tiles.
        low: Position of the first key of each tile: [tiles].
        looks: Each kind's queries, keys, position of the first key, and edges of each query's keys:
            [kinds, 3 + 2 size].
        which: Kind of each tile: [tiles].
        ring: Keys of a circular axis, 0 for one that ends.
    """

    axis: AxisTiles
    low: Ints
    looks: Ints
    which: Ints
    ring: int

    @cached_property
    def tiles(self) -> Ints:
        """Tiles of each kind: [kinds]."""
        return np.bincount(self.which, minlength=len(self.looks))

    @property
    def queries(self) -> Ints:
        """Queries of a tile of each kind: [kinds]."""
        return self.looks[:, 0]

    @property
    def keys(self) -> Ints:
        """Keys of a tile of each kind: [kinds]."""
        return self.looks[:, 1]

    def classes(self) -> list[AxisClass]:
        """The kinds with their tiles and masks.

        Raises:
            ValueError: If this machine's memory cannot hold the masks.
        """
        check_room(
            int(self.queries @ self.keys),
            f"masks of {len(self.looks)} kinds of tiles",
            "choose another backend, or a window",
        )
        size, step, axis = (self.looks.shape[1] - 3) // 2, self.axis.step, self.axis
        of_kinds = np.split(np.argsort(self.which, kind="stable"), np.cumsum(self.tiles)[:-1])
        out = []
        for tile, (count, length, relative, *edges) in zip(of_kinds, self.looks.tolist(), strict=True):
            slot, first, last = np.arange(length), np.array(edges[:count]), np.array(edges[size : size + count])
            ahead = (slot - first[:, None]) % self.ring if self.ring else slot - first[:, None]
            mask = (ahead >= 0) & (ahead < (last - first)[:, None])
            query, key = (axis.group[tile] + step * edge[tile] for edge in (axis.first, self.low))
            out.append(AxisClass(query, key, count, mask, relative, step, self.ring * step))
        return out


def axis_kinds(spans: Spans, size: int) -> AxisKinds:
    """Cut one axis in tiles of `size` queries and sort them by what their window looks like."""
    axis = AxisTiles(spans.length, size, spans.step)
    valid = axis.tokens >= 0
    start, stop = spans.start[axis.tokens], spans.stop[axis.tokens]
    far = np.abs(spans.start).max(initial=0) + spans.key_length
    low = np.where(valid, start, far).min(1)
    high = np.where(valid, stop, -far).max(1)
    assert (high > low).all(), "a query tile without keys"
    ring = spans.key_length // spans.step if spans.circular else 0
    if ring:
        # Windows that together go around see every key once.
        high = np.minimum(high, low + ring)
    relative = low - axis.first if spans.length == spans.key_length else 0 * low
    edges = [np.where(valid, edge - low[:, None], 0) for edge in (start, stop)]
    look = np.column_stack([axis.count, high - low, relative, *edges])
    looks, which = np.unique(look, axis=0, return_inverse=True)
    return AxisKinds(axis, low, looks, which.ravel(), ring)


def box_groups(
    layout: Layout,
    axes: list[list[AxisClass]],
    windows: tuple[int, ...] | None,
    fixed: torch.Tensor | None,
    device: torch.device,
) -> Iterator[Group]:
    """The problems of a grid: one group for each combination of the axes' classes.

    Args:
        layout: The tokens.
        axes: Classes of each axis.
        windows: Window per axis for the relative position bias, or None.
        fixed: Dense and pooled key tokens, or None.
        device: Where the index tensors go.
    """
    for combination in itertools.product(*axes):
        yield _box_group(layout, combination, windows, fixed, device)


def _outer(parts: list[Ints], grid: tuple[int, ...]) -> Ints:
    """Row-major token index of every combination of one index per axis: [product of lengths]."""
    return _outer_rows([part[None] for part in parts], grid)[0]


def _outer_rows(parts: list[Ints], grid: tuple[int, ...]) -> Ints:
    """The same of every combination of a row per axis [rows, lengths]: [product of rows, product of lengths]."""
    strides = [math.prod(grid[i + 1 :]) for i in range(len(grid))]
    scaled = [part * stride for part, stride in zip(parts, strides, strict=True)]
    return reduce(lambda a, b: (a[:, None, :, None] + b[:, None]).reshape(len(a) * len(b), -1), scaled)


def _box_group(
    layout: Layout,
    classes: tuple[AxisClass, ...],
    windows: tuple[int, ...] | None,
    fixed: torch.Tensor | None,
    device: torch.device,
) -> Group:
    grid = layout.grid
    first_query = _outer([c.query for c in classes], grid) + layout.prefix
    queries = first_query[:, None] + _outer([c.step * np.arange(c.count) for c in classes], grid)
    mask = reduce(np.kron, [c.mask for c in classes])
    index = None
    if windows is not None:
        index = _rpb_index(classes, windows)
        index = np.where(mask, index, 0)
    if fixed is not None:
        pad = ((0, 0), (0, len(fixed)))
        mask = np.pad(mask, pad, constant_values=True)
        if index is not None:
            index = np.pad(index, pad, constant_values=math.prod(2 * w - 1 for w in windows or ()))
    own = _box_keys(layout.keys, classes, device)
    return Group(
        queries=torch.from_numpy(queries).to(device),
        base=own.get("base"),
        offsets=own.get("offsets"),
        key_tiles=own.get("key_tiles"),
        tile_tokens=own.get("tile_tokens"),
        fixed=fixed,
        shared=None if mask.all() else torch.from_numpy(mask).to(device),
        rpb_index=None if index is None else torch.from_numpy(index).to(device),
    )


def _box_keys(layout: Layout, classes: tuple[AxisClass, ...], device: torch.device) -> dict[str, torch.Tensor]:
    """The keys of a `Group`: boxes, or where some are in parts behind both ends of an axis one list for each tile."""
    grid = layout.grid
    if any(c.ring for c in classes):
        tokens = _outer_rows([c.keys() for c in classes], grid) + layout.prefix
        own = np.arange(len(tokens))[:, None]
        return {"key_tiles": torch.from_numpy(own).to(device), "tile_tokens": torch.from_numpy(tokens).to(device)}
    first = _outer([c.key for c in classes], grid) + layout.prefix
    offsets = _outer([c.step * np.arange(c.mask.shape[1]) for c in classes], grid)
    return {"base": torch.from_numpy(first[:, None]).to(device), "offsets": torch.from_numpy(offsets[None]).to(device)}


def _rpb_index(classes: tuple[AxisClass, ...], windows: tuple[int, ...]) -> Ints:
    """Row-major place in rpb of every pair: key position - query position + window - 1 per axis: [T, L]."""
    index = np.zeros((1, 1), np.int64)
    for c, window in zip(classes, windows, strict=True):
        place = c.relative + np.arange(c.mask.shape[1]) - np.arange(c.count)[:, None] + window - 1
        index = index[:, None, :, None] * (2 * window - 1) + place[None, :, None, :]
        index = index.reshape(index.shape[0] * c.count, -1)
    return index
