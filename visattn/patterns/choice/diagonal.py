"""Scores by sums along antidiagonals (XAttention): every row and column of a square of tokens is met once."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch

from visattn.patterns.choice.blocks import Blocks
from visattn.patterns.choice.causal import reachable_on
from visattn.patterns.choice.pooling import tokens_of_blocks
from visattn.patterns.choice.slices import Slices


def scores(
    length: int, q: torch.Tensor, k: torch.Tensor, blocks: Blocks, valid: torch.Tensor | None, slices: Slices
) -> Iterator[tuple[torch.Tensor, slice]]:
    """Logarithm of the share of a query block's runs that falls on each key block.

    A run is `length` tokens of a block in row-major order. Two runs meet in the mean of the products along their
    antidiagonal, of those pairs of which both tokens are valid; the softmax over all runs of keys is summed over the
    runs of a block on both sides. Runs without such a pair do not meet, and blocks none of whose runs meet score -inf:
    nothing says how much one holds of the other, and a rank among the scored ones would be made up. Picks put them
    behind all that have a score, and before padding.

    Args:
        length: Tokens of a run.
        q: Grid queries [B, tokens, H, D], times the factor on the logits.
        k: Grid keys [B, tokens, Hkv, D].
        blocks: The blocks.
        valid: Tokens that take part, bool [B, tokens], or None for all.
        slices: How many heads at a time.

    Yields:
        [B, some heads, rows, columns] and those heads.
    """
    # A query run is turned, so that a product of runs is the sum along the antidiagonal.
    query, query_there = _runs(q, blocks.grid, blocks.queries, length, valid, True)
    keys, keys_there = _runs(k, blocks.grid, blocks.keys, length, valid, False)
    pairs = query_there.flatten(1, 2) @ keys_there.flatten(1, 2).transpose(1, 2)
    hidden = _later_runs(blocks, length, q.device)
    pairs = pairs if hidden is None else pairs.masked_fill(hidden, 0)
    runs = (query_there.sum(-1) > 0).sum(-1).clamp(min=1).to(query.dtype)
    (rows, each), (columns, others) = query.shape[2:4], keys.shape[2:4]
    query, keys = query.flatten(2, 3), keys.flatten(2, 3).transpose(2, 3)
    for some, head in slices.of(query, keys.shape[3], keys.shape[1]):
        found = (query[:, some] @ keys[:, head]) / pairs.clamp(min=1)[:, None]
        found = found.masked_fill((pairs == 0)[:, None], float("-inf"))
        # A run of padding meets nobody.
        share = found.softmax(-1).nan_to_num(0.0).unflatten(3, (columns, others)).unflatten(2, (rows, each))
        yield (share.sum((3, 5)) / runs[:, None, :, None]).log(), some


def _later_runs(blocks: Blocks, length: int, device: torch.device) -> torch.Tensor | None:
    """Runs of keys that come after a run of queries: bool [runs, runs]; None where no axis is causal."""
    reach = reachable_on(blocks, device)
    if reach is None:
        return None
    each, others = (math.prod(box) // length for box in (blocks.queries, blocks.keys))
    if not blocks.in_order:
        return ~reach.repeat_interleave(each, 0).repeat_interleave(others, 1)
    return torch.ones(blocks.rows * each, blocks.columns * others, dtype=torch.bool, device=device).triu(1)


def _runs(
    x: torch.Tensor, grid: tuple[int, ...], box: tuple[int, ...], length: int, valid: torch.Tensor | None, turned: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Runs of each block [B, H, blocks, runs, length * D], and whose tokens are there [B, blocks, runs, length]."""
    wide = torch.promote_types(x.dtype, torch.float32)
    there = torch.ones(x.shape[:2], dtype=torch.bool, device=x.device) if valid is None else valid
    own = x.masked_fill(~there[..., None, None], 0).to(wide)
    own, there = tokens_of_blocks(own, grid, box), tokens_of_blocks(there[..., None, None].to(wide), grid, box)
    own, there = (t.unflatten(2, (-1, length)) for t in (own, there[..., 0, 0]))
    if turned:
        own, there = own.flip(3), there.flip(3)
    return own.permute(0, 4, 1, 2, 3, 5).flatten(4), there
