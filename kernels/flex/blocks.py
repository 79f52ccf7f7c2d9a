"""A tile plan in FlexAttention's terms: BlockMask, mask and score functions over tile slots."""

from __future__ import annotations

import copy
import math
import types
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from visattn.keep import kept
from visattn.kernels.flex.visible import Visible, visible
from visattn.layout import Layout
from visattn.patterns import BiasedPattern, ListedPattern, Pattern
from visattn.plans import TileLists, TilePlan, plan
from visattn.tiling import Tiling

Mod = Callable[..., torch.Tensor]


@dataclass(frozen=True, eq=False)
class Slots:
    """The tokens of one side in tile order.

    Attributes:
        token: Token of each slot, 0 where a short tile has none: [slots].
        empty: Whether a slot has no token [slots], None if all have.
    """

    token: torch.Tensor
    empty: torch.Tensor | None

    @classmethod
    def of(cls, tiling: Tiling, device: torch.device) -> Slots:
        """Slots of a tiling on a device."""
        token = torch.from_numpy(tiling.tokens.ravel()).to(device)
        return cls(token.clamp(min=0), token < 0 if tiling.tokens.min() < 0 else None)

    def gather(self, tensor: torch.Tensor) -> torch.Tensor:
        """Rows [B, S, ...] in tile order [B, slots, ...], zero (False) in empty slots."""
        rows = tensor.index_select(1, self.token)
        if self.empty is None:
            return rows
        return rows.masked_fill(self.empty.view(1, -1, *(1,) * (rows.ndim - 2)), 0)


@dataclass(frozen=True, eq=False)
class Blocks:
    """Everything about a plan that FlexAttention needs, on one device.

    Attributes:
        queries: Query tokens in tile order.
        keys: Key tokens in tile order.
        slot_of_token: Query slot of each token: [S].
        visible: Which slots see which, in partial blocks.
        sparse: Full and partial blocks apart.
        all_partial: The same blocks, each of which runs the mask function.
    """

    queries: Slots
    keys: Slots
    slot_of_token: torch.Tensor
    visible: Visible
    sparse: BlockMask
    all_partial: BlockMask

    def masked(self, key_mask: torch.Tensor | None) -> BlockMask:
        """The BlockMask of a call; `key_mask` is bool [B, key slots]."""
        block_mask = copy.copy(self.sparse if key_mask is None else self.all_partial)
        block_mask.mask_mod = mask_mod(self.visible, key_mask)
        return block_mask


def tile_plan(pattern: Pattern, layout: Layout, volume: int) -> TilePlan:
    """The plan with tiles of `volume` slots, or the next multiple where the pattern insists on tiles of its own."""
    assert isinstance(pattern, ListedPattern)
    boxes = [pattern.tile(pattern.tiled_layout(side).grid, volume) for side in (layout.queries, layout.keys)]
    # The CUDA kernel's own blocks must divide a tile.
    query, key = ((*box[:-1], box[-1] * math.lcm(math.prod(box), volume) // math.prod(box)) for box in boxes)
    return plan(pattern, layout, tile=(query, key))


@kept
def blocks(pattern: Pattern, layout: Layout, volume: int, device: torch.device) -> Blocks:
    """Build a plan's blocks straight from its lists; nothing of the size S x S exists."""
    tiles = tile_plan(pattern, layout, volume)
    queries, keys, lists = tiles.queries, tiles.keys, tiles.lists
    slot_of_token = np.empty(queries.length, np.int64)
    slots = queries.tokens.ravel()
    slot_of_token[slots[slots >= 0]] = np.flatnonzero(slots >= 0)
    partial, full = (_ordered(lists.where(partial=p), keys.tiles) for p in (True, False))
    every = _ordered(lists, keys.tiles)
    size = (queries.capacity, keys.capacity)
    lengths = (queries.tiles * queries.capacity, keys.tiles * keys.capacity)
    return Blocks(
        Slots.of(queries, device),
        Slots.of(keys, device),
        torch.from_numpy(slot_of_token).to(device),
        visible(pattern, tiles, device),
        BlockMask.from_kv_blocks(partial[0], partial[1], full[0], full[1], size, seq_lengths=lengths).to(device),
        BlockMask.from_kv_blocks(every[0], every[1], BLOCK_SIZE=size, seq_lengths=lengths).to(device),
    )


def _ordered(lists: TileLists, columns: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Numbers of blocks [1, 1, rows] and their indices [1, 1, rows, columns], as BlockMask wants them."""
    counts, start = lists.counts, lists.start[:-1]
    index = np.zeros((len(counts), columns), np.int32)
    index[lists.rows, np.arange(len(lists.tile)) - np.repeat(start, counts)] = lists.tile
    number = torch.from_numpy(counts.astype(np.int32))
    return number[None, None], torch.from_numpy(index)[None, None]


def mask_mod(visible: Visible, key_mask: torch.Tensor | None) -> Mod:
    """Visibility of key slot j to query slot i, with the samples' key masks."""
    if key_mask is None:
        return lambda b, h, i, j: visible(i, j)
    return lambda b, h, i, j: visible(i, j) & key_mask[b, j]


def score_mod(found: Blocks, pattern: Pattern, layout: Layout, rpb: torch.Tensor) -> Mod:
    """Adds the relative position bias `rpb` [H, 2 * window - 1 per axis] to the logits of grid tokens."""
    sides = rpb.shape[1:]
    query_at = positions(found.queries, pattern, layout)
    key_at = positions(found.keys, pattern, layout)
    # Behind the last bias stands a zero for pairs with a dense token; masked pairs may land anywhere.
    table = torch.cat([rpb.flatten(1), rpb.new_zeros(rpb.shape[0], 1)], dim=1)
    nothing = table.shape[1] - 1

    def biased(s: torch.Tensor, b: torch.Tensor, h: torch.Tensor, i: torch.Tensor, j: torch.Tensor) -> torch.Tensor:
        index = i * 0
        for axis, side in enumerate(sides):
            offset = key_at[axis, j] - query_at[axis, i] + side // 2
            index = index * side + torch.clamp(offset, 0, side - 1)
        dense = (query_at[0, i] < 0) | (key_at[0, j] < 0)
        return s + table[h, torch.where(dense, nothing, index)]

    return biased


def positions(slots: Slots, pattern: Pattern, layout: Layout) -> torch.Tensor:
    """Position in its dilation group of each slot's token, -1 for dense tokens: int32 [axes, slots]."""
    assert isinstance(pattern, BiasedPattern)
    inner = slots.token - layout.prefix
    rest = inner.clamp(0, layout.tokens - 1)
    found = []
    for length, step in zip(reversed(layout.grid), reversed(pattern.step(layout.grid)), strict=True):
        found.append(rest % length // step)
        rest = rest // length
    at = torch.stack(found[::-1]).int()
    return at.masked_fill((inner < 0) | (inner >= layout.tokens), -1)


@lru_cache(maxsize=256)
def compiled(signature: tuple[Any, ...]) -> Callable[..., Any]:
    """FlexAttention compiled for one signature of the call: whatever may make the compiler specialise.

    Dynamo counts recompilations per code object and then gives up, so each signature gets a code object of its own.
    """
    code = flex_attention.__code__.replace(co_name=f"flex_attention_{abs(hash(signature))}")
    own = types.FunctionType(
        code, flex_attention.__globals__, code.co_name, flex_attention.__defaults__, flex_attention.__closure__
    )
    own.__kwdefaults__ = flex_attention.__kwdefaults__
    return torch.compile(own, dynamic=False, fullgraph=True)
