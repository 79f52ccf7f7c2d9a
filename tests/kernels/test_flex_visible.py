"""FlexAttention's masks: intervals per axis say the same as the plan's own masks, on every layout."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from visattn import Layout, dense_mask, parse
from visattn.kernels.flex.blocks import tile_plan
from visattn.kernels.flex.visible import Intervals, Listed, _listed, is_product, visible


def shown(seen, tiles):
    """What a mask says of every pair of slots, put back to tokens: [S, S]."""
    i = torch.arange(tiles.queries.tokens.size)[:, None]
    j = torch.arange(tiles.keys.tokens.size)[None]
    slots = seen(i, j)
    queries, keys = (torch.from_numpy(tiling.tokens.ravel()) for tiling in (tiles.queries, tiles.keys))
    assert not slots[queries >= 0][:, keys < 0].any()
    out = torch.zeros(tiles.layout.length, tiles.layout.length, dtype=torch.bool)
    rows, columns = torch.nonzero(queries >= 0)[:, 0], torch.nonzero(keys >= 0)[:, 0]
    out[queries[rows][:, None], keys[columns][None]] = slots[rows][:, columns]
    return out


@st.composite
def neighborhoods(draw):
    """A neighborhood on a grid of one to three axes with text on either side."""
    dims = draw(st.integers(1, 3))
    grid, axes = [], []
    for _ in range(dims):
        length = draw(st.integers(2, 9))
        dilation = draw(st.integers(1, max(1, length // 2)))
        window = draw(st.integers(1, length // dilation))
        axes.append((window, draw(st.integers(1, window)), dilation, draw(st.booleans())))
        grid.append(length)
    words = ["x".join(str(axis[k]) for axis in axes) for k in range(3)]
    causal = f"({','.join(str(axis[3]).lower() for axis in axes)},)"
    text = f"na(window={words[0]},stride={words[1]},dilation={words[2]},causal={causal})"
    return text, Layout(tuple(grid), draw(st.integers(0, 5)), draw(st.integers(0, 5)))


@settings(max_examples=40, deadline=None)
@given(neighborhoods())
def test_intervals_of_neighborhoods_are_their_mask(case):
    text, layout = case
    pattern = parse(text)
    tiles = tile_plan(pattern, layout, 16)
    found = visible(pattern, tiles, torch.device("cpu"))
    assert isinstance(found, Intervals)
    expected = dense_mask(pattern, layout)
    assert torch.equal(shown(found, tiles), expected)


@pytest.mark.parametrize("text", ["halo(block=4x4, halo=1)", "na(window=5x5)", "na(window=3x3,dilation=2)"])
def test_intervals_say_what_tables_say(text):
    pattern, layout = parse(text), Layout((9, 11), 3, 2)
    tiles = tile_plan(pattern, layout, 16)
    device = torch.device("cpu")
    assert is_product(pattern)
    # Tables speak of tiles that are listed alone.
    assert torch.equal(shown(visible(pattern, tiles, device), tiles), shown(_listed(tiles, device), tiles))


def test_what_is_no_product_stays_a_table():
    pattern = parse("clear(radius=3)")
    assert not is_product(pattern)
    tiles = tile_plan(pattern, Layout((8, 8)), 16)
    assert isinstance(visible(pattern, tiles, torch.device("cpu")), Listed)
