import itertools
import math
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import visattn
from tests.golden.fill import fill_value, make_input
from tests.support.cases import gradients, layouts, qkv, tiles
from tests.support.oracles import dense_attention, grid_tokens, visited
from tests.support.places import GOLDEN
from visattn import dense_mask, parse, plan
from visattn.layout import Layout
from visattn.patterns import Routing, routed_mask

OPERATOR = GOLDEN / "bra_op_autopad.pt"


def regions_of(grid, regions):
    """Region of each token, by its definition: part p of n tokens in r parts is [p n // r, (p + 1) n // r)."""
    parts = [min(r, n) for r, n in zip(regions, grid, strict=True)]
    names = list(itertools.product(*map(range, parts)))
    out = []
    for token in grid_tokens(grid):
        part = [
            next(p for p in range(r) if p * n // r <= i < (p + 1) * n // r)
            for i, n, r in zip(token, grid, parts, strict=True)
        ]
        out.append(names.index(tuple(part)))
    return torch.tensor(out), len(names)


def slow_mask(layout, regions, topk, q, k, key_mask=None):
    """Bi-level routing token by token, among the tokens that the key mask leaves: bool [B, S, S]."""
    region, number = regions_of(layout.grid, regions)
    inner = slice(layout.prefix, layout.prefix + layout.tokens)
    k = k.repeat_interleave(q.shape[2] // k.shape[2], 2)
    mask = torch.ones(len(q), layout.length, layout.length, dtype=torch.bool)
    for b in range(len(q)):
        valid = torch.ones(layout.tokens, dtype=torch.bool) if key_mask is None else key_mask[b, inner]
        hidden = [not valid[region == r].any() for r in range(number)]
        use = [(region == r) & (valid | hidden[r]) for r in range(number)]
        mean_q, mean_k = (
            torch.stack([t[b, inner].detach()[use[r]].mean(0).flatten() for r in range(number)]) for t in (q, k)
        )
        affinity = (mean_q @ mean_k.T).tolist()
        for r in range(number):
            order = sorted(
                (other for other in range(number) if not hidden[other]),
                key=lambda other: (other != r or bool(valid.all()), -affinity[r][other]),
            )
            chosen = [other for other in range(number) if hidden[other]] if topk > len(order) else []
            sees = torch.isin(region, torch.tensor((order + chosen)[:topk]))
            for i in torch.nonzero(region == r)[:, 0]:
                mask[b, layout.prefix + i, inner] = sees
    return mask


def drawn_key_mask(data, layout, batch=2):
    """None, all, random tokens, or the left part of the grid as in a padded batch."""
    kind = data.draw(st.sampled_from(["none", "all", "random", "padded"]))
    if kind == "none":
        return None
    mask = torch.ones(batch, layout.length, dtype=torch.bool)
    if kind == "random":
        mask = torch.rand(batch, layout.length, generator=torch.Generator().manual_seed(5)) < 0.3
    elif kind == "padded":
        inner = mask[:, layout.prefix : layout.prefix + layout.tokens].unflatten(1, layout.grid)
        inner[-1, ..., data.draw(st.integers(1, layout.grid[-1])) :] = False
    return mask


@settings(deadline=None, max_examples=30)
@given(data=st.data())
def test_mask_plan_and_reference(data):
    layout = data.draw(layouts(sides=(16, 7, 4)))
    regions = tuple(data.draw(st.integers(1, n + 1)) for n in layout.grid)
    pattern = Routing(regions, data.draw(st.integers(1, 5)))
    q, k, v = qkv(
        layout, 4, data.draw(st.sampled_from([2, 4])), 5, batch=2, grad=True, seed=data.draw(st.integers(0, 9))
    )
    key_mask, shown = drawn_key_mask(data, layout), True
    truth = slow_mask(layout, regions, pattern.topk, q, k, key_mask)
    found = routed_mask(pattern, layout, q, k, key_mask)
    if key_mask is not None:
        # Among hidden regions it does not matter which are chosen.
        shown = key_mask[:, None]
        assert torch.equal(found & shown, truth & shown) and found[:, :, layout.prefix :].sum(2).min() > 0
        truth = found
    assert torch.equal(found, truth)
    assert pattern.covers(layout.grid) == bool(truth.all())

    out = visattn.attention(q, k, v, pattern, layout, backend="reference", key_mask=key_mask)
    expected = dense_attention(q, k, v, truth & shown, 5**-0.5)
    assert (out - expected).abs().max() < 1e-10
    for ours, theirs in zip(gradients(out, (q, k, v)), gradients(expected, (q, k, v)), strict=True):
        assert (ours - theirs).abs().max() < 1e-10

    made = plan(pattern, layout, data.draw(tiles(layout.dims)))
    routes = pattern.route(q, k, made, key_mask)
    routed = routes.tiles[:, 0]
    assert routes.groups == 1 and routes.counts is None
    assert routed.dtype == torch.int64 and routed.shape == (2, made.queries.runs[1], made.routed_tiles)
    assert not routed.requires_grad
    for b in range(2):
        seen = visited(made)
        for tile, keys in enumerate(routed[b].tolist()):
            assert len(set(keys)) == len(keys) > 0
            rows = made.queries.tokens[made.queries.grid_tiles.start + tile]
            columns = made.keys.tokens[keys].ravel()
            seen[torch.from_numpy(rows[rows >= 0])[:, None], torch.from_numpy(columns[columns >= 0])] = True
        assert torch.equal(seen, truth[b])
    assert str(parse(str(pattern))) == str(pattern)


@settings(deadline=None, max_examples=60)
@given(data=st.data())
def test_tiles_of_regions(data):
    layout = data.draw(layouts(sides=(19, 9, 5)))
    regions = tuple(data.draw(st.integers(1, n + 1)) for n in layout.grid)
    made = plan(Routing(regions, 1), layout, data.draw(tiles(layout.dims, smallest=2)))
    region, number = regions_of(layout.grid, regions)
    slots = made.keys.tokens[made.keys.grid_tiles]
    assert sorted(slots[slots >= 0] - layout.prefix) == list(range(layout.tokens))
    for row in slots:
        assert (row >= 0).any(), "no tile is empty"
        assert len(set(region[row[row >= 0] - layout.prefix].tolist())) == 1, "no tile crosses a region's border"
    assert len(slots) % number == 0


@settings(deadline=None, max_examples=20)
@given(data=st.data())
def test_padding_decides_nothing_and_valid_queries_see_their_region(data):
    layout = data.draw(layouts(sides=(16, 7, 4)))
    regions = tuple(data.draw(st.integers(1, n)) for n in layout.grid)
    pattern = Routing(regions, data.draw(st.integers(1, 3)))
    q, k, v = qkv(layout, 4, 2, 5, batch=2, grad=True)
    key_mask = drawn_key_mask(data, layout)
    shown = torch.ones(2, layout.length, dtype=torch.bool) if key_mask is None else key_mask
    # Padding that would win every choice, or poison every mean.
    loud = [t.detach().masked_fill(~shown[..., None, None], data.draw(st.sampled_from([1e6, -1e6]))) for t in (q, k)]
    backends = ("reference", "sdpa", "tiles")
    outs = [
        visattn.attention(*qk, v, pattern, layout, key_mask=key_mask, backend=b)
        for b in backends
        for qk in ((q, k), loud)
    ]
    for out in outs[1:]:
        assert torch.allclose(out[shown], outs[0][shown], atol=1e-9)
    region, _ = regions_of(layout.grid, regions)
    inner = slice(layout.prefix, layout.prefix + layout.tokens)
    own = routed_mask(pattern, layout, q, k, key_mask)[:, inner, inner]
    same = region[:, None] == region
    for b in range(2):
        valid = shown[b, inner]
        if not valid.all():
            assert own[b][valid][same[valid]].all(), "a valid query sees its own region"
        assert (own[b] & valid)[valid].any(1).all(), "a valid query sees something"
    if key_mask is not None and key_mask.all():
        assert torch.equal(own, routed_mask(pattern, layout, q, k)[:, inner, inner])


def test_text_padding_does_not_change_the_choice():
    layout = Layout((8, 8), suffix=5)
    q, k, _ = qkv(layout, 2, batch=2)
    key_mask = torch.ones(2, layout.length, dtype=torch.bool)
    key_mask[1, -3:] = False
    pattern = Routing(4, 2)
    assert torch.equal(routed_mask(pattern, layout, q, k, key_mask), routed_mask(pattern, layout, q, k))


def test_figures_of_even_regions():
    made = plan("routing(regions=8x8, topk=4)", Layout((64, 64)))
    assert made.queries.shape == (8, 8) and made.flop_bound == made.tile_bound == 16 and made.full_share == 1
    text = plan("routing(regions=8x8, topk=4)", Layout((64, 64), suffix=64))
    assert text.visible == 4096**2 // 16 + 2 * 64 * 4096 + 64**2
    assert len(text.lists.tile) == 64 + 65, "grid tiles statically list the text, text everything"
    big = plan("routing(regions=7x7, topk=4)", Layout((600, 500)))
    assert big.queries.shape == (8, 8) and big.full_share < 1
    assert big.tile_bound > 0.8 * big.flop_bound


def test_choice_is_of_all_heads_together_and_not_differentiated():
    layout = Layout((8, 8))
    q, k, _ = qkv(layout, 2, grad=True)
    made = plan("routing(regions=4, topk=2)", layout)
    flat = [t.flatten(2)[:, :, None] for t in (q, k)]
    pattern = made.pattern
    assert torch.equal(pattern.route(q, k, made).tiles, pattern.route(*flat, made).tiles)


def test_bi_level_routing_of_biformer_with_padding():
    """The original operator pads its input with zeros before the projection, and the padding takes part."""
    case = torch.load(OPERATOR, weights_only=True)
    config = case["config"]
    weights = {name: fill_value(name, tuple(shape)) for name, shape in case["keys"].items()}
    x = make_input(tuple(case["input_shapes"][0]), case["input_seed"])
    height, width = x.shape[1:3]
    n = config["n_win"]
    x = torch.nn.functional.pad(x, (0, 0, 0, -width % n, 0, -height % n))
    grid, channels = tuple(x.shape[1:3]), config["dim"]
    qkv = torch.nn.functional.linear(x, weights["qkv.qkv.weight"], weights["qkv.qkv.bias"]).flatten(1, 2)
    q, k, v = (t.unflatten(2, (config["num_heads"], -1)) for t in qkv.chunk(3, -1))
    out = visattn.attention(q, k, v, Routing(n, config["topk"]), Layout(grid), scale=channels**-0.5)
    lepe = torch.nn.functional.conv2d(
        v.flatten(2).unflatten(1, grid).permute(0, 3, 1, 2),
        weights["lepe.weight"],
        weights["lepe.bias"],
        padding=config["side_dwconv"] // 2,
        groups=channels,
    )
    out = out.flatten(2).unflatten(1, grid) + lepe.permute(0, 2, 3, 1)
    out = torch.nn.functional.linear(out, weights["wo.weight"], weights["wo.bias"])[:, :height, :width]
    assert out.shape == tuple(case["output_shape"])
    assert (out - case["output"]).abs().max() < 1e-5


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("routing(regions=0, topk=1)", r"regions=0 must be a whole number of at least 1"),
        ("routing(regions=7x7, topk=0)", r"topk=0 must be a whole number of at least 1"),
        ("routing(regions=7x7, topk=2x2)", r"topk=\(2, 2\) must be one whole number: a region sees that many regions"),
        ("routing(regions=7x7x7, topk=2)", r"regions=7x7x7 has 3 values but the grid has 2 axes"),
        ("routing(regions=7x7)", r"routing needs topk"),
    ],
)
def test_errors(text, message):
    with pytest.raises(ValueError, match=message):
        plan(text, Layout((8, 8)))


