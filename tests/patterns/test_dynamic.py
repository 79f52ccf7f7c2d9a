"""Patterns that list blocks by their content: the choices of the published methods, and what any choice must hold."""

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.golden.fill import make_input
from tests.support.cases import gradients, layouts, qkv
from tests.support.oracles import dense_attention
from visattn import Layout, attention, attention_rows, dense_mask, parse, plan, tile_choice
from visattn.patterns import PATTERNS, DynamicPattern, Gate, HeadsPattern, OrderedPattern, routed_mask
from visattn.patterns.choice.blocks import inner, token_blocks
from visattn.patterns.choice.picks import Seen, pick_number_of_all
from visattn.patterns.choice.scores import Score, block_scores

GOLDEN = torch.load(Path(__file__).parents[1] / "golden" / "dynamic_choices.pt", weights_only=True)


def golden_inputs(case):
    """Noise plus a level that changes every `run` tokens; tokens that come block by block in the order of the grid."""
    batch, length, heads, dim = case["shape"]
    run = case.get("run", 64)
    found = []
    for i in range(3):
        noise = make_input((batch, length, heads, dim), 10 * case["seed"] + i)
        levels = make_input((batch, -(-length // run), heads, dim), 10 * case["seed"] + 5 + i)
        x = noise + case.get("level", 1.0) * levels.repeat_interleave(run, 1)[:, :length]
        found.append(_boxes(x, case, back=False) if "blocks" in case else x)
    return found


def _boxes(x, case, back):
    """Blocks of 1x8x8 one after another as a grid, or back."""
    t, h, w = case["blocks"]
    sides = (t, h, 8, w, 8) if back else (t, h, w, 8, 8)
    order = (0, 1, 2, 4, 3, 5, 6, 7)
    return x.unflatten(1, sides).permute(order).reshape(x.shape)


@pytest.mark.parametrize("case", GOLDEN, ids=lambda case: f"{case['method']}: {case['pattern']}")
def test_lists_what_the_published_method_lists(case):
    pattern, layout = parse(case["pattern"]), Layout(tuple(case["grid"]))
    q, k, v = golden_inputs(case)
    blocks = pattern.blocks(layout.grid)
    chosen = pattern.choose(q, k, layout).mask(0, blocks.columns)
    if case["method"] == "draft":
        # Its bar is inclusive: one pair more than a share of 0.2 of all, which leaves out what ranks last.
        assert (case["mask"] | ~chosen).all()
        assert (case["mask"].sum((2, 3)) == chosen.sum((2, 3)) + 1).all()
        seen, some = block_scores(Score("mean"), q, k, blocks, None, q.shape[3] ** -0.5)
        chosen = pick_number_of_all(next(some).scores, seen, None, int(case["mask"][0, 0].sum()))
    # There the last block is filled up with zeros, which are queries that skip nothing; here they have no say.
    last = -1 if pattern.skip else None
    assert torch.equal(chosen[:, :, :last], case["mask"][:, :, :last])
    stored = case.get("zeroth_order", case.get("output"))
    if stored:
        for backend in ("reference", "tiles"):
            out = attention(q, k, v, pattern, layout, backend=backend)
            out = _boxes(out, case, back=True) if "blocks" in case else out
            found = out.reshape(-1)[:: stored["stride"]][: len(stored["values"])]
            # One original rounds its output to bfloat16.
            limit = case.get("tolerance", 1e-4 * stored["values"].std())
            assert (found - stored["values"]).abs().max() < limit


def test_text_is_listed_beside_the_budget_as_in_published_methods():
    """Text blocks of Jenga, and tiles of a prefix that are exempt from VSA's budget, or compete as if of the grid."""
    jenga, vsa, competing = torch.load(Path(__file__).parents[1] / "golden" / "dynamic_text.pt", weights_only=True)
    q, k, _ = golden_inputs(jenga)
    chosen = parse("topp(p=0.5, least=3, always=near(1), block=64)").choose(q, k, Layout(1024, 0, 128)).mask(0, 16)
    # There the neighbours of the first block and of the last are each other.
    ring = torch.eye(16).roll(1, 0) + torch.eye(16).roll(-1, 0) > 0
    assert torch.equal(chosen | ring, jenga["mask"][..., :16]) and jenga["mask"][..., 16:].all()
    first, pattern = vsa["prefix"], parse("topk(keep=0.4, always=none, block=64)")
    scores = make_input(vsa["shape"], vsa["seed"])[:, :, first:, first:]
    chosen = pattern.pick(scores, Seen(), pattern.blocks((9 * 64,))).mask(0, 9)
    assert torch.equal(chosen, vsa["mask"][:, :, first:, first:])
    assert vsa["mask"][:, :, :first].all() and vsa["mask"][:, :, :, :first].all()
    whole, pattern = make_input(vsa["shape"], vsa["seed"]), parse(f"topk(keep={first + 4}, always=none, block=64)")
    chosen = pattern.pick(whole, Seen(), pattern.blocks((12 * 64,))).mask(0, 12)
    assert torch.equal(chosen[:, :, first:], competing["mask"][:, :, first:])


RULES = (
    "topk(keep=0.3",
    "topk(keep=2",
    "topk(keep=0.4, per=head",
    "topp(p=0.6",
    "topp(p=0.8, most=0.6, least=2",
    "topp(p=0.4, rule=under, per=head",
    "above(tau=0.5",
    "above(tau=-0.2, per=head, most=0.7",
    "topk(keep=0.3, per=all",
    "topp(p=0.6, per=all",
    "above(tau=0.3, per=all, share=2",
    "topk(keep=0.4, share=2",
    "topk(keep=0.2, alike=0.3",
    "topp(p=0.5, alike=0.5, rule=under",
    "topp(p=0.4, of=height, most=0.7",
    "topp(p=0.3, of=height, per=head, rule=under",
)


@st.composite
def choices(draw, grid, rests=("drop",)):
    """A dynamic pattern that is defined on the grid."""
    sides = [draw(st.integers(1, 4)) for _ in grid]
    block = "x".join(map(str, sides)) if len(grid) > 1 else str(sides[0])
    if draw(st.booleans()):
        block = f"{draw(st.integers(1, 9))}, key_block={draw(st.integers(1, 9))}"
    score = draw(st.sampled_from(["mean", "bounds", "parts(1x1)", "diagonal(1)", "lowbit(4)", "tree(2)"]))
    always = draw(st.sampled_from(["none", "self", "first(1)", "near(1)"]))
    rest = draw(st.sampled_from(rests))
    rule = draw(st.sampled_from(RULES))
    score = "mean" if score == "tree(2)" and "per=" in rule else score
    pattern = parse(f"{rule}, block={block}, score={score}, always={always}, rest={rest})")
    try:
        pattern.check(grid)
    except ValueError as error:
        assert "that it may list at most" in str(error) or "keep" in str(error) or "least" in str(error)
        pattern = parse(f"above(tau=0.3, block={block}, score={score}, always={always}, rest={rest})")
    return pattern


def padding(layout, batch=2):
    mask = torch.rand(batch, layout.length, generator=torch.Generator().manual_seed(5)) < 0.6
    mask[0, layout.prefix : layout.prefix + layout.tokens // 2] = False
    return mask


@settings(deadline=None, max_examples=16)
@given(data=st.data(), layout=layouts(sides=(30, 8, 5)), kv_heads=st.sampled_from([1, 2, 4]), masked=st.booleans())
def test_equals_attention_under_its_mask(data, layout, kv_heads, masked):
    """With the list held, outputs and gradients are those of masked dense attention in float64."""
    pattern = data.draw(choices(layout.grid))
    q, k, v = qkv(layout, 4, kv_heads, 6, batch=2, grad=True)
    key_mask = padding(layout) if masked else None
    truth = routed_mask(pattern, layout, q, k, key_mask)
    assert truth.shape == (2, 4, layout.length, layout.length)
    at = inner(layout)
    text = torch.ones(layout.length, dtype=torch.bool)
    text[at] = False
    assert truth[:, :, text].all() and truth[:, :, :, text].all()
    seen = truth if key_mask is None else truth & key_mask[:, None, None]
    keys, values = (t.repeat_interleave(4 // kv_heads, 2) for t in (k, v))
    empty = ~seen.any(-1, keepdim=True)
    scores = (torch.einsum("bqhd,bkhd->bhqk", q, keys) * 6**-0.5).masked_fill(~(seen | empty), float("-inf"))
    expected = torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1).masked_fill(empty, 0), values)
    wanted = gradients(expected, (q, k, v))
    for backend in ("reference", "tiles", "sdpa"):
        out = attention(q, k, v, pattern, layout, key_mask=key_mask, backend=backend)
        assert (out - expected).abs().max() < 1e-10
        for a, b in zip(gradients(out, (q, k, v)), wanted, strict=True):
            assert (a - b).abs().max() < 1e-10
    rows = torch.arange(layout.length)
    weights = attention_rows(q, k, pattern, layout, rows, key_mask=key_mask)
    assert (torch.einsum("bhrs,bshd->brhd", weights, values) - expected).abs().max() < 1e-10


@settings(deadline=None, max_examples=40)
@given(data=st.data(), layout=layouts(sides=(30, 8, 5)), masked=st.booleans())
def test_lists_hold_what_they_promise(data, layout, masked):
    pattern = data.draw(choices(layout.grid))
    q, k, _ = qkv(layout, 4, 2, 6, batch=2)
    key_mask = padding(layout) if masked else None
    blocks = pattern.blocks(layout.grid)
    choice = pattern.choose(q, k, layout, key_mask)
    most = blocks.columns if pattern.alike is not None else pattern.most_listed(blocks)
    assert choice.tiles.shape == (2, 4, blocks.rows, most) and choice.tiles.dtype == torch.int64
    assert choice.tiles.min() >= 0 and choice.tiles.max() < blocks.columns
    counts = torch.full(choice.tiles.shape[:3], most) if choice.counts is None else choice.counts
    assert counts.max() <= most
    if key_mask is None:
        assert counts.min() >= (0 if pattern.per != "row" else pattern.least_listed(blocks))
    mask = choice.mask(0, blocks.columns)
    assert torch.equal(mask.sum(-1), counts), "no list has a tile twice"
    if key_mask is None and pattern.always == "self":
        rows, columns = (token_blocks(blocks.grid, box, q.device) for box in (blocks.queries, blocks.keys))
        assert mask[:, :, rows, columns].all()
    # Samples do not know each other.
    for b in range(2):
        own = pattern.choose(q[b : b + 1], k[b : b + 1], layout, None if key_mask is None else key_mask[b : b + 1])
        assert torch.equal(own.mask(0, blocks.columns), mask[b : b + 1])
    # Finer tiles list the same tokens.
    made = plan(pattern, layout, pattern.tile(layout.grid, data.draw(st.sampled_from([1, 4, 64]))))
    routes = pattern.route(q, k, made, key_mask)
    fine = routes.mask(made.keys.grid_tiles.start, made.keys.runs[1])
    truth = pattern.routed_grid_mask(q, k, layout, key_mask)
    first = [torch.from_numpy(t.tokens[t.grid_tiles, 0]) - layout.prefix for t in (made.queries, made.keys)]
    assert torch.equal(fine, truth[:, :, first[0]][..., first[1]])


@settings(deadline=None, max_examples=8)
@given(data=st.data(), layout=layouts(sides=(30, 8, 5)), masked=st.booleans(), kv_heads=st.sampled_from([1, 4]))
def test_pooled_keys_of_the_rest(data, layout, masked, kv_heads):
    """One softmax over the listed tokens and, for each other block, its mean key that counts once per token."""
    pattern = data.draw(choices(layout.grid, ("mean",)))
    q, k, v = qkv(layout, 4, kv_heads, 6, batch=2, grad=True)
    key_mask = padding(layout) if masked else None
    blocks, at = pattern.blocks(layout.grid), inner(layout)
    listed = pattern.choose(q, k, layout, key_mask).mask(0, blocks.columns)
    rows, columns = (token_blocks(blocks.grid, box, q.device) for box in (blocks.queries, blocks.keys))
    valid = torch.ones(2, layout.length, dtype=torch.bool) if key_mask is None else key_mask
    member = torch.nn.functional.one_hot(columns, blocks.columns).double() * valid[:, at, None]
    count = member.sum(1)
    keys, values = (t.repeat_interleave(4 // kv_heads, 2) for t in (k, v))
    means = [
        torch.einsum("btj,bthd->bjhd", member, t[:, at]) / count.clamp(min=1)[..., None, None] for t in (keys, values)
    ]
    logits = torch.einsum("bqhd,bkhd->bhqk", q, torch.cat([keys, means[0]], 1)) * 6**-0.5
    logits = logits + torch.nn.functional.pad(count.clamp(min=1).log(), (layout.length, 0))[:, None, None]
    own = routed_mask(pattern, layout, q, k, key_mask) & valid[:, None, None]
    rest = torch.zeros(2, 4, layout.length, blocks.columns, dtype=torch.bool)
    rest[:, :, at] = ~listed[:, :, rows] & (count > 0)[:, None, None]
    seen = torch.cat([own, rest], 3)
    empty = ~seen.any(-1, keepdim=True)
    weights = logits.masked_fill(~(seen | empty), float("-inf")).softmax(-1).masked_fill(empty, 0)
    expected = torch.einsum("bhqk,bkhd->bqhd", weights, torch.cat([values, means[1]], 1))
    wanted = gradients(expected, (q, k, v))
    for backend in ("reference", "tiles"):
        out = attention(q, k, v, pattern, layout, key_mask=key_mask, backend=backend)
        assert (out - expected).abs().max() < 1e-10
        for a, b in zip(gradients(out, (q, k, v)), wanted, strict=True):
            assert (a - b).abs().max() < 1e-10
    read = attention_rows(q, k, pattern, layout, torch.arange(layout.length), key_mask=key_mask)
    assert (torch.einsum("bhrs,bshd->brhd", read, values) - expected).abs().max() < 1e-10


def test_an_empty_list_with_the_rest_is_attention_over_means():
    layout = Layout((4, 6))
    q, k, v = qkv(layout, 2, dim=8)
    out = attention(q, k, v, "above(tau=50, always=none, rest=mean, block=2x3)", layout)
    cut = [t.unflatten(1, (2, 2, 2, 3)).mean((2, 4)).flatten(1, 2) for t in (k, v)]
    assert (out - dense_attention(q, *cut, torch.ones(24, 4, dtype=torch.bool), 8**-0.5)).abs().max() < 1e-10


@pytest.mark.parametrize("text", ["topk(keep=1.0", "topp(p=1.0", "topp(p=0.1, least=1.0", "above(tau=-50"])
@pytest.mark.parametrize("rest", ["drop", "mean"])
def test_a_full_list_is_dense_attention(text, rest):
    layout = Layout((5, 7), 2, 1)
    q, k, v = qkv(layout, 2, dim=8)
    for backend in ("reference", "tiles"):
        out = attention(q, k, v, f"{text}, rest={rest}, block=2x3)", layout, backend=backend)
        assert (out - dense_attention(q, k, v, dense_mask("dense", layout), 8**-0.5)).abs().max() < 1e-10


def test_the_order_of_tokens_in_a_block_does_not_matter_nor_does_a_shift_of_all_keys():
    layout, pattern = Layout(48), parse("topk(keep=0.3, block=8)")
    # Multiples of 1/64: every sum is exact in any order, on any device.
    q, k, v = (torch.round(t * 64) / 64 for t in qkv(layout, 2, dim=8, dtype=torch.float32))
    chosen = pattern.choose(q, k, layout).tiles
    inside = torch.cat([8 * b + torch.randperm(8, generator=torch.Generator().manual_seed(b)) for b in range(6)])
    assert torch.equal(pattern.choose(q[:, inside], k[:, inside], layout).tiles, chosen)
    out = attention(q, k, v, pattern, layout)
    turned = attention(q[:, inside], k[:, inside], v[:, inside], pattern, layout)
    assert (turned - out[:, inside]).abs().max() < 1e-5
    assert torch.equal(pattern.choose(q, k + 3.5 * torch.ones(8), layout).tiles, chosen)


def test_of_equal_scores_the_lower_index_wins():
    layout = Layout(40)
    q = k = torch.zeros(1, 40, 1, 4)
    assert parse("topk(keep=3, block=4, always=none)").choose(q, k, layout).tiles.unique().tolist() == [0, 1, 2]
    forced = parse("topk(keep=3, block=4)").choose(q, k, layout).tiles[0, 0]
    assert forced[0].tolist() == [0, 1, 2] and forced[7].tolist() == [0, 1, 7]


def test_padding_decides_nothing():
    """Whatever stands in hidden tokens, lists and outputs are the same, and a hidden block comes last."""
    layout, pattern = Layout((6, 8), 2), parse("topk(keep=0.25, block=2x2, rest=mean)")
    q, k, v = qkv(layout, 2, dim=8)
    mask = torch.ones(1, layout.length, dtype=torch.bool)
    mask[:, 20:35] = False
    other = [torch.where(mask[..., None, None], t, torch.full_like(t, 1e4)) for t in (q, k, v)]
    blocks = pattern.blocks(layout.grid)
    ours, theirs = (pattern.choose(*x[:2], layout, mask).mask(0, blocks.columns) for x in ((q, k), other))
    shown = torch.zeros(blocks.rows).index_add(
        0, token_blocks(blocks.grid, blocks.queries, q.device), mask[0, 2:].float()
    )
    assert torch.equal(ours[:, :, shown > 0], theirs[:, :, shown > 0])
    assert not ours[:, :, shown > 0][..., shown == 0].any()
    out, again = (attention(*x, pattern, layout, key_mask=mask) for x in ((q, k, v), other))
    assert (out - again)[mask].abs().max() < 1e-12


def test_a_negative_scale_turns_the_order():
    layout = Layout(32)
    q, k, _ = qkv(layout, 1, dim=4)
    for text in ("topk(keep=1, block=4, always=none", "above(tau=0.5, block=4, score=bounds, always=none"):
        for score in ("mean", "bounds"):
            pattern = parse(
                f"{text.split(', score')[0]}, score={score}, always=none)".replace("always=none, score", "score")
            )
            assert torch.equal(
                pattern.choose(q, k, layout, scale=-0.5).tiles, pattern.choose(-q, k, layout, scale=0.5).tiles
            )


@pytest.mark.parametrize("grid", [(7, 9), (40,), (3, 5, 6)])
def test_tile_choice_is_the_lists_of_the_grid(grid):
    layout = Layout(grid, 3, 2)
    q, k, _ = qkv(layout, 4, 2, dim=8, batch=2)
    block = "3" if len(grid) == 1 else "x".join(["2"] * len(grid))
    for text, groups in ((f"topp(p=0.5, block={block})", 4), ("routing(regions=2, topk=2)", 1)):
        made, chosen = plan(text, layout), tile_choice(q, k, text, layout)
        assert chosen.shape == (2, groups, made.queries.runs[1], made.keys.runs[1])
        truth = routed_mask(made.pattern, layout, q, k)
        truth = truth if truth.ndim == 4 else truth[:, None]
        rows, columns = (t.tokens[t.grid_tiles, 0] for t in (made.queries, made.keys))
        assert torch.equal(chosen, truth[:, :, rows][..., columns])
    fixed = tile_choice(q, k, "dense", layout)
    assert fixed.shape[:2] == (1, 1) and fixed.all()
    near = tile_choice(*torch.zeros(2, 1, 203, 1, 8), "na(window=3)", Layout(200, 3))
    assert torch.equal(near[0, 0], torch.ones(4, 4).tril(1).triu(-1).bool())
    with pytest.raises(ValueError, match=r"linear.* is a composition and no list of tiles"):
        tile_choice(q, k, "linear", layout)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("topk(keep=0.0)", "keep=0.0 must be a fraction above 0 and at most 1"),
        ("topk(keep=1.5)", "keep=1.5 must be a fraction above 0 and at most 1"),
        ("topk(keep=0)", "keep=0 must be"),
        ("topk(keep=true)", "keep=True must be"),
        ("topp(p=0.0)", "p=0.0 must be a share of the attention"),
        ("topp(p=1.1)", "p=1.1 must be a share"),
        ("topp(most=0)", "most=0 must be"),
        ("topp(rule=over)", "rule='over' must be cover or under"),
        ("topp(of=scores)", "of='scores' must be softmax or height"),
        ("above(tau=none)", "tau=None must be a finite float32 number"),
        ("topk(score=best)", "score='best' must be mean, bounds, parts"),
        ("topk(score=parts(0x4))", "must be mean, bounds, parts"),
        ("topk(score=diagonal(0))", "score=diagonal\\(0\\): the number must be at least 1"),
        ("topk(score=lowbit(1))", "score=lowbit\\(1\\): the number must be from 2 to 8"),
        ("topk(score=lowbit(9))", "must be from 2 to 8"),
        ("topk(score=tree(1))", "must be at least 2"),
        ("topk(score=tree(2), per=head)", "score=tree\\(2\\) searches row by row: leave per=head out"),
        ("topk(score=diagonal(5), block=4x4)", "diagonal\\(5\\) cuts query blocks of 16 tokens in runs of 5"),
        ("topk(share=0)", "share=0 must be a number of heads that choose together like 2, or all"),
        ("topk(share=some)", "share='some' must be"),
        ("topk(alike=1.0)", "alike=1.0 must be from -1 to below 1"),
        ("topp(alike=0.5, share=2)", "alike is judged head by head for each row: leave per and share out"),
        ("above(bar=other)", "bar='other' must be exact or diag"),
        ("above(bar=diag, share=2)", "bar=diag is made of means of blocks, head by head"),
        ("topk(always=near)", "always='near' must be none, or of self"),
        ("topk(always=window(2x3))", "a window is odd"),
        ("topk(always=first(0))", "first\\(0\\) lists nothing"),
        ("topk(per=each)", "per='each' must be row, head or all"),
        ("topk(rest=none)", "rest=None must be drop, mean, slope, linear or coarse"),
        ("topk(block=0)", "block=0 must be a whole number"),
        ("topk(key_block=64)", "key_block=64 needs the block of queries too"),
        ("topk(block=4x4, key_block=16)", "must both be boxes like 4x4x4 or both be numbers"),
        ("topk(block=4x4x4)", "block=4x4x4 has 3 sides but the grid \\(16, 16\\) has 2 axes: give 2 sides, or one"),
        ("topk(score=parts(3x4), block=4x4)", "cuts query blocks of 16 tokens in 3 parts"),
        ("topk(keep=2, always=near(1), block=4x4)", "lists up to 9 of 16 key blocks, more than the 2"),
        ("topp(most=0.2, always=near(1), block=4x4)", "lists up to 9 of 16 key blocks, more than the 4"),
        ("above(most=0.5, per=head, always=near(2), block=4x4)", "lists up to 16 of 16 key blocks, more than the 8"),
        ("topp(most=3, per=all, always=near(1), block=4x4)", "lists up to 9 of 16 key blocks, more than the 3"),
        ("topk(keep=1, per=head, always=near(1), block=4x4)", "lists 100 pairs of blocks of a head, more than the 16"),
        ("topp(least=4, most=2, block=4x4)", "least=4 is 4 blocks, most=2 only 2"),
        ("topk(always=window(3x3x3), block=4x4)", "has 3 sides but the blocks have 2 axes"),
        ("sol(tau=2.0)", "sol takes no parameters: it stands for above"),
    ],
)
def test_bad_parameters_say_what_to_give(text, message):
    with pytest.raises(ValueError, match=message):
        parse(text).check((16, 16))


def test_tiles_that_cross_blocks_are_refused():
    with pytest.raises(ValueError, match=r"query tiles \(3, 4\) cross the borders of the blocks \(4, 4\)"):
        plan("topk(block=4x4)", Layout((16, 16)), ((3, 4), (4, 4)))
    assert plan("topk(block=4x4)", Layout((16, 16)), ((2, 4), (4, 1))).queries.capacity == 8


def test_every_preset_is_a_pattern_and_named_where_patterns_are_listed():
    from visattn.patterns.presets import PRESETS

    names = {kind.name for kind in PATTERNS}
    for name, preset in PRESETS.items():
        assert name not in names
        assert isinstance(parse(name), DynamicPattern | HeadsPattern | OrderedPattern | Gate)
        assert str(parse(name)) == str(parse(preset.pattern))


def test_the_density_that_is_expected_is_near_what_random_scores_reach():
    layout = Layout(64 * 100)
    q, k, _ = qkv(layout, 1, dim=4, dtype=torch.float32)
    for text, tolerance in (("topk(keep=0.1, block=64)", 1e-9), ("above(tau=1.0, block=64)", 0.02)):
        pattern = parse(text)
        expected = plan(pattern, layout).density
        reached = tile_choice(q, k, pattern, layout).float().mean().item()
        assert abs(expected - reached) <= tolerance + 1e-6, text
