"""The blocks that a choice is made of, on both sides, and how the tiles of a plan lie in them."""

from __future__ import annotations

import math
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch

from visattn.given import counted
from visattn.keep import kept
from visattn.layout import Layout
from visattn.patterns.kinds import Tiled
from visattn.patterns.routes import Routes
from visattn.patterns.values import PerAxis, as_text, per_axis, whole_numbers
from visattn.tiling import Ints, Tiling, box_shape

# Tokens of a block where the pattern does not say.
VOLUME = 64
Box = tuple[int, ...]


class Blocks(NamedTuple):
    """A grid cut in blocks.

    Attributes:
        grid: Tokens per axis of what is cut: the layout's, or all tokens in one axis.
        queries: Sides of a block of queries.
        keys: Sides of a block of keys.
        causal: Whether a query sees no key after itself, per axis of `grid`.
    """

    grid: Box
    queries: Box
    keys: Box
    causal: tuple[bool, ...]

    @classmethod
    def of(
        cls,
        grid: Box,
        block: PerAxis | None,
        key_block: PerAxis | None,
        causal: bool | tuple[bool, ...] = False,
    ) -> Blocks:
        """The blocks of a grid: boxes for a value per axis, runs of the flat sequence for a number.

        Without a block they are boxes, of one token along causal axes.

        Raises:
            ValueError: If a box has another number of axes than the grid, only one of the two is a box, or runs of the
                flat sequence are causal along some axes.
        """
        if block is None:
            flags = per_axis(causal, len(grid), "causal")
            box = box_shape(
                tuple(1 if flag and len(grid) > 1 else n for n, flag in zip(grid, flags, strict=True)), VOLUME
            )
            return cls(grid, box, box, flags)
        key_block = block if key_block is None else key_block
        if isinstance(block, tuple) != isinstance(key_block, tuple):
            raise ValueError(
                f"block={as_text(block)} and key_block={as_text(key_block)} must both be boxes like 4x4x4 or both be "
                "numbers of tokens"
            )
        if not isinstance(block, tuple):
            assert not isinstance(key_block, tuple)
            if isinstance(causal, tuple) and len(causal) > 1:
                raise ValueError(
                    f"causal={as_text(causal)} is for axes of the grid and block={as_text(block)} is a run of the flat "
                    "sequence: give causal=true, or a box of one token along the causal axes like block=1x8x8"
                )
            grid, block, key_block = (math.prod(grid),), (block,), (key_block,)
        assert isinstance(key_block, tuple)
        for name, box in (("block", block), ("key_block", key_block)):
            if len(box) != len(grid):
                raise ValueError(
                    f"{name}={as_text(box)} has {counted(len(box), 'side')} but the grid {grid} has "
                    f"{counted(len(grid), 'axis', 'axes')}: give {counted(len(grid), 'side')}, or one number of tokens "
                    "for runs of the flat sequence"
                )
        return cls(grid, block, key_block, per_axis(causal, len(grid), "causal"))

    @property
    def in_order(self) -> bool:
        """Whether the tokens are a causal line, so that a block sees a part of the blocks that it begins or ends in."""
        return self.causal == (True,)

    @property
    def sides(self) -> tuple[tuple[Box, Box], tuple[Box, Box]]:
        """Grid and sides of a block, of queries and of keys."""
        return (self.grid, self.queries), (self.grid, self.keys)

    @property
    def query_shape(self) -> Box:
        """Blocks of queries per axis."""
        return tuple(-(-n // side) for n, side in zip(self.grid, self.queries, strict=True))

    @property
    def key_shape(self) -> Box:
        """Blocks of keys per axis."""
        return tuple(-(-n // side) for n, side in zip(self.grid, self.keys, strict=True))

    @property
    def rows(self) -> int:
        """Blocks of queries."""
        return math.prod(self.query_shape)

    @property
    def columns(self) -> int:
        """Blocks of keys."""
        return math.prod(self.key_shape)


@lru_cache(maxsize=256)
def blocks_of(
    grid: Box, block: PerAxis | None, key_block: PerAxis | None, causal: bool | tuple[bool, ...] = False
) -> Blocks:
    """`Blocks.of`, which every call of attention asks for several times."""
    return Blocks.of(grid, block, key_block, causal)


def within(grid: Box, box: Box) -> Box:
    """The sides of a block that hold tokens: those behind the end of the grid's axes are never made."""
    return tuple(min(side, n) for side, n in zip(box, grid, strict=True))


def slot_places(grid: Box, box: Box) -> Ints:
    """Place in the whole block, in row-major order, of each slot `within` the grid: ascending [slots]."""
    place = np.zeros(1, np.int64)
    for n, side in zip(grid, box, strict=True):
        place = (place[:, None] * side + np.arange(min(side, n))).ravel()
    return place


def block_sizes(value: object, name: str) -> PerAxis | None:
    """Check a parameter that is a box of at least one token per axis, a number of tokens, or None."""
    return None if value is None else whole_numbers(value, name, 1)


def fitting(box: Box, grid: Box, volume: int) -> Box:
    """A box of at most `volume` tokens that divides a block, or the block itself where it is that small.

    The sides that are cut first are the longest, so that what is left is cube-like.
    """
    sides = [min(side, n) if n < side else side for side, n in zip(box, grid, strict=True)]
    while math.prod(sides) > volume and max(sides) > 1:
        axis = max(range(len(sides)), key=lambda i: sides[i])
        sides[axis] = max(d for d in range(1, sides[axis]) if sides[axis] % d == 0)
    return tuple(sides)


def divides(tile: Box, box: Box, grid: Box) -> bool:
    """Whether no tile of a tiling crosses the border of a block; one that is as long as the axis has none."""
    return all(side % own == 0 or side >= n for own, side, n in zip(tile, box, grid, strict=True))


def block_of(tiling: Tiling, box: Box) -> Ints:
    """The block of each grid tile: [grid tiles]."""
    index = np.zeros(1, np.int64)
    for n, side, own, tiles in zip(tiling.layout.grid, box, tiling.shape, tiling.grid_shape, strict=True):
        index = (index[:, None] * -(-n // side) + np.arange(tiles) * own // side).ravel()
    return index


class Tables(NamedTuple):
    """How a plan's grid tiles lie in blocks.

    Attributes:
        rows: Block of each grid query tile: [tiles], None where tiles are blocks.
        tiles: Key tiles of each block, some tile behind the last: [blocks, m].
        inside: Which of those are of the block: bool [blocks, m], None where all are.
    """

    rows: torch.Tensor | None
    tiles: torch.Tensor
    inside: torch.Tensor | None


@kept
def _tables(plan: Tiled, blocks: Blocks, device: torch.device) -> Tables:
    rows, columns = block_of(plan.queries, blocks.queries), block_of(plan.keys, blocks.keys)
    counts = np.bincount(columns, minlength=blocks.columns)
    order = np.argsort(columns, kind="stable") + plan.keys.grid_tiles.start
    first = np.cumsum(counts) - counts
    slot = np.arange(counts.max())
    inside = slot < counts[:, None]
    tiles = order[np.where(inside, first[:, None] + slot, first[:, None])]
    same = len(rows) == blocks.rows and bool((rows == np.arange(len(rows))).all())
    return Tables(
        None if same else torch.from_numpy(rows).to(device),
        torch.from_numpy(tiles).to(device),
        None if inside.all() else torch.from_numpy(inside).to(device),
    )


def block_of_rows(plan: Tiled, blocks: Blocks, device: torch.device) -> torch.Tensor | None:
    """Block of each grid query tile of a plan: [tiles], None where tiles are blocks."""
    return _tables(plan, blocks, device).rows


def spread(choice: Routes, plan: Tiled, blocks: Blocks) -> Routes:
    """Lists of blocks for blocks as lists of key tiles for the query tiles of a plan."""
    (tiles, counts), rows = tiles_of_blocks(choice, plan, blocks)[0], block_of_rows(plan, blocks, choice.tiles.device)
    if rows is not None:
        tiles, counts = tiles[:, :, rows], None if counts is None else counts[:, :, rows]
    return Routes(tiles, counts)


def tiles_of_blocks(
    choice: Routes, plan: Tiled, blocks: Blocks, words: torch.Tensor | None = None
) -> tuple[Routes, torch.Tensor]:
    """Lists of key blocks as lists of the key tiles of a plan, whoever has them.

    Args:
        choice: Key blocks [B, G, rows, n].
        plan: The plan.
        blocks: The blocks.
        words: Something that each entry has and its tiles get: [B, G, rows, n].

    Returns:
        The lists, and what their entries have; the tiles where nothing was given.
    """
    table = _tables(plan, blocks, choice.tiles.device)
    listed_blocks = choice.tiles.long()
    tiles, counts, each = table.tiles[listed_blocks], choice.counts, table.tiles.shape[1]
    words = tiles.flatten(3) if words is None else words.repeat_interleave(each, 3)
    if table.inside is None:
        return Routes(tiles.flatten(3), None if counts is None else counts * each), words
    here = table.inside[listed_blocks]
    listed = choice.listed()
    here = (here if listed is None else here & listed[..., None]).flatten(3)
    # What counts comes first, in the same order.
    order = (~here).to(torch.uint8).sort(dim=-1, stable=True).indices
    return Routes(tiles.flatten(3).gather(3, order), here.sum(-1)), words.gather(3, order)


@kept
def token_blocks(grid: Box, box: Box, device: torch.device) -> torch.Tensor:
    """Block of each token of a grid: [tokens]."""
    return torch.from_numpy(token_block_table(grid, box)).to(device)


def token_block_table(grid: Box, box: Box) -> Ints:
    """Block of each token of a grid: [tokens]."""
    index = np.zeros(1, np.int64)
    for n, side in zip(grid, box, strict=True):
        index = (index[:, None] * -(-n // side) + np.arange(n) // side).ravel()
    return index


@kept
def block_tokens(grid: Box, box: Box, device: torch.device) -> torch.Tensor:
    """Tokens of each block: int64 [blocks]."""
    return torch.from_numpy(np.bincount(token_block_table(grid, box))).to(device)


def inner(layout: Layout) -> slice:
    """The grid tokens of a sequence."""
    return slice(layout.prefix, layout.prefix + layout.tokens)
