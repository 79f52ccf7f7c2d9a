"""Scores by all products of small integers (SALE): what the largest weight in a pair of blocks may be."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from visattn.operands import wide_dtype
from visattn.patterns.choice.blocks import Blocks
from visattn.patterns.choice.pooling import tokens_of_blocks
from visattn.patterns.choice.slices import SCORES, SCORES_ELSEWHERE, Slices


def scores(
    bits: int, q: torch.Tensor, k: torch.Tensor, blocks: Blocks, valid: torch.Tensor | None, slices: Slices
) -> Iterator[tuple[torch.Tensor, slice]]:
    """Logarithm of the largest weight of a token of a block in the attention of a query of a block.

    Queries and keys, both without their mean over all valid tokens, are rounded to integers of so many bits, token by
    token; their products are rescaled, and the product of the mean query with each key, which differs from key to key,
    is added exactly. Weights are relative to all keys of the grid.

    Args:
        bits: Of the integers, sign included.
        q: Grid queries [B, tokens, H, D], times the factor on the logits.
        k: Grid keys [B, tokens, Hkv, D].
        blocks: The blocks.
        valid: Tokens that take part, bool [B, tokens], or None for all.
        slices: How many heads at a time.

    Yields:
        [B, some heads, rows, columns] and those heads.
    """
    wide = wide_dtype(q)
    there = torch.ones(q.shape[:2], dtype=wide, device=q.device) if valid is None else valid.to(wide)
    number = there.sum(1).clamp(min=1)[:, None, None, None]
    mean_q, mean_k = (((x.to(wide) * there[..., None, None]).sum(1, keepdim=True) / number) for x in (q, k))
    query, keys = (_rounded(x.to(wide) - mean, bits) for x, mean in ((q, mean_q), (k, mean_k)))
    exact = k.to(wide) - mean_k
    query, keys, exact = (
        tokens_of_blocks(x, blocks.grid, box).permute(0, 3, 1, 2, 4)
        for x, box in ((query, blocks.queries), (keys, blocks.keys), (exact, blocks.keys))
    )
    rows_there, keys_there = (
        tokens_of_blocks(there[..., None, None], blocks.grid, box)[..., 0, 0] > 0
        for box in (blocks.queries, blocks.keys)
    )
    keys_there = keys_there.flatten(1)
    columns, budget = keys.shape[2:4], SCORES.get(q.device.type, SCORES_ELSEWHERE)
    for some, head in slices.of(query[..., :1, :].flatten(3), columns[0], keys.shape[1]):
        own, correction = keys[:, head].flatten(2, 3), exact[:, head].flatten(2, 3)
        shift = torch.einsum("bhd,bhnd->bhn", mean_q[:, 0, some], correction)[:, :, None]
        # So many rows of blocks at a time: products of all tokens are many more than scores.
        step = max(1, budget // max(1, own.shape[0] * own.shape[1] * own.shape[2] * query.shape[3]))
        parts = []
        for first in range(0, query.shape[2], step):
            rows = slice(first, first + step)
            found = query[:, some, rows].flatten(2, 3) @ own.transpose(2, 3) + shift
            found = found.masked_fill(~keys_there[:, None, None], float("-inf"))
            # A query without keys has no weights.
            found = (found - found.logsumexp(-1, keepdim=True)).nan_to_num(nan=float("-inf"))
            hidden = ~rows_there[:, rows].flatten(1)
            found = found.masked_fill(hidden[:, None, :, None], float("-inf"))
            parts.append(found.unflatten(3, columns).unflatten(2, (-1, query.shape[3])).amax((3, 5)))
        yield torch.cat(parts, 2), some


def _rounded(x: torch.Tensor, bits: int) -> torch.Tensor:
    """Values that integers of so many bits stand for, with a factor per token and head."""
    most = 2 ** (bits - 1) - 1
    factor = x.abs().amax(-1, keepdim=True).clamp(min=1e-30) / most
    return (x / factor).round() * factor
