import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import visattn
from tests.support.cases import gradients, layouts, qkv, tiles
from tests.support.oracles import dense_attention, mask_of, visited
from visattn import dense_mask, parse, plan
from visattn.layout import Layout
from visattn.patterns import Clear


def inside(q, k, radius):
    return sum((a - b) ** 2 for a, b in zip(q, k, strict=True)) < radius * radius


@settings(deadline=None, max_examples=50)
@given(data=st.data())
def test_mask_and_plan(data):
    layout = data.draw(layouts(sides=(17, 8, 5)))
    pool = data.draw(
        st.one_of(st.none(), st.integers(1, 4), st.tuples(*[st.sampled_from([-1, 1, 2, 3])] * layout.dims))
    )
    pattern = Clear(data.draw(st.integers(1, 9)), pool)
    truth = mask_of(lambda q, k: inside(q, k, pattern.radius), layout)
    extra = torch.zeros(layout.length, pattern.extra_keys(layout.grid), dtype=torch.bool)
    extra[layout.prefix : layout.prefix + layout.tokens] = True
    truth = torch.cat([truth, extra], 1)
    assert torch.equal(dense_mask(pattern, layout), truth)
    made = plan(pattern, layout, data.draw(tiles(layout.dims)))
    assert torch.equal(visited(made), truth) and made.visible == truth.sum()
    assert pattern.covers(layout.grid) == bool(truth.all() and pool is None)
    assert str(parse(str(pattern))) == str(pattern)


def test_masks_are_evaluated_once_per_distance():
    made = plan("clear(radius=16)", Layout((250, 250)))
    assert len(made.masks) < 200 and made.queries.tiles == 32 * 32
    disc = sum(a * a + b * b < 256 for a in range(-15, 16) for b in range(-15, 16))
    assert 128**2 / disc < plan("clear(radius=16)", Layout((128, 128))).flop_bound < 1.15 * 128**2 / disc


def pooled(x, grid, cell, weight, keep):
    """Each cell's weighted sum over its kept tokens, weights scaled up by slots / tokens: [B, cells, H, D]."""
    out, count = [], []
    index = torch.arange(math.prod(grid)).view(grid)
    for corner in itertools.product(*(range(0, n, c) for n, c in zip(grid, cell, strict=True))):
        total, number = 0.0, torch.zeros(len(x))
        for slot in itertools.product(*(range(c) for c in cell)):
            place = [a + b for a, b in zip(corner, slot, strict=True)]
            if all(p < n for p, n in zip(place, grid, strict=True)):
                token = index[tuple(place)]
                there = keep[:, token].double()
                total = total + weight[slot] * x[:, token] * there[:, None, None]
                number = number + there
        out.append(total * (math.prod(cell) / number.clamp(min=1))[:, None, None])
        count.append(number)
    return torch.stack(out, 1), torch.stack(count, 1)


@pytest.mark.parametrize(
    ("grid", "cell"), [((9,), (4,)), ((8, 8), (4, 4)), ((5, 7), (2, 3)), ((3, 4, 5), (2, 2, 2)), ((3, 5), (4, 1))]
)
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_pooled_keys(grid, cell, weighted, masked):
    layout = Layout(grid, 2, 3)
    pattern = Clear(2, cell)
    q, k, v = qkv(layout, 4, 2, 6, batch=2, grad=True)
    weight = torch.randn(cell, dtype=torch.float64, requires_grad=True) if weighted else None
    key_mask = None
    if masked:
        key_mask = torch.rand(2, layout.length, generator=torch.Generator().manual_seed(3)) < 0.6
    out = visattn.attention(q, k, v, pattern, layout, key_mask=key_mask, pool_weight=weight)

    inner = slice(2, 2 + layout.tokens)
    keep = torch.ones(2, layout.tokens, dtype=torch.bool) if key_mask is None else key_mask[:, inner]
    full = torch.full(cell, 1 / math.prod(cell), dtype=torch.float64) if weight is None else weight
    (pk, count), (pv, _) = (pooled(t[:, inner], grid, cell, full, keep) for t in (k, v))
    seen = dense_mask(pattern, layout).expand(2, -1, -1).clone()
    seen[:, :, layout.length :] &= (count > 0)[:, None]
    if key_mask is not None:
        seen[:, :, : layout.length] &= key_mask[:, None]
    truth = dense_attention(q, torch.cat([k, pk], 1), torch.cat([v, pv], 1), seen, 6**-0.5)
    assert (out - truth).abs().max() < 1e-10
    inputs = (q, k, v) if weight is None else (q, k, v, weight)
    for ours, theirs in zip(gradients(out, inputs), gradients(truth, inputs), strict=True):
        assert (ours - theirs).abs().max() < 1e-10


def test_compiles_as_one_graph_with_gradients():
    layout = Layout((6, 6), suffix=2)
    q, k, v = qkv(layout, grad=True)
    weight = torch.rand(3, 3, dtype=torch.float64, requires_grad=True)

    def call(q, k, v, weight):
        return visattn.attention(q, k, v, "clear(radius=2, pool=3)", layout, pool_weight=weight)

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    inputs = (q, k, v, weight)
    out, truth = compiled(*inputs), call(*inputs)
    assert torch.allclose(out, truth, atol=1e-12)
    for ours, theirs in zip(gradients(out, inputs), gradients(truth, inputs), strict=True):
        assert torch.allclose(ours, theirs, atol=1e-12)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("clear(radius=0)", r"radius=0 must be one whole number of at least 1$"),
        ("clear(radius=2x3)", r"radius=\(2, 3\) must be one whole number of at least 1: the window is a circle"),
        ("clear(radius=2.5)", "radius=2.5 must be one whole number of at least 1$"),
        ("clear(radius=2, pool=0)", r"pool=0 must be a whole number of at least 1 or -1"),
        ("clear(radius=2, pool=2x2x2)", r"pool=2x2x2 has 3 values but the grid has 2 axes"),
    ],
)
def test_errors(text, message):
    with pytest.raises(ValueError, match=message):
        plan(text, Layout((8, 8)))


def test_wrong_weight():
    layout = Layout((8, 8))
    q, k, v = qkv(layout)
    with pytest.raises(ValueError, match=r"pool_weight is \[2, 3\] but clear\(radius=3, pool=2\) takes \[2, 2\]"):
        visattn.attention(q, k, v, "clear(radius=3, pool=2)", layout, pool_weight=torch.ones(2, 3))
