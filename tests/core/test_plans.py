import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.cases import layouts, tiles
from tests.support.oracles import mask_of, neighborhood, visited
from visattn import plan
from visattn.layout import Layout
from visattn.patterns import Dense, Neighborhood, dense_mask


@st.composite
def neighborhoods(draw, grid):
    axes = []
    for n in grid:
        dilation = draw(st.integers(1, max(1, n // 2)))
        whole = [-1, n + 3] if dilation == 1 else []
        window = draw(st.sampled_from([*range(1, n // dilation + 1), *whole]))
        stride = draw(st.integers(1, n if window == -1 else window))
        axes.append((window, stride, dilation, draw(st.booleans())))
    return Neighborhood(*zip(*axes, strict=True))


@settings(deadline=None, max_examples=80)
@given(data=st.data())
def test_neighborhood_mask_and_plan(data):
    layout = data.draw(layouts())
    pattern = data.draw(neighborhoods(layout.grid))
    values = (pattern.window, pattern.stride, pattern.dilation, pattern.causal)
    axes = list(zip(*(v if isinstance(v, tuple) else (v,) * layout.dims for v in values), strict=True))
    truth = mask_of(
        lambda q, k: all(neighborhood(i, j, n, *axis) for i, j, n, axis in zip(q, k, layout.grid, axes, strict=True)),
        layout,
    )
    assert torch.equal(dense_mask(pattern, layout), truth)
    made = plan(pattern, layout, data.draw(tiles(layout.dims)))
    assert torch.equal(visited(made), truth)
    assert made.visible == truth.sum()
    assert pattern.covers(layout.grid) == bool(truth.all()) or not pattern.covers(layout.grid)


@settings(deadline=None, max_examples=40)
@given(data=st.data())
def test_dense_plan(data):
    layout = data.draw(layouts())
    made = plan(Dense(), layout, data.draw(tiles(layout.dims)))
    assert visited(made).all() and dense_mask("dense", layout).all()
    assert made.density == 1 and made.flop_bound == 1 and made.tile_bound <= 1


@settings(deadline=None, max_examples=30)
@given(data=st.data())
def test_transposed_lists_hold_the_same_visits(data):
    layout = data.draw(layouts())
    made = plan(data.draw(neighborhoods(layout.grid)), layout)
    forward = set(zip(made.lists.rows.tolist(), made.lists.tile.tolist(), made.lists.mask.tolist(), strict=True))
    back = made.transposed
    assert len(back.start) == made.keys.tiles + 1
    assert {(q, k, m) for k, q, m in zip(back.rows.tolist(), back.tile.tolist(), back.mask.tolist(), strict=True)} == (
        forward
    )
    for lists in (made.lists, back):
        for a, b in zip(lists.start[:-1], lists.start[1:], strict=True):
            assert (np.diff(lists.mask[a:b] >= 0) >= 0).all(), "fully visible tiles come first"
    full, partial = made.lists.where(partial=False), made.lists.where(partial=True)
    assert len(full.tile) + len(partial.tile) == made.entries
    assert (full.mask == -1).all() and (partial.mask >= 0).all()


def test_figures_of_a_blocked_plan():
    made = plan(Neighborhood(8, stride=8), Layout((64, 64)))
    assert made.flop_bound == made.tile_bound == 64 and made.full_share == 1.0
    assert made.entries == 64


def test_masks_are_few_on_big_grids():
    made = plan("na(window=15x15)", Layout((128, 128)))
    assert len(made.masks) < 400 and made.queries.tiles == 256


def test_plans_are_cached_and_turned_once():
    made = plan("na(window=5)", Layout((12, 12), suffix=3))
    assert made is plan(Neighborhood(5), Layout((12, 12), suffix=3)) and made.transposed is made.transposed


@pytest.mark.parametrize(
    ("pattern", "grid", "message"),
    [
        (
            "na(window=5, dilation=3)",
            (9,),
            r"window 5 \* dilation 3 = 15 is larger than axis 0 of grid 9 \(9\).* at most 1",
        ),
        ("na(window=3x3)", (9,), r"window=3x3 has 2 values but the grid has 1 axis: give 1 value"),
    ],
)
def test_patterns_that_do_not_fit_a_grid(pattern, grid, message):
    for call in (plan, dense_mask):
        with pytest.raises(ValueError, match=message):
            call(pattern, Layout(grid))


@pytest.mark.parametrize("tile", [(8,), (0, 8), "8x8", (8, 8.5)])
def test_bad_tile(tile):
    with pytest.raises(ValueError, match=r"tile=.* does not fit grid \(16, 16\): pass 2 whole numbers of at least 1"):
        plan("na(window=3)", Layout((16, 16)), tile)


def test_a_plan_prints_as_a_line():
    made = plan("na(window=9x9)", Layout((32, 32), prefix=3))
    assert repr(made) == (
        "TilePlan(na(window=9x9) on 32x32, prefix 3: "
        f"{made.entries} of 17 x 17 pairs of tiles of 8x8, {len(made.masks)} masks, density {made.density:.3g})"
    )
    assert "tiles of 4x8:8x4, " in repr(plan("na(window=9x9)", Layout((32, 32)), ((4, 8), (8, 4))))
