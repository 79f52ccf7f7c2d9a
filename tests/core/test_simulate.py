"""Counts against the dense mask, and advice against the definition of a fully block-sparse pattern."""

import json

import pytest

from visattn import Layout, dense_mask, parse, plan
from visattn.simulate import advise, simulate

CASES = [
    ("na(window=5x7)", Layout((12, 9))),
    ("na(window=6x6, stride=3x2)", Layout((13, 10), prefix=2, suffix=5)),
    ("na(window=3x3, dilation=2)", Layout((9, 8), suffix=3)),
    ("na(window=3x5x5, causal=1x0x0)", Layout((4, 6, 7))),
    ("dense", Layout((5, 6), prefix=1)),
    ("clear(radius=3, pool=2)", Layout((8, 9), suffix=2)),
    ("radial(decay=0.5, block=16)", Layout((4, 4, 8), suffix=3)),
]


@pytest.mark.parametrize(("pattern", "layout"), CASES)
def test_counts_are_those_of_the_dense_mask(pattern, layout):
    truth = dense_mask(pattern, layout)
    result = simulate(pattern, layout)
    # Pooled keys are work too, so counts are against the pairs of dense attention, which has none.
    visible, dense = truth.sum().item(), layout.length**2
    assert result.density == pytest.approx(visible / dense)
    assert result.flop_bound == pytest.approx(dense / visible)
    assert result.tile_bound <= result.flop_bound
    assert result.planning_seconds > 0
    json.dumps(result.to_dict())


def test_tile_counts_are_those_of_blocks_of_the_mask():
    layout = Layout((16, 16))
    result = simulate("na(window=5x5)", layout, (4, 4))
    blocks = dense_mask("na(window=5x5)", layout).view(4, 4, 4, 4, 4, 4, 4, 4)
    blocks = blocks.permute(0, 2, 4, 6, 1, 3, 5, 7).reshape(16, 16, 16, 16)
    touched, full = blocks.any(-1).any(-1), blocks.all(-1).all(-1)
    assert result.visited == touched.sum()
    assert result.full_share == pytest.approx((full.sum() / touched.sum()).item())
    assert result.tile_bound == pytest.approx(256 / touched.sum().item())
    assert (result.query_tiles, result.key_tiles, result.query_tile) == (16, 16, (4, 4))


@pytest.mark.parametrize(
    ("pattern", "layout"),
    [
        ("na(window=16x16)", Layout((64, 64))),
        ("na(window=16x16, stride=8x8)", Layout((64, 64))),
        ("na(window=24x24)", Layout((64, 96))),
        ("na(window=18x24x24, stride=16x8x8)", Layout((30, 48, 80))),
        ("na(window=-1x12)", Layout((16, 48))),
        ("na(window=4x4, dilation=2)", Layout((32, 32))),
    ],
)
def test_advice_keeps_the_window_and_needs_no_mask(pattern, layout):
    advice = advise(pattern, layout)
    assert advice.better
    assert not advice.reason
    for choice in advice.better:
        made = plan(choice.pattern, layout, (choice.query_tile, choice.key_tile))
        assert (made.lists.mask < 0).all()
        assert choice.full_share == 1
        assert choice.density == pytest.approx(advice.now.density)
        waste = made.queries.tiles * made.queries.capacity / made.queries.length  # short query tiles
        assert choice.tile_bound * waste == pytest.approx(choice.flop_bound)
        assert choice.tile_bound >= advice.now.tile_bound
    json.dumps(advice.to_dict())


def test_advice_keeps_a_stride_that_works():
    best = advise("na(window=16x16, stride=8x8)", Layout((64, 64))).better[0]
    assert best.pattern == str(parse("na(window=16x16, stride=8x8)")) == "na(window=16x16, stride=8)"
    assert (best.query_tile, best.key_tile) == ((8, 8), (4, 4))


def test_advice_names_the_nearest_window_where_no_tile_fits():
    advice = advise("na(window=15x15)", Layout((64, 64)))
    assert "no tile fits this window" in advice.reason
    assert "up to 1 away" in advice.reason
    assert all(choice.full_share == 1 for choice in advice.better)


def test_advice_counts_text_tokens():
    advice = advise("na(window=16x16)", Layout((32, 32), suffix=64))
    assert advice.better[0].suffix == 64
    assert advice.better[0].density > advise("na(window=16x16)", Layout((32, 32))).better[0].density


def test_no_advice_says_why():
    assert "axis 0 is causal" in advise("na(window=8x8, causal=1x0)", Layout((32, 32))).reason
    none = advise("na(window=5x5)", Layout((31, 31)), reach=1)
    assert not none.better
    assert "no window within 1 of this one is fully block-sparse" in none.reason
    with pytest.raises(ValueError, match=r"only na\(\.\.\.\) has a stride to advise on; dense has none"):
        advise("dense", Layout((8, 8)))
