"""The pictures are drawn from states that equal the dense mask; the drawing is checked pixel by pixel in places."""

import numpy as np
import pytest
import torch
from PIL import Image

from visattn import Layout, dense_mask, parse, plan
from visattn.canvas import column, row, text
from visattn.patterns import routed_mask
from visattn.plans import with_routes
from visattn.show import COLORS, FULL, PARTIAL, QUERY, SKIPPED, WASTED, _note, draw, query_view, tile_map

CASES = [
    ("na(window=5x7)", Layout((12, 9)), None),
    ("na(window=6x6, stride=3x2)", Layout((13, 10), prefix=2, suffix=5), (4, 4)),
    ("na(window=3x3, dilation=2)", Layout((9, 8), suffix=3), None),
    ("na(window=3x5x5)", Layout((4, 6, 7)), ((2, 2, 2), (1, 4, 4))),
    ("na(window=7, causal=true)", Layout(50), (8,)),
    ("dense", Layout((5, 6), prefix=1), None),
]


@pytest.mark.parametrize(("pattern", "layout", "tile"), CASES)
def test_query_view_is_a_row_of_the_mask(pattern, layout, tile):
    truth = dense_mask(pattern, layout).numpy()
    made = plan(pattern, layout, tile)
    for token in range(layout.length):
        state = query_view(made, token)
        assert (np.isin(state, (PARTIAL, FULL)) == truth[token]).all()
        assert set(np.unique(state)) <= {SKIPPED, WASTED, PARTIAL, FULL}


@pytest.mark.parametrize(("pattern", "layout", "tile"), CASES)
@pytest.mark.parametrize("shrink", [1, 2, 3])
def test_tile_map_counts_every_pair_of_tiles_once(pattern, layout, tile, shrink):
    made = plan(pattern, layout, tile)
    fine = tile_map(made)
    lists = made.lists
    assert fine[..., 2].sum() == (lists.mask < 0).sum()
    assert fine[..., 1].sum() == (lists.mask >= 0).sum()
    assert (fine[lists.rows, lists.tile, 0] == 0).all()
    coarse = tile_map(made, shrink)
    block = fine[:shrink, :shrink].mean((0, 1))
    np.testing.assert_allclose(coarse[0, 0], block, atol=1e-12)
    block = fine[(len(coarse) - 1) * shrink :, (coarse.shape[1] - 1) * shrink :].mean((0, 1))
    np.testing.assert_allclose(coarse[-1, -1], block, atol=1e-12)


@pytest.mark.parametrize(("pattern", "layout", "tile"), CASES)
def test_picture_has_the_query_and_the_colours_of_its_states(pattern, layout, tile):
    picture = np.asarray(draw(pattern, layout, tile=tile))
    for state in (QUERY, FULL, PARTIAL):
        used = state == QUERY or (query_view(plan(pattern, layout, tile), layout.prefix) == state).any()
        assert not used or (picture == COLORS[state]).all(-1).any()


def test_the_query_stands_where_it_was_asked_for():
    grid = (16, 16)
    left, right = (np.asarray(draw("na(window=3x3)", Layout(grid), query=q)) for q in ((8, 1), (8, 14)))
    columns = [np.nonzero((p == COLORS[QUERY]).all(-1)[: p.shape[0] // 2 + 40])[1].max() for p in (left, right)]
    assert columns[1] - columns[0] == 13 * 28


def test_a_small_cell_still_shows_the_query():
    picture = np.asarray(draw("na(window=18x24x24, stride=16x8x8)", Layout((30, 48, 80))))
    legend = 16 * 16
    assert (picture == COLORS[QUERY]).all(-1).sum() >= legend + 25


@pytest.mark.parametrize("query", [(16, 0), (0,), (0, 0, 0)])
def test_a_query_off_the_grid_is_refused(query):
    with pytest.raises(ValueError, match=r"is not on grid 16x16: pass 2 indices up to 15,15"):
        draw("dense", Layout((16, 16)), query=query)


def test_canvas_puts_pictures_side_by_side_and_wraps():
    square = Image.new("RGB", (10, 10))
    assert row([square, square], gap=2).size == (22, 10)
    assert row([square] * 5, gap=2, wrap=36).size == (34, 22)
    assert column([square, square], gap=3, margin=1).size == (12, 25)
    assert text("one\ntwo").height == 2 * text("one").height


def test_routed_patterns_show_the_tiles_that_some_q_and_k_choose():
    pattern, layout = parse("routing(regions=3x4, topk=2)"), Layout((14, 13), prefix=3, suffix=2)
    q, k = torch.randn(2, 1, layout.length, 2, 8)
    made = plan(pattern, layout)
    fixed = with_routes(made, pattern.route(q, k, made))
    truth = routed_mask(pattern, layout, q, k)[0].numpy()
    for token in range(layout.length):
        assert (np.isin(query_view(fixed, token), (PARTIAL, FULL)) == truth[token]).all()
    assert fixed.entries == made.entries
    assert draw(pattern, layout).width > 512


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("topk(keep=0.2, rest=mean)", "the mean of each block that is not seen takes part too, by rest=mean"),
        ("topk(keep=0.2, rest=linear)", "what is not seen takes part too, by rest=linear"),
        ("topk(keep=0.2)", "seed 0)"),
        ("residual(of=na(window=9x9))", "are of na(window=9x9) alone; one step in 4 computes anew for the others"),
        ("na(window=9x9)", ""),
    ],
)
def test_what_the_picture_does_not_show_is_said(name, said):
    pattern = parse(name)
    assert _note(pattern, getattr(pattern, "of", pattern)).endswith(said)


def test_agents_are_drawn_as_the_cells_they_pool():
    picture = np.asarray(draw("agent(agents=4x2)", Layout((16, 16), prefix=1)))
    blue = (picture == np.array(COLORS[FULL])).all(-1)
    assert 0.2 < blue.mean() < 0.5


def test_a_pattern_that_is_no_list_of_tiles_is_refused():
    with pytest.raises(ValueError, match="agentsd"):
        draw("agentsd", Layout((16, 16)))


def test_pooled_keys_have_a_bar_of_their_own():
    pattern, layout = "clear(radius=3, pool=4)", Layout((16, 16))
    truth = dense_mask(pattern, layout).numpy()
    state = query_view(plan(pattern, layout), 40)
    assert (np.isin(state, (PARTIAL, FULL)) == truth[40]).all()
    assert (state[layout.length :] == FULL).any() or (state[layout.length :] == PARTIAL).any()
    assert not np.array_equal(np.asarray(draw(pattern, layout)), np.asarray(draw("clear(radius=3)", layout)))
