"""Pieces of the second branches in torch's operators: features, states of blocks, means, soft lists."""

from __future__ import annotations

import numpy as np
import torch

from visattn.keep import kept
from visattn.layout import Layout
from visattn.operands import repeated, wide_dtype, widened
from visattn.patterns.choice.blocks import Blocks, Box, block_tokens, inner, token_block_table, token_blocks
from visattn.patterns.choice.picks import Seen
from visattn.patterns.choice.pooling import counts, means
from visattn.patterns.choice.tail import LEAST

FEATURES = ("softmax", "elu", "relu")
# Values of a head's states that are made at a time: heads are gone through in slices of this many bytes.
SLICE = 2**28


def check_features(feature: object) -> None:
    """Raise a ValueError if there is no such feature map."""
    if feature not in FEATURES:
        raise ValueError(f"feature={feature!r} must be one of {', '.join(FEATURES)}")


def mapped(x: torch.Tensor, feature: str) -> torch.Tensor:
    """Features of queries or keys, not negative: softmax over channels, ELU + 1 or ReLU."""
    x = widened(x)
    if feature == "softmax":
        return x.softmax(-1)
    return x.relu() if feature == "relu" else torch.where(x > 0, x + 1, x.masked_fill(x > 0, 0).exp())


def grid_of(x: torch.Tensor, layout: Layout, valid: torch.Tensor | None = None) -> torch.Tensor:
    """Grid tokens [B, tokens, H, D], zeros where they are not valid."""
    own = x[:, inner(layout)]
    return own if valid is None else own.masked_fill(~valid[..., None, None], 0)


def valid_of(key_mask: torch.Tensor | None, layout: Layout) -> torch.Tensor | None:
    """Grid tokens that take part: bool [B, tokens], None for all."""
    return None if key_mask is None else key_mask[:, inner(layout)]


