"""Which key slots a query slot sees, as FlexAttention asks: intervals per axis where a pattern is that, else tables."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from visattn.layout import Layout
from visattn.patterns import Pattern
from visattn.patterns.geometry import Bools
from visattn.patterns.kinds import SpannedPattern
from visattn.plans import TilePlan
from visattn.tiling import Ints, Tiling


@dataclass(frozen=True, eq=False)
class Listed:
    """Any mask, looked up.

    Attributes:
        pair: Mask of each pair of tiles: [query tiles, key tiles]; 0 sees nothing, 1 everything.
        masks: The plan's masks behind those two, in a power-of-two number: [masks, query slots, key slots].
    """

    pair: torch.Tensor
    masks: torch.Tensor

    @property
    def tensors(self) -> list[torch.Tensor | None]:
        """What compiled code reads."""
        return [self.pair, self.masks]

    def __call__(self, i: torch.Tensor, j: torch.Tensor) -> torch.Tensor:
        """Whether query slots see key slots."""
        rows, columns = self.masks.shape[1:]
        return self.masks[self.pair[i // rows, j // columns], i % rows, j % columns]


@dataclass(frozen=True, eq=False)
class Intervals:
    """A product of one interval per axis, compared.

    Dense queries have intervals around everything, dense keys a flag, slots without a token lie outside of all.

    Attributes:
        start: First visible place of each query slot: int32 [axes, query slots].
        stop: One past the last: int32 [axes, query slots].
        place: Of each key slot, those of a dilation group side by side: int32 [axes, key slots].
        dense: Which key slots every query sees: [key slots], None if there is none.
    """

    start: torch.Tensor
    stop: torch.Tensor
    place: torch.Tensor
    dense: torch.Tensor | None

    @property
    def tensors(self) -> list[torch.Tensor | None]:
        """What compiled code reads."""
        return [self.start, self.stop, self.place, self.dense]

    def __call__(self, i: torch.Tensor, j: torch.Tensor) -> torch.Tensor:
        """Whether query slots see key slots."""
        seen = (self.place[0, j] >= self.start[0, i]) & (self.place[0, j] < self.stop[0, i])
        for axis in range(1, len(self.place)):
            place = self.place[axis, j]
            seen = seen & (place >= self.start[axis, i]) & (place < self.stop[axis, i])
        return seen if self.dense is None else seen | self.dense[j]


Visible = Listed | Intervals


def is_product(pattern: Pattern) -> bool:
    """Whether the mask of a pattern is one interval per axis and nothing else."""
    return isinstance(pattern, SpannedPattern) and type(pattern).grid_mask is SpannedPattern.grid_mask


def _in_one_part(pattern: SpannedPattern, layout: Layout) -> bool:
    """Whether the interval of every query is in one part: windows that wrap around are in two."""
    return all(
        not axis.circular or bool((axis.start >= 0).all() and (axis.stop <= axis.key_length).all())
        for axis in pattern.spans(*layout.grids)
    )


def visible(pattern: Pattern, tiles: TilePlan, device: torch.device) -> Visible:
    """The masks of a plan in their cheapest form."""
    if isinstance(pattern, SpannedPattern) and is_product(pattern) and _in_one_part(pattern, tiles.layout):
        return _intervals(pattern, tiles, device)
    return _listed(tiles, device)


def _listed(tiles: TilePlan, device: torch.device) -> Listed:
    queries, keys, lists = tiles.queries, tiles.keys, tiles.lists
    pair = np.zeros((queries.tiles, keys.tiles), np.int32)
    pair[lists.rows, lists.tile] = lists.mask + 2
    masks = np.zeros((_next_power_of_two(len(tiles.masks) + 2), queries.capacity, keys.capacity), bool)
    masks[1] = True
    masks[2 : 2 + len(tiles.masks)] = tiles.masks
    return Listed(torch.from_numpy(pair).to(device), torch.from_numpy(masks).to(device))


def _intervals(pattern: SpannedPattern, tiles: TilePlan, device: torch.device) -> Intervals:
    layout = tiles.layout
    (rows, dense_rows, empty_rows), (columns, dense, empty) = (
        _coordinates(tiling, side) for tiling, side in ((tiles.queries, layout), (tiles.keys, layout.keys))
    )
    starts, stops, places = [], [], []
    far = np.iinfo(np.int32).max
    for axis, span in enumerate(pattern.spans(*layout.grids)):
        query, key = rows[axis], columns[axis]
        # Places of one dilation group are apart from those of all others.
        start, stop = (query % span.step * span.length + edge[query] for edge in (span.start, span.stop))
        starts.append(np.where(dense_rows, -1, np.where(empty_rows, 0, start)))
        stops.append(np.where(dense_rows, far, np.where(empty_rows, 0, stop)))
        places.append(np.where(empty | dense, -2, key % span.step * span.length + key // span.step))
    start, stop, place = (
        torch.from_numpy(np.stack(each).astype(np.int32)).to(device) for each in (starts, stops, places)
    )
    every = torch.from_numpy(dense).to(device) if dense.any() else None
    return Intervals(start, stop, place, every)


def _coordinates(tiling: Tiling, layout: Layout) -> tuple[tuple[Ints, ...], Bools, Bools]:
    """Grid coordinates of each slot's token on each axis, which slots are of dense tokens, and which are empty."""
    at = tiling.tokens.ravel() - layout.prefix
    empty = tiling.tokens.ravel() < 0
    outside = (at < 0) | (at >= layout.tokens)
    return np.unravel_index(np.clip(at, 0, layout.tokens - 1), layout.grid), outside & ~empty, empty


def _next_power_of_two(n: int) -> int:
    return 1 << (n - 1).bit_length()
