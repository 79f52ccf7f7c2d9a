"""Rows of attention maps, under a pattern, dense and their difference; and where heads look relative to their query."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch

from visattn.checks import row_tensor
from visattn.given import said
from visattn.maps.measures import wide
from visattn.patterns import Pattern, parse
from visattn.patterns.values import whole_number
from visattn.recorded import Recorded, check_recorded
from visattn.watch import Watched

# Queries whose rows make a histogram of offsets.
SAMPLED = 256
# Rows that exist at once.
AT_ONCE = 32


class Rows(NamedTuple):
    """Weights with which chosen queries read all tokens.

    Attributes:
        dense: Of dense attention [B, H, R, S].
        sparse: Under a pattern, likewise; None without one.
    """

    dense: torch.Tensor
    sparse: torch.Tensor | None

    @property
    def difference(self) -> torch.Tensor | None:
        """Sparse minus dense."""
        return None if self.sparse is None else self.sparse - self.dense


@torch.no_grad()
def rows(call: Recorded, tokens: torch.Tensor | Sequence[int], pattern: Pattern | str | None = None) -> Rows:
    """The attention of chosen queries in a call, dense and under a pattern.

    Args:
        call: The call.
        tokens: Queries [R], counted from the first token of the sequence.
        pattern: Any pattern that has rows, see `visattn.attention_rows`.

    Raises:
        ValueError: As `visattn.attention_rows`.
    """
    check_recorded(call)
    index = row_tensor(tokens, "tokens").to(call.q.device)
    if index.ndim != 1:
        raise ValueError(f"tokens={said(tokens)} must be whole numbers [R], like [0]")
    dense = _watched(call, "dense").rows(index)
    return Rows(dense, None if pattern is None else _watched(call, pattern).rows(index))


@torch.no_grad()
def offsets(call: Recorded, samples: int = SAMPLED) -> torch.Tensor:
    """Histogram of key position minus query position under dense attention, for each head.

    Args:
        call: The call.
        samples: Queries that are looked at, spread over the grid; all where there are no more.

    Returns:
        [H, 2 n - 1 for each axis of n tokens], means over samples and queries; the middle is offset 0.

    Raises:
        ValueError: If fewer than one query is asked for.
    """
    check_recorded(call)
    samples = whole_number(samples, "samples", 1)
    layout = call.layout
    inner = slice(layout.prefix, layout.prefix + layout.tokens)
    chosen = _watched(call, "dense").sampled(samples)
    wide_grid = [2 * n - 1 for n in layout.grid]
    where = torch.stack(
        torch.meshgrid(*(torch.arange(n, device="cpu") for n in layout.grid), indexing="ij"), -1
    ).flatten(0, -2)
    where = where.to(chosen.device)
    found = call.q.new_zeros(call.q.shape[2], math.prod(wide_grid), dtype=wide(call)[0].dtype)
    for part in chosen.split(AT_ONCE):
        weights = rows(call, part).dense[..., inner].mean(0)
        moved = where[None] - where[part - layout.prefix][:, None]
        index = torch.zeros(moved.shape[:2], dtype=torch.int64, device=chosen.device)
        for axis, n in enumerate(layout.grid):
            index = index * (2 * n - 1) + moved[..., axis] + n - 1
        found.index_add_(1, index.flatten(), weights.flatten(1).to(found))
    return (found / len(chosen)).unflatten(1, wide_grid)


def _watched(call: Recorded, pattern: Pattern | str) -> Watched:
    """A call as if it had run a pattern, in float32 at least."""
    q, k = wide(call)
    return Watched(call.site, q, k, call.v, call.v, parse(pattern), (call.layout,), call.scale, call.key_mask, {})
