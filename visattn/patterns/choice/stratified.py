"""Some of many tokens, spread over the sequence and over every axis of its grid alike."""

from __future__ import annotations

import torch

from visattn.layout import Layout

# The golden ratio's share, in 2**16ths: its multiples fill an interval evenly, however many there are.
GOLDEN, WHOLE = 40503, 2**16


def stratified(number: int, tokens: torch.Tensor) -> torch.Tensor:
    """One token of each of `number` equally long stretches of a sequence, in ascending order.

    Tokens at equal distances would lie in one column of most grids, for distances and sides of grids have common
    factors: of 16x16x16 tokens every 64th is in the first column of its frame. So where in its stretch a token lies
    goes by multiples of the golden ratio.

    Args:
        number: How many, at least 1.
        tokens: How many there are, int64 [..., 1]; where fewer than `number`, all, and the last one again and again.

    Returns:
        int64 [..., number], on the device of `tokens`.
    """
    index = torch.arange(number + 1, device=tokens.device)
    start = index * tokens // number
    index, start, length = index[:-1], start[..., :-1], start.diff(dim=-1)
    own = start + ((index * GOLDEN + WHOLE // 2) % WHOLE * length).div(WHOLE, rounding_mode="floor")
    few = torch.minimum(index, (tokens - 1).clamp(min=0))
    return torch.where(tokens < number, few, own)


def sampled_rows(layout: Layout, rows: int, device: torch.device) -> torch.Tensor:
    """At most so many tokens of the grid, spread over all of its axes [R]."""
    tokens = torch.full((1,), layout.tokens, device=device)
    return layout.prefix + stratified(min(rows, layout.tokens), tokens)
