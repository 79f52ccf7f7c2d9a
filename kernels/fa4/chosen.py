"""Blocks that a dynamic pattern chooses from q and k, as lists: written on the device without waiting for it."""

from __future__ import annotations

import math
from dataclasses import replace

import torch

from visattn.keep import kept
from visattn.kernels.fa4.blocks import Blocks, Lists, tile_plan
from visattn.kernels.fa4.words import COLUMNS
from visattn.layout import Layout
from visattn.operands import repeated
from visattn.patterns import DynamicPattern, Pattern
from visattn.patterns.routes import lists_of


def refusal(pattern: DynamicPattern, layout: Layout, rows: int) -> str:
    """Why what a pattern chooses is no list of whole blocks, empty if it is.

    Args:
        pattern: The pattern.
        layout: The tokens.
        rows: Slots of a query block of the kernels.
    """
    if type(pattern).route is not DynamicPattern.route or pattern.learnable:
        return f"{pattern.name} computes its lists from q and k by a router of its own"
    if pattern.skip or pattern.pools_rest:
        return "its kernels neither pass over listed blocks nor add pooled keys"
    blocks = pattern.blocks(layout.grid)
    if blocks.in_order:
        return "its blocks that are chosen are seen whole, and those of a causal line in part"
    if math.prod(blocks.queries) != rows or math.prod(blocks.keys) != COLUMNS:
        own = f"{math.prod(blocks.queries)} queries and {math.prod(blocks.keys)} keys"
        return f"its blocks are of {rows} queries and {COLUMNS} keys, and {pattern.name} chooses blocks of {own}"
    if any(n % side for grid, box in blocks.sides for n, side in zip(grid, box, strict=True)):
        return f"its blocks are whole, and those of {pattern.name} at the border of grid {blocks.grid} are short"
    return ""


def with_choice(
    made: Blocks, pattern: DynamicPattern, layout: Layout, q: torch.Tensor, k: torch.Tensor, scale: float, grad: bool
) -> Blocks:
    """The lists of a call, those of every sample and head.

    Args:
        made: What does not depend on q and k.
        pattern: The pattern.
        layout: The tokens.
        q: Queries [B, S, H, D] in the tokens' order.
        k: Keys [B, S, Hkv, D] likewise.
        scale: Factor on the logits.
        grad: Whether the lists of the backward are wanted.
    """
    tiles = tile_plan(pattern, layout, made.block_size[0])
    routes, heads = pattern.route(q, k, tiles, None, scale), q.shape[2]
    rows, columns = tiles.queries.grid_tiles, tiles.keys.grid_tiles
    places = _fixed(pattern, layout, made.block_size[0])
    forward = _joined(made.forward, rows, places[0], routes.tiles, routes.counts, heads)
    if not grad:
        return replace(made, forward=forward)
    seen = routes.mask(columns.start, tiles.keys.runs[1]).transpose(2, 3)
    turned = lists_of(seen, tiles.queries.runs[1])
    backward = _joined(made.backward, columns, places[1], turned.tiles + rows.start, turned.counts, heads)
    return replace(made, forward=forward, backward=backward)


@kept
def _fixed(pattern: Pattern, layout: Layout, rows: int) -> tuple[int, int]:
    """Full blocks of dense tokens that every query block of the grid lists, and every key block of the grid."""
    assert isinstance(pattern, DynamicPattern)
    tiles = tile_plan(pattern, layout, rows)
    found = []
    for lists, side in ((tiles.lists, tiles.queries), (tiles.transposed, tiles.keys)):
        counts = lists.where(partial=False).counts[side.grid_tiles]
        assert (counts == counts[0]).all(), "dense tokens see and are seen by all blocks of the grid"
        found.append(int(counts[0]))
    return found[0], found[1]


def _joined(
    fixed: Lists, rows: slice, first: int, tiles: torch.Tensor, counts: torch.Tensor | None, heads: int
) -> Lists:
    """Put chosen blocks [B, G, grid rows, n] behind the full ones that rows of the grid have, for each head."""
    samples, _, _, number = tiles.shape
    index, count = fixed.full_block_idx, fixed.full_block_cnt.expand(samples, heads, -1).clone()
    width = max(index.shape[3], first + number)
    joined = index.new_zeros(samples, heads, index.shape[2], width)
    joined[..., : index.shape[3]] = index
    joined[:, :, rows, first : first + number] = repeated(tiles, heads, 1).to(torch.int32)
    own = number if counts is None else repeated(counts, heads, 1).to(torch.int32)
    count[:, :, rows] = first + own
    return fixed._replace(full_block_cnt=count, full_block_idx=joined)
