"""Keys on grids of their own and axes that wrap around: masks against loops with exact fractions, and plans."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from tests.support.cases import crossed, layouts, qkv, tiles
from tests.support.geometry import patterns, truth
from tests.support.oracles import grid_tokens, visited
from visattn import attention, dense_mask, explain, parse, plan
from visattn.layout import Layout
from visattn.patterns import Neighborhood
from visattn.patterns.geometry import ranked
from visattn.simulate import simulate


@settings(max_examples=120)
@given(st.data(), crossed(sides=(20, 7, 4)))
def test_masks_and_plans_are_what_the_words_say(data, layout):
    pattern = data.draw(patterns(layout.dims))
    mask = truth(pattern, layout)
    assert torch.equal(dense_mask(pattern, layout), mask)
    made = plan(pattern, layout, data.draw(tiles(layout.dims)))
    assert torch.equal(visited(made), mask) and made.visible == mask.sum()
    assert pattern.covers(*layout.grids) <= bool(mask.all())
    assert parse(str(pattern)) == pattern


@given(st.data(), layouts(sides=(20, 7, 4)))
def test_rings_of_dilated_windows(data, layout):
    """A window on a ring is the window on a line that is long enough, taken modulo the ring."""
    axes = []
    for n in layout.grid:
        dilation = data.draw(st.sampled_from([d for d in range(1, n + 1) if n % d == 0]))
        window = data.draw(st.integers(1, n // dilation))
        axes.append((window, data.draw(st.integers(1, window)), dilation))
    windows, strides, dilations = zip(*axes, strict=True)
    pattern = Neighborhood(windows, strides, dilations, circular=True)
    mask = torch.ones(layout.length, layout.length, dtype=torch.bool)
    tokens = grid_tokens(layout.grid)
    for (i, q), (j, k) in itertools.product(enumerate(tokens), enumerate(tokens)):
        seen = True
        for a, b, n, (window, stride, dilation) in zip(q, k, layout.grid, axes, strict=True):
            place, members = a // dilation, n // dilation
            leader = min(place // stride * stride + stride // 2, members - 1)
            own = {(leader - window // 2 + step) % members * dilation + a % dilation for step in range(window)}
            seen = seen and b in own
        mask[layout.prefix + i, layout.prefix + j] = seen
    assert torch.equal(dense_mask(pattern, layout), mask)
    made = plan(pattern, layout, data.draw(tiles(layout.dims)))
    assert torch.equal(visited(made), mask) and made.visible == mask.sum()


@given(st.data(), layouts())
def test_equal_grids_are_what_they_are_without_key_layout(data, layout):
    pattern = data.draw(patterns(layout.dims))
    same = layout.with_keys(Layout(layout.grid, layout.prefix, layout.suffix))
    assert same == layout and same.key_layout is None
    other = layout.with_keys(Layout(layout.grid, layout.prefix + 1, layout.suffix))
    assume(layout.tokens < 60)
    assert torch.equal(dense_mask(pattern, other)[:, 1:], dense_mask(pattern, layout))


def test_a_window_on_a_ring_goes_on_at_the_other_end():
    mask = dense_mask("na(window=5, circular=true)", Layout(7))
    assert mask[0].nonzero().ravel().tolist() == [0, 1, 2, 5, 6]
    assert mask.sum(0).tolist() == [5] * 7, "every key is seen equally often"
    assert dense_mask("na(window=9, circular=true)", Layout(7)).all()


def test_windows_of_other_keys_are_around_the_query():
    coarser, finer = Layout(8, key_layout=Layout(4)), Layout(4, key_layout=Layout(8))
    assert dense_mask("na(window=1)", coarser).int().argmax(1).tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    assert dense_mask("na(window=2)", finer).int().argmax(1).tolist() == [0, 2, 4, 6]
    assert torch.equal(dense_mask("na(window=2)", finer), dense_mask("halo(block=1, halo=0)", finer))


def test_calls_with_other_keys_are_told_apart():
    """Equal shapes, other key layouts: what runs one call must not run the other."""
    q, k, v = qkv(Layout((4, 4), key_layout=Layout((4, 6))), dtype=torch.float32)
    text, layout = "na(window=3)", Layout((4, 4))
    for own in (Layout((4, 6)), Layout((6, 4)), Layout((4, 5), 4), Layout((4, 5), 0, 4)):
        for backend in ("tiles", "sdpa", "auto"):
            for _ in range(2):
                out = attention(q, k, v, text, layout, key_layout=own, backend=backend)
                right = attention(q, k, v, text, layout.with_keys(own), backend="reference")
                assert (out - right).abs().max() < 1e-5


@pytest.mark.parametrize(
    ("text", "layout", "message"),
    [
        ("na(window=3, dilation=2)", Layout(8, key_layout=Layout(4)), r"dilation=2 needs queries and keys at the same"),
        ("na(window=3, causal=true)", Layout(8, key_layout=Layout(4)), r"causal=true needs .* \(8\) has 4 keys"),
        ("na(window=3, dilation=2, circular=true)", Layout(9), r"dilation 2 does not divide axis 0 of grid 9"),
        (
            "radial",
            Layout((4, 8), key_layout=Layout((4, 4))),
            r"radial has no meaning for queries and keys on different",
        ),
        (
            "agent(agents=2)",
            Layout(8, key_layout=Layout(4)),
            r"is for self-attention, and the layout is 8 with keys on 4",
        ),
        ("topk(keep=2)", Layout(8, key_layout=Layout(4)), r"only patterns that are a mask known from the grids"),
    ],
)
def test_what_means_nothing_is_refused(text, layout, message):
    q, k, v = qkv(layout, dtype=torch.float32)
    for call in (
        lambda: attention(q, k, v, text, layout.queries, key_layout=layout.key_layout),
        lambda: dense_mask(text, layout),
    ):
        with pytest.raises(ValueError, match=message):
            call()


def test_errors_of_arguments():
    layout, own = Layout((4, 4)), Layout((2, 2), 1)
    q, k, v = qkv(layout.with_keys(own), dtype=torch.float32)
    with pytest.raises(ValueError, match="key_layout=Layout"):
        attention(q, k, v, "dense", layout)
    with pytest.raises(
        ValueError, match=r"grid 2x2 has 4 tokens but k has 5: pass key_layout|Layout\(\(2, 2\), prefix=1\)"
    ):
        attention(q, k, v, "dense", layout, key_layout=Layout((2, 2)))
    with pytest.raises(ValueError, match=r"both must have 2 axes"):
        attention(q, k, v, "dense", layout, key_layout=Layout(5))
    with pytest.raises(ValueError, match=r"key_layout=\(2, 2\) is a tuple: pass a Layout"):
        attention(q, k, v, "dense", layout, key_layout=(2, 2))
    with pytest.raises(ValueError, match=r"key_mask is torch.bool \[1, 16\] but must be torch.bool \[1, 5\]"):
        attention(q, k, v, "dense", layout, key_layout=own, key_mask=torch.ones(1, 16, dtype=torch.bool))
    with pytest.raises(ValueError, match="rpb is given but keys have a layout of their own"):
        attention(q, k, v, "na(window=1)", layout, key_layout=own, rpb=torch.zeros(2, 1, 1))
    with pytest.raises(ValueError, match="rpb is given but an axis is circular"):
        attention(q, q, q, "na(window=3, circular=true)", layout, rpb=torch.zeros(2, 5, 5))
    with pytest.raises(ValueError, match="has a key_layout already"):
        attention(q, k, v, "dense", layout.with_keys(own), key_layout=own)
    with pytest.raises(ValueError, match="causal and circular exclude each other"):
        Neighborhood(3, causal=True, circular=True)


def test_the_rest_of_the_package_knows_the_keys():
    layout, own = Layout((16, 16), 1), Layout((8, 8), 0, 3)
    crossing = layout.with_keys(own)
    q, _, _ = qkv(layout, dtype=torch.float32)
    found = explain("na(window=3)", layout, q, key_layout=own)
    assert found.problem.dense_pairs == 2 * 257 * 67 and "with keys on 8x8, suffix 3" in str(found)
    assert {c.backend.name for c in found.candidates if c.support.ok} == {"sdpa", "tiles", "reference", "flex"} - (
        set() if next(c for c in found.candidates if c.backend.name == "flex").support.ok else {"flex"}
    )
    counted = simulate("na(window=3)", crossing)
    assert counted.density == pytest.approx(dense_mask("na(window=3)", crossing).float().mean().item())
    assert counted.key_layout == "8x8, suffix 3"


@given(st.integers(1, 2**18), st.lists(st.integers(0, 2**18 - 1), max_size=200))
def test_codes_are_ranked_as_numpy_ranks_them(most, drawn):
    codes = np.array(drawn, np.int64) % most
    found, which = ranked(codes, most)
    expected, index = np.unique(codes, return_inverse=True)
    assert np.array_equal(found, expected) and np.array_equal(which, index.ravel())
