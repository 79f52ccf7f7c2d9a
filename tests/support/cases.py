"""Inputs that the tests draw: layouts, tiles, tensors."""

from __future__ import annotations

import torch
from hypothesis import strategies as st

from visattn.layout import Layout


@st.composite
def layouts(draw, sides=(9, 6, 4), dims=(1, 3)):
    """A small layout; `sides` are the longest axes of a 1-D, 2-D and 3-D grid."""
    number = draw(st.integers(*dims))
    grid = [draw(st.integers(1, sides[number - 1])) for _ in range(number)]
    return Layout(grid, draw(st.integers(0, 5)), draw(st.integers(0, 5)))


@st.composite
def tiles(draw, dims, smallest=1):
    """The `tile` of a plan: None, a box, or one for queries and one for keys."""
    box = st.tuples(*[st.integers(smallest, 4)] * dims)
    return draw(st.one_of(st.none(), box, st.tuples(box, box)))


@st.composite
def crossed(draw, sides=(9, 6, 4), dims=(1, 3)):
    """A small layout, most often with keys in another, on the same grid or on one that is coarser or finer."""
    layout = draw(layouts(sides, dims))
    if draw(st.integers(0, 3)) == 0:
        return layout
    own = draw(st.just(layout.grid) | st.tuples(*[st.integers(1, sides[layout.dims - 1])] * layout.dims))
    return layout.with_keys(Layout(own, draw(st.integers(0, 5)), draw(st.integers(0, 5))))


def qkv(layout, heads=2, kv_heads=None, dim=10, batch=1, dtype=torch.float64, grad=False, seed=0):
    """Random q, k and v."""
    made = torch.Generator().manual_seed(seed)
    own, keys = kv_heads or heads, layout.keys.length
    shapes = [(batch, n, h, dim) for n, h in ((layout.length, heads), (keys, own), (keys, own))]
    return [torch.randn(s, generator=made, dtype=torch.float64).to(dtype).requires_grad_(grad) for s in shapes]


def gradients(out, inputs, seed=1):
    """Gradients of a random weighting of `out`."""
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return torch.autograd.grad((out * weight.to(out.dtype)).sum(), inputs)
