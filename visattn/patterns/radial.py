"""Radial attention: the further apart two frames of a video, the fewer of their tokens see each other."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from visattn.layout import Layout
from visattn.patterns.geometry import Bools, TilePairs
from visattn.patterns.kinds import StaticPattern
from visattn.patterns.radial_blocks import block_mask
from visattn.patterns.values import flag, is_number, real_number, whole_number
from visattn.tiling import Ints, Tiling, box_shape


@dataclass(frozen=True)
class Radial(StaticPattern):
    """Tokens see a window around their own place in other frames, narrower by half as the distance doubles.

    Source: Li et al., "Radial Attention: O(n log n) Sparse Attention with Energy Decay for Long Video
    Generation" (2025), section 4.2, and the released code, which turns the token rule into blocks of the flat
    sequence. The truth of this pattern is that block mask. It equals the original's where tokens per frame are a
    multiple of the block or exceed one by a divisor of it. Elsewhere the original loses the end of frames (it
    allots each frame ceil(tokens / block) blocks from wherever it starts), and frames shorter than a third of a
    block altogether: here no block that the original keeps is dropped and none is lost, see
    `radial_blocks.block_mask`. Text is not part of the blocks: give it as prefix or suffix of the layout, which
    every token sees.

    The grid is (frames, height, width) or (frames, tokens).

    Attributes:
        decay: Factor on the width of the window, above 0.
        sink: Whether every query sees the first frame (the original does so for Wan, not for HunyuanVideo).
        block: Tokens of a block of the flat sequence.

    Raises:
        ValueError: If a parameter is out of range, or the grid has no frames.
    """

    decay: float = 1.0
    sink: bool = True
    block: int = 128

    name: ClassVar[str] = "radial"

    def __post_init__(self) -> None:
        decay = self.decay
        if not is_number(decay) or decay <= 0:
            raise ValueError(f"decay={decay!r} must be a number above 0: the window's width relative to the original")
        object.__setattr__(self, "decay", real_number(decay))
        object.__setattr__(self, "sink", flag(self.sink, "sink"))
        object.__setattr__(self, "block", whole_number(self.block, "block", 1, "blocks are cut from the flat sequence"))

    def check(self, grid: tuple[int, ...]) -> None:
        """Raise a ValueError if the grid has no frame axis."""
        if len(grid) < 2:
            raise ValueError(
                f"{self} needs frames but grid {grid} has one axis: pass a grid (frames, height, width) "
                "or (frames, tokens)"
            )

    def blocks(self, grid: tuple[int, ...]) -> Bools:
        """Which key blocks each query block of the flat grid sees: [blocks, blocks]."""
        self.check(grid)
        return block_mask(grid[0], math.prod(grid[1:]), self.decay, self.sink, self.block)

    def covers(self, grid: tuple[int, ...]) -> bool:
        """Whether every block is kept."""
        return bool(self.blocks(grid).all())

    def tiled_layout(self, layout: Layout) -> Layout:
        """The flat sequence."""
        return Layout(layout.tokens, layout.prefix, layout.suffix)

    def tile(self, grid: tuple[int, ...], volume: int = 64) -> tuple[int, ...]:
        """The block, so that no visited pair of tiles is partly visible; anything where one block holds all tokens."""
        tokens = math.prod(grid)
        return (self.block,) if self.block < tokens else box_shape((tokens,), min(volume, 2 ** tokens.bit_length()))

    def grid_mask(self, grid: tuple[int, ...]) -> Bools:
        """The blocks, token by token."""
        block = np.arange(math.prod(grid)) // self.block
        return self.blocks(grid)[block[:, None], block]

    def tile_pairs(self, grid: tuple[int, ...], queries: Tiling, keys: Tiling) -> TilePairs:
        """Pairs of tiles that touch a kept block; all full where tiles divide blocks."""
        blocks = self.blocks(grid)
        unit = math.gcd(queries.capacity, keys.capacity, self.block)
        rows, columns = (self._units(tiling, unit) for tiling in (queries, keys))
        some = _any(_any(blocks, rows, 0), columns, 1)
        query, key = np.nonzero(some)
        seen = blocks[rows[query][:, :, None], columns[key][:, None, :]]
        short = keys.sizes[keys.grid_tiles][key]
        partial = np.flatnonzero(~seen.all((1, 2)) | (short < keys.capacity))
        kinds = np.concatenate(
            [seen[partial].reshape(len(partial), math.prod(seen.shape[1:])), short[partial, None]], 1
        )
        kinds, index = np.unique(kinds, axis=0, return_inverse=True)
        mask = np.full(len(query), -1)
        mask[partial] = index.ravel()
        masks = kinds[:, :-1].astype(bool).reshape(len(kinds), rows.shape[1], columns.shape[1])
        masks = masks.repeat(unit, 1).repeat(unit, 2) & (np.arange(keys.capacity) < kinds[:, -1, None])[:, None]
        sizes = np.bincount(np.arange(math.prod(grid)) // self.block)
        return TilePairs(query, key, mask, masks, int(sizes @ blocks @ sizes))

    def _units(self, tiling: Tiling, unit: int) -> Ints:
        """Block of each unit of each grid tile; units behind the end count as the last block: [tiles, units]."""
        start = np.arange(tiling.runs[1] * (tiling.capacity // unit)) * unit
        block = np.minimum(start, tiling.layout.tokens - 1) // self.block
        return block.reshape(tiling.runs[1], -1)


def _any(blocks: Bools, units: Ints, axis: int) -> Bools:
    """Whether any of a tile's blocks is set along an axis."""
    out = np.take(blocks, units[:, 0], axis)
    for i in range(1, units.shape[1]):
        out = out | np.take(blocks, units[:, i], axis)
    return out