def test_masks_that_need_q_and_k():
    layout = Layout((8, 8))
    q, k, _ = qkv(layout)
    with pytest.raises(
        ValueError, match=r"the mask of routing\(regions=2, topk=1\) depends on q and k: call routed_mask"
    ):
        dense_mask("routing(regions=2, topk=1)", layout)
    with pytest.raises(ValueError, match=r"na\(window=3\) is not routed: call dense_mask\(pattern, layout\)"):
        routed_mask(parse("na(window=3)"), layout, q, k)
    assert math.isclose(float(routed_mask(Routing(2, 1), layout, q, k).float().mean()), 0.25)


MEMORY = """
import resource, sys, torch, visattn
from visattn.layout import Layout
height, width, regions = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
def call(layout, regions):
    q, k, v = (torch.randn(1, layout.length, 1, 16) for _ in range(3))
    before = peak()
    out = visattn.attention(q, k, v, f"routing(regions={regions}, topk=16)", layout, backend="tiles")
    return peak() - before, 4 * out.numel() * out.element_size()
call(Layout((40, 40)), "5x5")
print(*call(Layout((height, width)), regions))
"""


@pytest.mark.parametrize(
    "case", [("300", "250", "30x25"), pytest.param(("600", "500", "60x50"), marks=pytest.mark.slow)], ids="x".join
)
def test_memory_is_linear_and_nothing_is_gathered_topk_fold(case):
    """A gather of k and v for every region would take 8 times q, k, v and out together; a dense mask gigabytes."""
    found = subprocess.run([sys.executable, "-c", MEMORY, *case], capture_output=True, text=True, check=True)
    extra, tensors = map(int, found.stdout.split())
    assert extra < 3 * tensors + 2**24
