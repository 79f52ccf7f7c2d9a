"""A tile plan in FlashAttention-4's terms: the order of its slots, and lists of full and partial blocks both ways."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch

from visattn.keep import kept
from visattn.kernels.fa4.words import COLUMNS, Words, words_of
from visattn.kernels.triton.boxes import Box, best_boxes
from visattn.layout import Layout
from visattn.patterns import ListedPattern, Pattern, PerHead, SpannedPattern
from visattn.plans import TileLists, TilePlan, plan
from visattn.tiling import Ints, Tiling, box_shape

# The widest element that torch's kernels move.
WIDE = torch.complex128


class Order(NamedTuple):
    """The tokens of one side in tile order.

    Attributes:
        token: Token of each slot, that of another slot where a short tile has none: [slots]. None where tile order is
            the tokens' own.
        slot: Slot of each token: [tokens]; None there too.
    """

    token: torch.Tensor | None
    slot: torch.Tensor | None

    @classmethod
    def of(cls, tiling: Tiling, device: torch.device) -> Order:
        """The order of a tiling."""
        slots = tiling.tokens.ravel()
        if np.array_equal(slots, np.arange(tiling.length)):
            return cls(None, None)
        filled = np.flatnonzero(slots >= 0)
        slot = np.empty(tiling.length, np.int64)
        slot[slots[filled]] = filled
        return cls(torch.from_numpy(np.maximum(slots, 0)).to(device), torch.from_numpy(slot).to(device))

    def into(self, x: torch.Tensor) -> torch.Tensor:
        """Tokens [B, tokens, ...] as slots [B, slots, ...]; gradients of slots without a token are left out."""
        return x if self.token is None else _Moved.apply(x, self.token, self.slot)

    def back(self, x: torch.Tensor) -> torch.Tensor:
        """Slots [B, slots, ...] as tokens [B, tokens, ...]."""
        return x if self.slot is None else _Returned.apply(x, self.slot, self.token)


def rows_of(x: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """Rows [B, index, ...] of [B, rows, ...]."""
    return wide(x).index_select(1, index).view(x.dtype)


def wide(x: torch.Tensor) -> torch.Tensor:
    """The same memory in elements of 16 bytes where it can be: torch's kernels move an element a thread."""
    steps = (*x.stride()[:-1], x.shape[-1], x.storage_offset())
    even = x.stride(-1) == 1 and all(step * x.itemsize % WIDE.itemsize == 0 for step in steps)
    return x.view(WIDE) if even else x


class _Moved(torch.autograd.Function):
    """Tokens to slots; what a slot without a token holds is nobody's."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, token: torch.Tensor, slot: torch.Tensor) -> torch.Tensor:
        """Rows of each slot."""
        ctx.slot = slot
        return rows_of(x, token)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        """The gradient of the slot of each token."""
        return rows_of(grad, ctx.slot), None, None


class _Returned(torch.autograd.Function):
    """Slots to tokens; slots without a token have no gradient."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, slot: torch.Tensor, token: torch.Tensor) -> torch.Tensor:
        """Rows of each token."""
        ctx.slot, ctx.token = slot, token
        return rows_of(x, slot)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        """Zeros where there is no token."""
        if len(ctx.slot) == len(ctx.token):
            return rows_of(grad, ctx.token), None, None
        zeros = grad.new_zeros(grad.shape[0], len(ctx.token), *grad.shape[2:])
        if zeros.numel() and grad.numel():
            wide(zeros).index_copy_(1, ctx.slot, wide(grad.contiguous()))
        return zeros, None, None


class Lists(NamedTuple):
    """Blocks of each row of blocks, ascending; what lies behind the end of a list means nothing.

    Attributes:
        mask_block_cnt: Partial blocks of each row: int32 [1, 1 or heads, rows].
        mask_block_idx: Those: int32 [1, 1 or heads, rows, the most of a row].
        full_block_cnt: Full blocks of each row.
        full_block_idx: Those.
    """

    mask_block_cnt: torch.Tensor
    mask_block_idx: torch.Tensor
    full_block_cnt: torch.Tensor
    full_block_idx: torch.Tensor


@dataclass(frozen=True, eq=False)
class Blocks:
    """Everything about a pattern on a layout that the kernels need, on one device.

    Attributes:
        queries: Query tokens in tile order.
        keys: Key tokens in tile order.
        block_size: Slots of a query block and of a key block.
        forward: Key blocks of each query block.
        backward: Query blocks of each key block.
        words: Which slots see which in partial blocks.
        first: Where the words of each head's lists begin, as their `first`: int32 [heads]; None if all have the same.
    """

    queries: Order
    keys: Order
    block_size: tuple[int, int]
    forward: Lists
    backward: Lists
    words: Words
    first: torch.Tensor | None

    @property
    def tensors(self) -> list[torch.Tensor]:
        """What the mask function reads."""
        return [*self.words.tensors, *([] if self.first is None else [self.first])]


