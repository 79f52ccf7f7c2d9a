"""Linear attention to earlier positions of an axis, with decay: by products inside tiles, by states between them.

Source: Qin et al., "Lightning Attention-2" (2024), section 3: the products of a tile of positions with each other are
masked, what comes before the tile is a state of features x channels. There a position is a token; here it is all that
share an index of one axis of a grid (the tokens of a frame), which see each other. A position of as many tokens as
there are features is a tile of its own, and needs no products at all.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

from visattn.kernels.linear.features import feature_map
from visattn.kernels.linear.plain import divided
from visattn.layout import Layout
from visattn.operands import repeated, widened
from visattn.patterns.linear import Linear

# Tokens of a tile whose positions have fewer.
TILE = 64


class Sides(NamedTuple):
    """Tokens before the grid, of the grid with positions of the causal axis first, and behind it.

    Attributes:
        before: [B, prefix, H, ...].
        grid: [B, positions, tokens of one, H, ...].
        after: [B, suffix, H, ...].
    """

    before: torch.Tensor
    grid: torch.Tensor
    after: torch.Tensor

    @classmethod
    def of(cls, x: torch.Tensor, layout: Layout, axis: int) -> Sides:
        """Of tokens [B, S, H, ...]."""
        before, grid, after = x.split([layout.prefix, layout.tokens, layout.suffix], 1)
        return cls(before, by_position(grid, layout.grid[axis], math.prod(layout.grid[axis + 1 :])), after)

    def joined(self, layout: Layout, axis: int) -> torch.Tensor:
        """The tokens in their order again."""
        grid = in_order(self.grid, math.prod(layout.grid[axis + 1 :]))
        return torch.cat([self.before, grid, self.after], 1)


def by_position(x: torch.Tensor, positions: int, inner: int) -> torch.Tensor:
    """Tokens of a grid [B, S, ...] by their position on an axis, `inner` of one in a row: [B, positions, R, ...]."""
    return x.unflatten(1, (-1, positions, inner)).transpose(1, 2).flatten(2, 3)


def in_order(x: torch.Tensor, inner: int) -> torch.Tensor:
    """Its inverse."""
    return x.unflatten(2, (-1, inner)).transpose(1, 2).flatten(1, 3)


def causal_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, pattern: Linear, layout: Layout
) -> torch.Tensor:
    """The maths of `visattn.patterns.Linear` with a causal axis.

    Args:
        q: Features of the queries [B, S, H, F], float32 at least, not negative.
        k: Features of the keys [B, S, Hkv or H, F]; zeros hide a key.
        v: Values [B, S, Hkv, D].
        pattern: The pattern, with a causal axis.
        layout: The tokens.

    Returns:
        [B, S, H, D] in v's dtype; zeros for a query whose features meet no key's.
    """
    axis, heads = pattern.causal_axis(layout.grid), q.shape[2]
    assert axis is not None
    rates = decay_rates(pattern, heads, q)
    k, values = repeated(k, heads), repeated(widened(v), heads)
    # The sum of the weights is one channel more.
    values = torch.cat([values, values.new_ones(*values.shape[:3], 1)], 3)
    queries, keys, values_ = (Sides.of(x, layout, axis) for x in (q, k, values))
    dense = torch.stack([torch.einsum("bshf,bshd->bhfd", keys[i], values_[i]) for i in (0, 2)]).sum(0)
    everything = dense + torch.einsum("bnrhf,bnrhd->bhfd", keys.grid, values_.grid)
    grid = earlier(queries.grid, keys.grid, values_.grid, rates)
    grid = grid + torch.einsum("bnrhf,bhfd->bnrhd", queries.grid, dense)
    ends = [torch.einsum("bshf,bhfd->bshd", queries[i], everything) for i in (0, 2)]
    out = Sides(ends[0], grid, ends[1]).joined(layout, axis)
    return divided(out[..., :-1], out[..., -1]).to(v.dtype)


def plain_grid_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    key_mask: torch.Tensor | None,
    dense: torch.Tensor | None,
    rates: torch.Tensor,
    positions: int,
    inner: int,
    feature: str,
) -> torch.Tensor:
    """The grid's tokens alone, from what features are made of ("elu", "relu") or from features ("given").

    Args:
        q: Of the queries [B, S, H, F].
        k: Of the keys [B, S, Hkv, F].
        v: Values [B, S, Hkv, D].
        key_mask: bool [B, S], or None.
        dense: State and sums of features of dense keys [B, H, F * D + F], or None.
        rates: Exponents of the decay [H].
        positions: Of the causal axis.
        inner: Tokens of a position that lie in a row.
        feature: Name of the feature map.

    Returns:
        [B, S, H, D] in v's dtype.
    """
    heads = q.shape[2]
    q, k, values = feature_map(q, feature), repeated(feature_map(k, feature), heads), repeated(widened(v), heads)
    if key_mask is not None:
        k = k * key_mask[:, :, None, None]
    values = torch.cat([values, values.new_ones(*values.shape[:3], 1)], 3)
    sides = [by_position(x, positions, inner) for x in (q, k, values)]
    out = in_order(earlier(sides[0], sides[1], sides[2], rates.to(q.dtype)), inner)
    if dense is not None:
        shape = q.shape[3], v.shape[3]
        state, sums = dense.to(q.dtype).split([math.prod(shape), shape[0]], 2)
        out = out + torch.einsum("bshf,bhfd->bshd", q, torch.cat([state.unflatten(2, shape), sums[..., None]], 3))
    return divided(out[..., :-1], out[..., -1]).to(v.dtype)


def decay_rates(pattern: Linear, heads: int, like: torch.Tensor) -> torch.Tensor:
    """By what exponent weights fall from position to position: [H]."""
    if pattern.decay == "heads":
        return 2.0 ** (-8 * torch.arange(1, heads + 1, device=like.device, dtype=like.dtype) / heads)
    assert isinstance(pattern.decay, float)
    # What is faster than the dtype can say leaves nothing either way.
    decay = min(pattern.decay, torch.finfo(like.dtype).max)
    return torch.full((heads,), decay, device=like.device, dtype=like.dtype)


def earlier(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    rates: torch.Tensor,
    before: torch.Tensor | None = None,
) -> torch.Tensor:
    """Weighted sums over the keys of the same and of earlier positions.

    Args:
        q: Features [B, n, R, H, F] of the R queries of each position.
        k: Features of the keys, alike.
        v: Values [B, n, R, H, D].
        rates: Exponents of the decay [H].
        before: State of the positions before the first, decayed to just before it: [B, H, F, D]; None for zeros.

    Returns:
        [B, n, R, H, D], not divided.
    """
    number, tokens = q.shape[1:3]
    size = 1 if tokens >= min(TILE, q.shape[4]) else min(-(-TILE // tokens), number)
    short = -number % size
    if short:
        # Positions that are not there have keys that weigh nothing.
        q, k, v = (torch.nn.functional.pad(x, (0, 0) * 3 + (0, short)) for x in (q, k, v))
    q, k, v = (x.unflatten(1, (-1, size)) for x in (q, k, v))
    at = torch.arange(size, device=q.device, dtype=q.dtype)
    # What a tile leaves, decayed to its last position, and what was left by all before it.
    left = (-(size - 1 - at)[:, None] * rates).exp()
    states = torch.einsum("bmtrhf,th,bmtrhd->bmhfd", k, left, v)
    states = running(states, (-size * rates).exp(), before)
    if size == 1:
        return torch.einsum("bmtrhf,bmhfd->bmtrhd", q, states[:, 1:]).flatten(1, 2)
    reach = (-(1 + at)[:, None] * rates).exp()
    out = torch.einsum("bmtrhf,th,bmhfd->bmtrhd", q, reach, states[:, :-1])
    steps = at[:, None] - at
    mask = (-steps.clamp(min=0) * rates[:, None, None]).exp() * (steps >= 0)
    products = torch.einsum("bmtrhf,bmpshf->bmhtrps", q, k) * mask[:, :, None, :, None]
    out = out + torch.einsum("bmhtrps,bmpshd->bmtrhd", products, v)
    return out.flatten(1, 2)[:, :number]


def running(states: torch.Tensor, factor: torch.Tensor, before: torch.Tensor | None = None) -> torch.Tensor:
    """Decayed sums of what tiles leave, in as many steps as the logarithm of their number.

    Args:
        states: Of each tile [B, m, H, F, D].
        factor: Decay over a tile [H].
        before: What was left before the first, None for zeros.

    Returns:
        Before each tile, and after the last: [B, m + 1, H, F, D].
    """
    first = states.new_zeros(states[:, :1].shape) if before is None else before[:, None].to(states.dtype)
    found, reach = torch.cat([first, states], 1), 1
    factor = factor[:, None, None]
    while reach < found.shape[1]:
        found = torch.cat([found[:, :reach], found[:, reach:] + factor * found[:, :-reach]], 1)
        factor, reach = factor * factor, 2 * reach
    return found


def causal_factors(pattern: Linear, layout: Layout, heads: int, rows: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """What causal axis and decay make of the products of some queries with all keys: [H, R, S]."""
    axis = pattern.causal_axis(layout.grid)
    assert axis is not None
    where = torch.arange(layout.grid[axis], device=rows.device)
    sides = [1] * layout.dims
    sides[axis] = -1
    position = where.view(sides).expand(layout.grid).flatten()
    grid = torch.zeros(layout.length, dtype=torch.bool, device=rows.device)
    grid[layout.prefix : layout.prefix + layout.tokens] = True
    place = torch.nn.functional.pad(position, (layout.prefix, layout.suffix))
    steps = place[rows, None] - place
    inside = grid[rows, None] & grid
    decay = (-decay_rates(pattern, heads, like)[:, None, None] * (steps.clamp(min=0) * inside).to(like.dtype)).exp()
    return decay * ((steps >= 0) | ~inside)
