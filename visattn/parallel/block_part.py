"""Parts of radial attention, whose truth is a mask of blocks of the flat sequence."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from visattn.layout import Layout
from visattn.parallel.parts import Part, Rows
from visattn.patterns.geometry import Bools, TilePairs
from visattn.patterns.radial import Radial
from visattn.tiling import Ints, Tiling


@dataclass(frozen=True)
class BlockPart(Part):
    """A part of radial attention in some frames and some others; a query without any key visits one that is hidden.

    Attributes:
        whole: The pattern.
        rows: Which frames.
        dense_pairs: Whether dense tokens see each other here.
    """

    whole: Radial
    rows: Rows
    dense_pairs: bool = True

    name: ClassVar[str] = "part"

    def tiled_layout(self, layout: Layout) -> Layout:
        """The flat sequence."""
        return self.whole.tiled_layout(layout)

    def tile(self, grid: tuple[int, ...], volume: int = 64) -> tuple[int, ...]:
        """The block."""
        return self.whole.tile(grid, volume)

    def _block(self, first_row: int, rows: int) -> Ints:
        """Block of each token of some frames."""
        tokens = math.prod(self.rows.grid[1:])
        return (first_row * tokens + np.arange(rows * tokens)) // self.whole.block

    def _sides(self) -> tuple[Ints, Ints]:
        """Block of each query and of each key."""
        rows = self.rows
        return self._block(rows.first_query, rows.queries), self._block(rows.first_key, rows.keys)

    def grid_mask(self, grid: tuple[int, ...], keys: tuple[int, ...] | None = None) -> Bools:
        """The blocks, token by token."""
        query, key = self._sides()
        return self.whole.blocks(self.rows.grid)[query[:, None], key]

    def tile_pairs(self, grid: tuple[int, ...], queries: Tiling, keys: Tiling) -> TilePairs:
        """Pairs of tiles that touch a kept block."""
        blocks = self.whole.blocks(self.rows.grid)
        rows, columns = (_Cut.of(b, t) for b, t in zip(self._sides(), (queries, keys), strict=True))
        some = np.zeros((len(rows.blocks), len(columns.blocks)), bool)
        for i in range(rows.blocks.shape[1]):
            for j in range(columns.blocks.shape[1]):
                some |= blocks[rows.blocks[:, i, None], columns.blocks[None, :, j]]
        some[~some.any(1), 0] = True
        query, key = np.nonzero(some)
        seen = blocks[rows.blocks[query][:, :, None], columns.blocks[key][:, None, :]]
        short = keys.sizes[keys.grid_tiles][key] < keys.capacity
        partial = np.flatnonzero(~seen.all((1, 2)) | short)
        kinds = np.column_stack(
            [
                seen[partial].reshape(len(partial), math.prod(seen.shape[1:])),
                rows.kind[query[partial]],
                columns.kind[key[partial]],
            ]
        )
        kinds, index = np.unique(kinds, axis=0, return_inverse=True)
        mask = np.full(len(query), -1)
        mask[partial] = index.ravel()
        each = kinds[:, :-2].astype(bool).reshape(len(kinds), *seen.shape[1:])
        of_row, of_column = rows.places[kinds[:, -2]], columns.places[kinds[:, -1]]
        number = np.arange(len(kinds))[:, None, None]
        masks = each[number, np.maximum(of_row, 0)[:, :, None], np.maximum(of_column, 0)[:, None, :]]
        masks = masks & (of_column >= 0)[:, None, :]
        sizes = (np.bincount(b, minlength=len(blocks)) for b in self._sides())
        return TilePairs(query, key, mask, masks, int(next(sizes) @ blocks @ next(sizes)))


@dataclass(frozen=True, eq=False)
class _Cut:
    """Tiles of tokens that are in blocks.

    Attributes:
        blocks: The blocks that a tile touches, the last one repeated: [tiles, most].
        kind: What a tile looks like: [tiles].
        places: Which of its blocks each slot of a kind is in, -1 for an empty one: [kinds, slots].
    """

    blocks: Ints
    kind: Ints
    places: Ints

    @classmethod
    def of(cls, block: Ints, tiling: Tiling) -> _Cut:
        """The grid tiles of a tiling whose tokens are in these blocks."""
        tokens = tiling.tokens[tiling.grid_tiles]
        at = np.where(tokens >= 0, block[np.maximum(tokens - tiling.layout.prefix, 0)], -1)
        first, last = at[:, 0], at.max(1)
        most = int((last - first).max()) + 1
        blocks = np.minimum(first[:, None] + np.arange(most), last[:, None])
        places, kind = np.unique(np.where(at >= 0, at - first[:, None], -1), axis=0, return_inverse=True)
        return cls(blocks, kind.ravel(), places)
