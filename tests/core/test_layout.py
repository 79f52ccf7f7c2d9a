import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from visattn.layout import Layout
from visattn.tiling import AxisTiles, Tiling, box_shape


def test_counts_and_text():
    layout = Layout((3, 4), prefix=2, suffix=5)
    assert (layout.dims, layout.tokens, layout.length) == (2, 12, 19)
    assert str(layout) == "3x4, prefix 2, suffix 5"
    assert Layout(7).grid == (7,) and Layout([2, 3, 4]).grid == (2, 3, 4)
    assert Layout((3, 4)) == Layout([3, 4]) and hash(Layout((3, 4))) == hash(Layout([3, 4]))


@pytest.mark.parametrize("grid", [(), (0, 3), (2, 3, 4, 5), (2.5, 3), -1])
def test_bad_grid(grid):
    with pytest.raises(ValueError, match=r"must be 1 to 3 whole numbers of at least 1"):
        Layout(grid)


@pytest.mark.parametrize("counts", [(-1, 0), (0, -2), (0.5, 0)])
def test_bad_dense_tokens(counts):
    with pytest.raises(ValueError, match=r"prefix .* and suffix .* must be whole numbers of at least 0"):
        Layout((2, 2), *counts)


@pytest.mark.parametrize(
    ("layout", "length", "fix"),
    [
        (Layout((64, 63), prefix=1), 4096, r"prefix 1 \+ grid 64x63 has 4033 tokens but q has 4096: pass"),
        (Layout((64, 63)), 4096, r"Layout\(\(64, 63\), prefix=64\) or suffix=64"),
        (Layout((32, 32)), 4096, r"pass layout=Layout\(\(64, 64\)\)"),
        (Layout((32, 32), suffix=7), 4103, r"pass layout=Layout\(\(64, 64\), suffix=7\)"),
        (Layout((4, 8, 8)), 256 + 8 * 4 * 400, r"pass layout=Layout\(\(4, 8, 408\)\)"),
        (Layout((4, 7)), 5, r"a grid whose sides multiply to 5"),
        (Layout((4, 7), prefix=9), 5, r"a shorter prefix and suffix"),
    ],
)
def test_wrong_length_says_what_fits(layout, length, fix):
    layout.check_length(layout.length)
    with pytest.raises(ValueError, match=fix):
        layout.check_length(length)


axes = st.integers(1, 11)


@settings(deadline=None, max_examples=60)
@given(length=axes, size=st.integers(1, 5), step=st.integers(1, 4))
def test_axis_tiles_hold_neighbours_of_one_group(length, size, step):
    axis = AxisTiles(length, size, step)
    slots = axis.tokens[axis.tokens >= 0]
    assert sorted(slots) == list(range(length))
    for tile in range(axis.tiles):
        tokens = axis.tokens[tile][axis.tokens[tile] >= 0]
        assert len(tokens) == axis.count[tile] > 0
        assert (np.diff(tokens) == step).all() and (tokens % step == axis.group[tile]).all()
        assert tokens[0] // step == axis.first[tile]


@settings(deadline=None, max_examples=60)
@given(
    grid=st.lists(st.integers(1, 6), min_size=1, max_size=3),
    prefix=st.integers(0, 9),
    suffix=st.integers(0, 9),
    extra=st.integers(0, 9),
    data=st.data(),
)
def test_every_token_has_one_slot(grid, prefix, suffix, extra, data):
    layout = Layout(grid, prefix, suffix)
    shape = tuple(data.draw(st.integers(1, 4)) for _ in grid)
    tiling = Tiling(layout, shape, tuple(data.draw(st.integers(1, 3)) for _ in grid), extra)
    tokens = tiling.tokens
    assert tokens.shape == (tiling.tiles, tiling.capacity)
    assert sorted(tokens[tokens >= 0]) == list(range(tiling.length))
    inner = tokens[tiling.grid_tiles]
    inner = inner[inner >= 0]
    assert len(inner) == layout.tokens and (inner >= prefix).all() and (inner < prefix + layout.tokens).all()
    assert (tiling.sizes == (tokens >= 0).sum(1)).all() and (tiling.sizes > 0).all()
    for row in tokens:
        assert (np.diff(row[row >= 0]) > 0).all(), "a box keeps row-major order"


def test_tile_of_other_dims_is_refused():
    with pytest.raises(ValueError, match=r"tile \(4,\) does not fit grid \(8, 8\): pass 2 sizes of at least 1"):
        Tiling(Layout((8, 8)), (4,))


def test_box_shape_is_cube_like_and_wastes_no_short_axis():
    assert box_shape((64, 64), 64) == (8, 8)
    assert box_shape((8, 32, 32), 64) == (4, 4, 4)
    assert box_shape((1, 64, 64), 64) == (1, 8, 8)
    assert box_shape((3, 64), 64) == (4, 16)
    assert box_shape((5,), 16) == (16,)


@pytest.mark.parametrize("grid", [2**31, (4, 10**30), b"x", (4, b"x"), "8", bytearray(b"xy")])
def test_grids_that_nothing_counts_are_refused(grid):
    with pytest.raises(ValueError, match=r"must be 1 to 3 whole numbers of at least 1 \(and at most 2147483647\)"):
        Layout(grid)
    with pytest.raises(ValueError, match=r"must be whole numbers of at least 0 \(and at most 2147483647\)"):
        Layout((4, 4), prefix=2**31)


def test_a_tensor_of_one_number_is_a_grid_of_one_axis():
    assert Layout(torch.tensor(4)) == Layout(np.array(4)) == Layout(4)
