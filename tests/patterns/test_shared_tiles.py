"""Query blocks of a few tokens, single ones even: they choose for themselves and share tiles."""

import math
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.golden.fill import make_input
from tests.support.cases import gradients, layouts, qkv
from visattn import Layout, attention, parse
from visattn.kernels.tiles.backend import SHARING, _routed_plan
from visattn.patterns import routed_mask
from visattn.patterns.choice.blocks import inner
from visattn.patterns.choice.merging import BITS, merge, merged_box
from visattn.patterns.shared_tiles import sharing_tiles

GOLDEN = torch.load(Path(__file__).parents[1] / "golden" / "dynamic_tokens.pt", weights_only=True)


@pytest.mark.parametrize("case", GOLDEN, ids=lambda case: case["pattern"])
def test_tokens_that_choose_are_those_of_vmoba(case):
    batch, length, heads, dim = case["shape"]
    found = []
    for i in range(3):
        levels = make_input((batch, -(-length // case["run"]), heads, dim), 10 * case["seed"] + 5 + i)
        noise = make_input((batch, length, heads, dim), 10 * case["seed"] + i)
        found.append(noise + levels.repeat_interleave(case["run"], 1)[:, :length])
    q, k, v = found
    pattern, layout = parse(case["pattern"]), Layout(tuple(case["grid"]))
    blocks = pattern.blocks(layout.grid)
    density = pattern.choose(q, k, layout).mask(0, blocks.columns).double().mean()
    assert density.item() == pytest.approx(case["density"], abs=1e-6)
    assert sharing_tiles(pattern, layout, SHARING) is not None
    for backend in ("reference", "tiles"):
        out = attention(q, k, v, pattern, layout, backend=backend)
        own = out.flatten()[:: case["stride"]]
        assert (own - case["values"]).abs().max() < 1e-4 * case["values"].std()


@st.composite
def small_blocks(draw, grid):
    """A pattern whose blocks of queries have a few tokens."""
    if draw(st.booleans()):
        block = f"{draw(st.integers(1, 3))}, key_block={draw(st.integers(1, 20))}"
    else:
        sides = [draw(st.integers(1, 2 if len(grid) > 1 else 4)) for _ in grid]
        keys = [draw(st.integers(1, 4)) for _ in grid]
        block, key_block = ("x".join(map(str, box)) for box in (sides, keys))
        block = f"{block}, key_block={key_block}" if len(grid) > 1 else f"{sides[0]}, key_block={keys[0]}"
    rules = ["topk(keep=0.3", "topp(p=0.5", "above(tau=0.4", "topp(p=0.3, of=height", "topk(keep=0.4, share=2"]
    rule = draw(st.sampled_from([*rules, "topp(p=0.3, of=height, per=head", "topp(p=0.2, of=height, per=all"]))
    pattern = parse(f"{rule}, block={block})")
    try:
        pattern.check(grid)
    except ValueError:
        pattern = parse(f"above(tau=0.3, block={block})")
    return pattern


@settings(deadline=None, max_examples=16)
@given(data=st.data(), layout=layouts(sides=(40, 9, 5)))
def test_words_say_which_block_of_a_tile_lists_what(data, layout):
    pattern = data.draw(small_blocks(layout.grid))
    shared, blocks = sharing_tiles(pattern, layout, SHARING), pattern.blocks(layout.grid)
    box = merged_box(blocks, SHARING)
    if shared is None:
        assert box is None
        return
    assert math.prod(box) <= BITS and all(a % b == 0 for a, b in zip(box, blocks.queries, strict=True))
    q, k, _ = qkv(layout, 4, 2, 6, batch=2)
    made = _routed_plan(pattern, layout)
    found = merge(pattern.choose(q, k, layout), made, blocks)
    listed = found.routes.listed()
    seen = torch.zeros(2, found.routes.groups, layout.length, layout.length, dtype=torch.bool)
    queries = made.queries.tokens[made.queries.grid_tiles]
    for tile, tokens in enumerate(queries):
        for slot, token in enumerate(tokens):
            if token >= 0:
                own = ((found.words[:, :, tile] >> found.slots[slot]) & 1).bool() & listed[:, :, tile]
                for sample, group, entry in own.nonzero().tolist():
                    keys = made.keys.tokens[found.routes.tiles[sample, group, tile, entry]]
                    seen[sample, group, token, keys[keys >= 0]] = True
    at = inner(layout)
    assert torch.equal(
        seen[:, :, at, at].expand(-1, 4, -1, -1), pattern.routed_grid_mask(q, k, layout).expand(-1, 4, -1, -1)
    )
    assert not found.words.masked_fill(~listed, 1).eq(0).any(), "what is visited is listed by some block"


@settings(deadline=None, max_examples=6)
@given(data=st.data(), layout=layouts(sides=(40, 9, 5)), kv_heads=st.sampled_from([1, 2, 4]), masked=st.booleans())
def test_rows_of_shared_tiles_equal_masked_dense_attention(data, layout, kv_heads, masked):
    pattern = data.draw(small_blocks(layout.grid))
    q, k, v = qkv(layout, 4, kv_heads, 6, batch=2, grad=True)
    key_mask = None
    if masked:
        key_mask = torch.rand(2, layout.length, generator=torch.Generator().manual_seed(5)) < 0.6
    seen = routed_mask(pattern, layout, q, k, key_mask)
    seen = seen if key_mask is None else seen & key_mask[:, None, None]
    empty = ~seen.any(-1, keepdim=True)
    keys, values = (t.repeat_interleave(4 // kv_heads, 2) for t in (k, v))
    scores = (torch.einsum("bqhd,bkhd->bhqk", q, keys) * 6**-0.5).masked_fill(~(seen | empty), float("-inf"))
    expected = torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1).masked_fill(empty, 0), values)
    out = attention(q, k, v, pattern, layout, key_mask=key_mask, backend="tiles")
    assert (out - expected).abs().max() < 1e-10
    wanted = torch.autograd.grad(expected.square().sum(), (q, k, v), create_graph=True)
    found = torch.autograd.grad(out.square().sum(), (q, k, v), create_graph=True)
    for a, b in zip(found, wanted, strict=True):
        assert (a - b).abs().max() < 1e-10
    again = [gradients(sum(t.square().sum() for t in grads), (q, k, v)) for grads in (found, wanted)]
    for a, b in zip(*again, strict=True):
        assert (a - b).abs().max() < 1e-8 * max(1.0, b.abs().max().item())


def test_blocks_that_fill_a_tile_have_it_alone():
    for text in ("topk(keep=2, block=4x8)", "topk(keep=2, block=1x1, rest=mean)", "topk(keep=2, block=1x1, skip=0.1)"):
        assert sharing_tiles(parse(text), Layout((16, 16)), SHARING) is None
    assert sharing_tiles(parse("na(window=3x3)"), Layout((16, 16)), SHARING) is None
    shared = sharing_tiles(parse("topk(keep=2, block=1x1, key_block=4x4)"), Layout((16, 16), 3), SHARING)
    assert (shared.block, shared.key_block, shared.most) == ((8, 8), (4, 4), 16)
    # A tile expects more than one of its blocks does, and no more than all.
    assert 2 / 16 < shared.part <= 1


def test_plans_that_equal_patterns_share_are_not_those_of_shared_tiles():
    """A plan is kept for all patterns that are equal, so that it may have another object than the call."""
    layout, text = Layout(70), "topk(keep=2, block=16, rest=mean)"
    q, k, v = qkv(layout, 2, dim=8)
    first = attention(q, k, v, text, layout, backend="tiles")
    equal = type(parse(text))(keep=2, block=16, rest="mean")
    assert torch.equal(attention(q, k, v, equal, layout, backend="tiles"), first)
    assert (attention(q, k, v, equal, layout, backend="reference") - first).abs().max() < 1e-10
