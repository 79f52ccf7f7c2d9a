"""Groups of tokens that are spread over the grid: their definition, the authors' arrangement, and what is refused."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.cases import layouts, qkv, tiles
from tests.support.oracles import dense_attention, mask_of, visited
from visattn import attention, dense_mask, parse, plan
from visattn.layout import Layout
from visattn.patterns import Groups, Neighborhood


@settings(deadline=None, max_examples=30)
@given(data=st.data())
def test_mask_and_plan(data):
    layout = data.draw(layouts())
    count = tuple(data.draw(st.integers(1, n + 2)) for n in layout.grid)
    pattern = Groups(count)
    truth = mask_of(lambda q, k: all((i - j) % n == 0 for i, j, n in zip(q, k, count, strict=True)), layout)
    assert torch.equal(dense_mask(pattern, layout), truth)
    made = plan(pattern, layout, data.draw(tiles(layout.dims)))
    assert torch.equal(visited(made), truth) and made.visible == truth.sum()
    # One token has one group, whatever is asked for.
    assert pattern.covers(layout.grid) == all(n == 1 or c == 1 for n, c in zip(layout.grid, count, strict=True))


def test_the_authors_arrangement_of_views():
    """Attention in groups of 2 x 2 tokens of every view, 7 x 7 groups of 14 x 14, as they rearrange tokens."""
    layout = Layout((3, 14, 14))
    q, k, v = qkv(layout, 2)

    def grouped(x):
        return x.unflatten(1, (3, 2, 7, 2, 7)).permute(0, 3, 5, 1, 2, 4, 6, 7).reshape(-1, 12, *x.shape[2:])

    own = dense_attention(*map(grouped, (q, k, v)), torch.ones(12, 12, dtype=torch.bool), q.shape[3] ** -0.5)
    out = own.unflatten(1, (3, 2, 2)).unflatten(0, (-1, 7, 7)).permute(0, 3, 4, 1, 5, 2, 6, 7).flatten(1, 5)
    assert (attention(q, k, v, "groups(1x7x7)", layout) - out).abs().max() < 1e-12
    # Where groups are of one size it is a dilated window.
    assert torch.equal(dense_mask("groups(1x7x7)", layout), dense_mask("na(window=-1x2x2, dilation=1x7x7)", layout))


def test_tiles_hold_members_of_a_group():
    assert Groups(7).tile((56, 56)) == Neighborhood(8, dilation=7).tile((56, 56)) == (8, 8)
    assert plan(Groups(7), Layout((56, 56))).full_share == 1.0
    assert plan(Groups(7), Layout((56, 56))).density == pytest.approx(1 / 49)
    assert Groups((1, 9)).covers((5, 1)) and not Groups((1, 9)).covers((5, 2))


def test_text_and_refusals():
    assert parse("groups(7x7)") == Groups((7, 7)) and str(Groups(7)) == "groups(count=7)"
    for text, message in (
        ("groups(0)", "count=0 must be a whole number of at least 1"),
        ("groups", "groups needs count"),
        ("groups(7x7)", "count=7x7 has 2 values but the grid has 3 axes"),
    ):
        with pytest.raises(ValueError, match=message):
            plan(text, Layout((8, 8, 8)))
    layout = Layout((4, 4), key_layout=Layout((2, 2)))
    q, k, v = torch.zeros(1, 16, 1, 8), *torch.zeros(2, 1, 4, 1, 8)
    with pytest.raises(ValueError, match="has no meaning for queries and keys on different grids"):
        attention(q, k, v, "groups(2)", layout)
