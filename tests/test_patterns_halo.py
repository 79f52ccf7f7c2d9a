import pytest
import torch
from cases import layouts, tiles
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import halo, mask_of, visited

from visattn import dense_mask, parse, plan
from visattn.layout import Layout
from visattn.patterns import Halo


@settings(deadline=None, max_examples=50)
@given(data=st.data())
def test_mask_and_plan(data):
    layout = data.draw(layouts())
    block = tuple(data.draw(st.sampled_from([-1, *range(1, n + 2)])) for n in layout.grid)
    reach = tuple(data.draw(st.integers(0, 4)) for _ in layout.grid)
    pattern = Halo(block, reach)
    truth = mask_of(lambda q, k: all(map(halo, q, k, layout.grid, block, reach)), layout)
    assert torch.equal(dense_mask(pattern, layout), truth)
    made = plan(pattern, layout, data.draw(tiles(layout.dims)))
    assert torch.equal(visited(made), truth) and made.visible == truth.sum()
    assert pattern.covers(layout.grid) == bool(truth.all())
    assert str(parse(str(pattern))) == str(pattern)


def test_text():
    assert parse("halo(block=8x8, halo=3)") == Halo((8, 8), 3)
    assert str(Halo((8, 8), 3)) == "halo(block=8x8, halo=3)"


def test_queries_of_a_block_share_a_tile():
    assert Halo(8, 3).tile((64, 64)) == (8, 8)
    assert plan(Halo(8, 0), Layout((64, 64))).full_share == 1.0


@pytest.mark.parametrize(
    ("text", "grid", "message"),
    [
        ("halo(block=0, halo=1)", (8,), r"block=0 must be a whole number of at least 1 or -1"),
        ("halo(block=8, halo=-1)", (8,), r"halo=-1 must be a whole number of at least 0"),
        ("halo(block=8)", (8,), r"halo needs halo, like halo\(halo=...\)"),
        ("halo(block=8x8, halo=1)", (8,), r"block=8x8 has 2 values but the grid has 1 axes"),
        ("halo(block=8, halo=1x1)", (8,), r"halo=1x1 has 2 values but the grid has 1 axes"),
    ],
)
def test_errors(text, grid, message):
    with pytest.raises(ValueError, match=message):
        plan(text, Layout(grid))
