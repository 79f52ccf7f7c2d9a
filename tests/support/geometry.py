"""Masks pair by pair, from the definitions in exact fractions: keys on other grids, axes that are rings."""

import itertools
from fractions import Fraction

import torch
from hypothesis import strategies as st

from tests.support.cases import crossed
from tests.support.oracles import grid_tokens
from visattn.patterns import Clear, Dense, Halo, Neighborhood
from visattn.patterns.values import per_axis

HALF = Fraction(1, 2)


def centre(query, queries, keys):
    """Where a query's centre is, in keys: both grids span the same extent, positions are centres of their cells."""
    return (query + HALF) * Fraction(keys, queries) - HALF


def window_of(i, n, m, window, stride, circular):
    """Keys of query i on an axis of n queries and m keys: those nearest to the centre of its stride's leader."""
    window = m if window == -1 or window > m else window
    leader = min(i // stride * stride + stride // 2, n - 1)
    at = centre(leader, n, m)
    # A line of keys without ends.
    near = sorted(range(-2 * m - window, 3 * m + window), key=lambda j: (abs(j - at), j))[:window]
    first = min(near) if circular else min(max(min(near), 0), m - window)
    return {j % m for j in range(first, first + window)}


def halo_of(i, n, m, block, halo, circular):
    """Keys of query i: those whose cells overlap its block's extent, and so many beside them."""
    block = n if block == -1 else min(block, n)
    first = i // block * block
    last = min(first + block, n)
    own = [j for j in range(m) if Fraction(j, m) < Fraction(last, n) and Fraction(j + 1, m) > Fraction(first, n)]
    seen = range(min(own) - halo, max(own) + halo + 1)
    return {j % m for j in seen} if circular else {j for j in seen if 0 <= j < m}


def near(query, key, grid, keys, circular, radius):
    """Whether a key is in a query's circle, whose axes may be rings."""
    total = Fraction(0)
    for i, j, n, m, ring in zip(query, key, grid, keys, circular, strict=True):
        distance = abs(j - centre(i, n, m))
        if ring:
            distance = min(distance % m, m - distance % m)
        total += distance**2
    return total < radius**2


def truth(pattern, layout):
    """The mask of undilated patterns, pair by pair."""
    grid, keys, dims = layout.grid, layout.keys.grid, layout.dims
    if isinstance(pattern, Clear):
        rings = per_axis(pattern.circular, dims, "circular")
        sees = lambda q, k: near(q, k, grid, keys, rings, pattern.radius)  # noqa: E731
    elif isinstance(pattern, Dense):
        sees = lambda q, k: True  # noqa: E731
    else:
        rule = window_of if isinstance(pattern, Neighborhood) else halo_of
        names = ("window", "stride") if isinstance(pattern, Neighborhood) else ("block", "halo")
        values = [per_axis(getattr(pattern, name), dims, name) for name in (*names, "circular")]
        axes = [
            [rule(i, n, m, *own) for i in range(n)]
            for n, m, own in zip(grid, keys, zip(*values, strict=True), strict=True)
        ]
        sees = lambda q, k: all(j in axis[i] for i, j, axis in zip(q, k, axes, strict=True))  # noqa: E731
    mask = torch.ones(layout.length, layout.keys.length, dtype=torch.bool)
    for (i, q), (j, k) in itertools.product(enumerate(grid_tokens(grid)), enumerate(grid_tokens(keys))):
        mask[layout.prefix + i, layout.keys.prefix + j] = sees(q, k)
    return mask


@st.composite
def patterns(draw, dims):
    size, ring = st.integers(1, 6), draw(st.tuples(*[st.booleans()] * dims))
    kind = draw(st.sampled_from([Neighborhood, Halo, Clear, Dense]))
    if kind is Neighborhood:
        windows = draw(st.tuples(*[size | st.just(-1)] * dims))
        strides = tuple(1 if w == -1 else draw(st.integers(1, w)) for w in windows)
        return Neighborhood(windows, strides, circular=ring)
    if kind is Halo:
        halo = draw(st.tuples(*[st.integers(0, 4)] * dims))
        return Halo(draw(st.tuples(*[size | st.just(-1)] * dims)), halo, ring)
    return Clear(draw(st.integers(1, 5)), circular=ring) if kind is Clear else Dense()


@st.composite
def problems(draw, sides=(14, 5, 3), widths=(1, 10, 16), batch=2):
    """What an engine is asked: a pattern, its layout, q, k and v whose widths may differ, valid keys, and the truth.

    Returns:
        Pattern, layout, (q, k, v) in float64 with gradients, key mask or None, mask of visible pairs [B, S, Skv].
    """
    layout = draw(crossed(sides))
    pattern, kv_heads = draw(patterns(layout.dims)), draw(st.sampled_from([1, 2]))
    width, value_width = draw(st.sampled_from(widths)), draw(st.sampled_from(widths))
    made = torch.Generator().manual_seed(draw(st.integers(0, 9)))
    keys = layout.keys.length
    shapes = [(batch, layout.length, 2, width), (batch, keys, kv_heads, width), (batch, keys, kv_heads, value_width)]
    q, k, v = (torch.randn(s, generator=made, dtype=torch.float64).requires_grad_() for s in shapes)
    valid = torch.rand(batch, keys, generator=made) < 0.7 if draw(st.booleans()) else None
    seen = truth(pattern, layout).expand(batch, -1, -1)
    return pattern, layout, (q, k, v), valid, seen if valid is None else seen & valid[:, None]