@kept
def slots(grid: Box, box: Box, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """The tokens of each block, and which of those entries there are: int64 and bool [blocks, most tokens]."""
    of = token_block_table(grid, box)
    number = np.bincount(of)
    order, first = np.argsort(of, kind="stable"), np.cumsum(number) - number
    slot = np.arange(number.max())
    there = slot < number[:, None]
    tokens = order[np.where(there, first[:, None] + slot, first[:, None])]
    return torch.from_numpy(tokens).to(device), torch.from_numpy(there).to(device)


def block_weights(blocks: Blocks, valid: torch.Tensor | None, device: torch.device) -> torch.Tensor:
    """Tokens of each key block that take part: [1 or B, columns]."""
    if valid is None:
        return block_tokens(blocks.grid, blocks.keys, device)[None]
    like = valid[..., None, None].to(torch.float32)
    return counts(like, blocks.grid, blocks.keys, 1, valid)[:, :, 0]


def block_means(
    x: torch.Tensor, layout: Layout, side: tuple[Box, Box], heads: int, key_mask: torch.Tensor | None
) -> torch.Tensor:
    """Differentiable means over the valid tokens of each block, for every query head: [B, H, blocks, D]."""
    found, _ = means(widened(x[:, inner(layout)]), *side, 1, valid_of(key_mask, layout))
    return repeated(found[:, :, 0], heads).transpose(1, 2)


def linear_of_all(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layout: Layout, key_mask: torch.Tensor | None, feature: str
) -> torch.Tensor:
    """Linear attention of grid queries over all valid grid keys: [B, tokens, H, D] in float32 at least."""
    valid = valid_of(key_mask, layout)
    queries = mapped(grid_of(q, layout), feature)
    keys = repeated(mapped(grid_of(k, layout), feature), q.shape[2])
    keys = keys if valid is None else keys * valid[..., None, None].to(keys.dtype)
    state = torch.einsum("bthf,bthd->bhfd", keys, repeated(widened(grid_of(v, layout, valid)), q.shape[2]))
    total = torch.einsum("bthf,bhf->bth", queries, keys.sum(1))
    return torch.einsum("bthf,bhfd->bthd", queries, state) / (LEAST + total)[..., None]


def linear_of_blocks(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    of: torch.Tensor,
    layout: Layout,
    blocks: Blocks,
    key_mask: torch.Tensor | None,
    feature: str,
) -> torch.Tensor:
    """Linear attention of each query block over some key blocks: [B, tokens, H, D] in float32 at least.

    Every key block is one state, a sum over its tokens of features times values; a query block adds up those of its
    key blocks, as one product of two matrices.

    Args:
        q: Queries [B, S, H, D].
        k: Keys [B, S, Hkv, D].
        v: Values, alike.
        of: How much of each key block counts for each query block [B, H or 1, rows, columns].
        layout: The tokens.
        blocks: The blocks.
        key_mask: bool [B, S], or None.
        feature: One of `FEATURES`.
    """
    heads, valid = q.shape[2], valid_of(key_mask, layout)
    # Values of one head's states, on both sides.
    size = len(q) * (blocks.rows + blocks.columns) * q.shape[3] * (v.shape[3] + 1)
    step = max(1, SLICE // (4 * size))
    found = []
    for first in range(0, heads, step):
        some = slice(first, min(heads, first + step))
        one = torch.arange(heads, device=q.device)[some] // (heads // k.shape[2])
        part = of[:, some] if of.shape[1] > 1 else of
        found.append(_linear_of_blocks(q[:, :, some], k[:, :, one], v[:, :, one], part, layout, blocks, valid, feature))
    return torch.cat(found, 2)


def _linear_of_blocks(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    of: torch.Tensor,
    layout: Layout,
    blocks: Blocks,
    valid: torch.Tensor | None,
    feature: str,
) -> torch.Tensor:
    """The same for heads whose states fit, with as many key heads."""
    (at, there), (rows, _) = (slots(*side, q.device) for side in reversed(blocks.sides))
    counted = there if valid is None else there & valid[:, at]
    # Products of bfloat16 are its own, of its range; sums of features stay wide.
    dtype = q.dtype if q.dtype == torch.bfloat16 else wide_dtype(q)
    keys = mapped(grid_of(k, layout), feature).to(dtype).transpose(1, 2)[:, :, at]
    keys = keys * counted.view(-1, 1, *there.shape)[..., None].to(dtype)
    values = grid_of(v, layout, valid).to(dtype).transpose(1, 2)[:, :, at]
    states = keys.transpose(3, 4) @ values
    state = (of.to(dtype) @ states.flatten(3)).unflatten(3, states.shape[3:])
    sums = widened(keys).sum(3)
    total = of.to(sums.dtype) @ sums
    queries = mapped(grid_of(q, layout), feature).to(dtype).transpose(1, 2)[:, :, rows]
    product = widened(queries @ state) / (LEAST + widened(queries) @ total[..., None])
    # Back from blocks: where each token is among them.
    return product.flatten(2, 3)[:, :, _places(*blocks.sides[0], q.device)].transpose(1, 2)


@kept
def _places(grid: Box, box: Box, device: torch.device) -> torch.Tensor:
    """Where each token is among the entries of `slots`: [tokens]."""
    of = token_block_table(grid, box)
    number = np.bincount(of)
    order, first = np.argsort(of, kind="stable"), np.cumsum(number) - number
    place = np.empty(len(of), np.int64)
    place[order] = of[order] * number.max() + np.arange(len(of)) - first[of[order]]
    return torch.from_numpy(place).to(device)


def of_tokens(x: torch.Tensor, blocks: Blocks) -> torch.Tensor:
    """What query blocks have [B, H, rows, ...] for their tokens: [B, tokens, H, ...]."""
    return x[:, :, token_blocks(blocks.grid, blocks.queries, x.device)].transpose(1, 2)


def soft_lists(scores: torch.Tensor, number: float, temperature: float, steps: int = 30) -> torch.Tensor:
    """Weights between 0 and 1 that add up to `number` in each row: sigmoid(score / temperature + shift).

    The shift of a row is found by bisection; its gradient is that of the equation it solves, so that the derivatives
    of a row's weights add up to zero.

    Args:
        scores: [..., columns]; -inf for what takes no part.
        number: Below the number of columns that take part.
        temperature: Above 0.
        steps: Of the bisection.
    """
    x = scores / temperature
    with torch.no_grad():
        finite = x.masked_fill(x.isinf(), 0)
        low, high = (-finite.amax(-1, keepdim=True) - 60, -finite.amin(-1, keepdim=True) + 60)
        for _ in range(steps):
            middle = (low + high) / 2
            more = torch.sigmoid(x + middle).sum(-1, keepdim=True) > number
            low, high = torch.where(more, low, middle), torch.where(more, middle, high)
        shift = (low + high) / 2
        for _ in range(2):
            # A step of Newton's doubles the digits that bisection has found; where the slope vanishes, all are there.
            found = torch.sigmoid(x + shift)
            slope = found * (1 - found)
            missing = number - found.sum(-1, keepdim=True)
            shift = shift + (missing / slope.sum(-1, keepdim=True).clamp_min(1e-6)).clamp(-1e-3, 1e-3)
        slope = torch.sigmoid(x + shift)
        slope = slope * (1 - slope)
        slope = slope / slope.sum(-1, keepdim=True).clamp_min(torch.finfo(x.dtype).tiny)
    moved = (x - x.detach()).masked_fill(x.isinf(), 0)
    return torch.sigmoid(x + shift - (slope * moved).sum(-1, keepdim=True))


def mean_scores(
    q: torch.Tensor, k: torch.Tensor, layout: Layout, blocks: Blocks, key_mask: torch.Tensor | None, scale: float
) -> tuple[torch.Tensor, Seen]:
    """Scaled products of the means of blocks [B, H, rows, columns], differentiable, and which blocks take part."""
    queries, keys = (
        block_means(x, layout, side, q.shape[2], key_mask) for x, side in zip((q, k), blocks.sides, strict=True)
    )
    return scale * queries @ keys.transpose(2, 3), seen_blocks(layout, blocks, key_mask)


def seen_blocks(layout: Layout, blocks: Blocks, key_mask: torch.Tensor | None) -> Seen:
    """The blocks with valid tokens."""
    valid = valid_of(key_mask, layout)
    if valid is None:
        return Seen()
    like = valid[..., None, None].to(torch.float32)
    rows, columns = (counts(like, *side, 1, valid)[:, :, 0] > 0 for side in blocks.sides)
    return Seen(rows, columns)
