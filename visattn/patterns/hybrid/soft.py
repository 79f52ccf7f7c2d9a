"""Softmax over soft lists: every key block counts by a weight between 0 and 1."""

from __future__ import annotations

import torch
from torch.utils.checkpoint import checkpoint

from visattn.layout import Layout
from visattn.operands import repeated, widened
from visattn.patterns.choice.blocks import Blocks, inner, token_blocks
from visattn.patterns.choice.picks import Seen
from visattn.patterns.hybrid.parts import soft_lists

# Values of weights of token pairs at a time.
PAIRS = 2**26


def soft_output(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    scores: torch.Tensor,
    seen: Seen,
    number: int,
    temperature: float,
    layout: Layout,
    blocks: Blocks,
    key_mask: torch.Tensor | None,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights of blocks, and the softmax of grid queries whose exponentials are multiplied by them.

    All pairs of tokens are computed, some queries at a time and once more in the backward.

    Args:
        q: Queries [B, S, H, D].
        k: Keys [B, S, Hkv, D].
        v: Values, alike.
        scores: Of pairs of blocks [B, H, rows, columns].
        seen: Which blocks take part.
        number: What the weights of a row add up to; with fewer blocks that take part, all of those count fully.
        temperature: Of the weights.
        layout: The tokens; dense ones count fully.
        blocks: The blocks.
        key_mask: bool [B, S], or None.
        scale: Factor on the logits.

    Returns:
        [B, H, rows, columns] and [B, tokens, H, D], in float32 at least.
    """
    weights = _weights(scores, seen, number, temperature)
    rows, columns = (token_blocks(blocks.grid, box, q.device) for box in (blocks.queries, blocks.keys))
    at = inner(layout)
    queries = widened(q[:, at]).transpose(1, 2)
    keys, values = (repeated(widened(x), q.shape[2]).transpose(1, 2) for x in (k, v))
    # The logarithm of a weight that is 0 hides a block.
    logs = weights.masked_fill(weights <= 0, 1).log().masked_fill(weights <= 0, float("-inf"))
    hidden = None if key_mask is None else ~key_mask[:, None, None]

    def some(queries: torch.Tensor, logs: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        logits = scale * queries @ keys.transpose(2, 3)
        pad = (layout.prefix, layout.suffix)
        logits = logits + torch.nn.functional.pad(logs[..., columns], pad)
        if hidden is not None:
            logits = logits.masked_fill(hidden, float("-inf"))
        blind = logits.isinf().all(-1, keepdim=True)
        return logits.masked_fill(blind, 0).softmax(-1).masked_fill(blind, 0) @ values

    step = max(1, PAIRS // (len(q) * q.shape[2] * layout.length))
    found = []
    for first in range(0, layout.tokens, step):
        part = slice(first, first + step)
        # What the backward reads again is handed over, where torch sees changes in place, or is our own.
        given = queries[:, :, part], logs[:, :, rows[part]], keys, values
        found.append(checkpoint(some, *given, use_reentrant=False) if step < layout.tokens else some(*given))
    return weights, torch.cat(found, 2).transpose(1, 2)


def _weights(scores: torch.Tensor, seen: Seen, number: int, temperature: float) -> torch.Tensor:
    """`soft_lists` of the blocks that take part, 1 for all of them where they are not more than `number`."""
    if seen.columns is None:
        if number >= scores.shape[3]:
            return torch.ones_like(scores)
        return soft_lists(scores, number, temperature)
    there = seen.columns[:, None, None].expand(scores.shape)
    few = there.sum(-1, keepdim=True) <= number
    # A row of few blocks is told apart behind: any number below theirs will do here.
    found = soft_lists(scores.masked_fill(~there, float("-inf")).masked_fill(few, 0.0), number, temperature)
    return torch.where(few, there.to(found.dtype), found)