def patterns_of(pattern: Pattern, heads: int) -> list[ListedPattern]:
    """The pattern of each head; of one head where all have the same."""
    if isinstance(pattern, PerHead):
        found = pattern.of_heads(heads)
        return found if len(set(found)) > 1 else found[:1]
    assert isinstance(pattern, ListedPattern)
    return [pattern]


def tile_plan(pattern: ListedPattern, layout: Layout, rows: int) -> TilePlan:
    """The plan with tiles of so many query slots and as many key slots as the kernels take."""
    return plans_of([pattern], layout, rows)[0]


def plans_of(patterns: Sequence[ListedPattern], layout: Layout, rows: int) -> list[TilePlan]:
    """Plans of patterns that are one launch: in the boxes with the least work for the first that says it.

    Args:
        patterns: The patterns.
        layout: The tokens.
        rows: Slots of a query tile.
    """
    spanned = next((each for each in patterns if isinstance(each, SpannedPattern)), None)
    boxes = None if spanned is None else best_boxes(spanned.spans(*layout.grids), rows, COLUMNS)
    found = []
    for pattern in patterns:
        grid = pattern.tiled_layout(layout.queries).grid
        own = boxes is None or len(grid) != layout.dims
        found.append(plan(pattern, layout, tile=_own_boxes(pattern, layout, rows) if own else boxes))
    return found


def _own_boxes(pattern: ListedPattern, layout: Layout, rows: int) -> tuple[Box, Box]:
    return _own_box(pattern, layout.queries, rows), _own_box(pattern, layout.keys, COLUMNS)


def _own_box(pattern: ListedPattern, layout: Layout, volume: int) -> Box:
    """The pattern's own box where it has that volume."""
    grid = pattern.tiled_layout(layout).grid
    box = pattern.tile(grid, volume)
    return box if math.prod(box) == volume else box_shape(grid, volume)


def same_tiles(plans: Sequence[TilePlan]) -> bool:
    """Whether plans cut both sides in the same tiles, so that heads of each can be one launch."""
    return all(
        np.array_equal(one.tokens, other.tokens)
        for each in plans[1:]
        for one, other in ((plans[0].queries, each.queries), (plans[0].keys, each.keys))
    )


@kept
def blocks(pattern: Pattern, layout: Layout, heads: int, rows: int, device: torch.device) -> Blocks:
    """Build the lists and words of a pattern; nothing of the size S x S exists.

    Args:
        pattern: A listed pattern, or one for each head.
        layout: The tokens.
        heads: Query heads; 1 where the pattern does not tell them apart.
        rows: Slots of a query block.
        device: Where the tensors go.
    """
    of_head = patterns_of(pattern, heads)
    patterns = list(dict.fromkeys(of_head))
    plans = plans_of(patterns, layout, rows)
    assert same_tiles(plans), f"{pattern} has lists of different tiles on {layout}"
    queries, keys = plans[0].queries, plans[0].keys
    words = words_of(patterns, plans, device)
    chosen = np.array([patterns.index(each) for each in of_head])
    first = None
    if len(patterns) > 1:
        stride = queries.tiles * (1 if hasattr(words, "pair") else queries.capacity)
        first = torch.from_numpy((chosen * stride).astype(np.int32)).to(device)
    return Blocks(
        Order.of(queries, device),
        Order.of(keys, device),
        (rows, COLUMNS),
        _lists([each.lists for each in plans], chosen, device),
        _lists([each.transposed for each in plans], chosen, device),
        words,
        first,
    )


def _lists(plans: Sequence[TileLists], chosen: Ints, device: torch.device) -> Lists:
    """Partial and full blocks of each head's plan."""
    found = []
    for partial in (True, False):
        parts = [each.where(partial=partial) for each in plans]
        width = max(1, *(int(each.counts.max(initial=0)) for each in parts))
        index = np.zeros((len(parts), len(plans[0].start) - 1, width), np.int32)
        for place, each in enumerate(parts):
            index[place, each.rows, np.arange(len(each.tile)) - np.repeat(each.start[:-1], each.counts)] = each.tile
        count = np.stack([each.counts for each in parts]).astype(np.int32)
        found += [torch.from_numpy(each[chosen][None]).to(device) for each in (count, index)]
    return Lists(*found)
