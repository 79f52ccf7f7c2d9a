"""Columns and diagonals that the last queries of a causal line attend to."""

from pathlib import Path

import pytest
import torch

from tests.golden.fill import make_input
from tests.support.cases import gradients, qkv
from tests.support.oracles import dense_attention
from visattn import Layout, attention, parse
from visattn.patterns.vertical_slash import last_attention, tokens_of

*SHARES, TOKENS = torch.load(Path(__file__).parents[1] / "golden" / "dynamic_lines.pt", weights_only=True)


def golden_inputs(case):
    batch, length, heads, dim = case["shape"]
    found = []
    for i, number in enumerate((heads, *[case.get("kv_heads") or heads] * 2)):
        noise = make_input((batch, length, number, dim), 10 * case["seed"] + i)
        levels = make_input((batch, -(-length // 64), number, dim), 10 * case["seed"] + 5 + i)
        found.append(noise + case.get("level", 1.0) * levels.repeat_interleave(64, 1))
    return found


@pytest.mark.parametrize("case", SHARES, ids=lambda case: case["pattern"])
def test_lists_what_flex_prefill_lists(case):
    (q, k, _), pattern, layout = golden_inputs(case), parse(case["pattern"]), Layout(case["shape"][1])
    assert torch.equal(pattern.choose(q, k, layout).mask(0, 16), case["mask"])
    # Heads on either side of the bar.
    near = case["divergence"] < pattern.tau
    assert pattern.tau == 0 or (near.any() and not near.all())


def test_columns_and_distances_are_those_of_minference():
    q, k, _ = golden_inputs(TOKENS)
    columns, slashes = tokens_of(last_attention(q, k, 64, None, 16**-0.5), TOKENS["vertical"], TOKENS["slash"])
    assert torch.equal(columns, TOKENS["columns"]) and torch.equal(slashes, TOKENS["distances"])
    pattern, layout = parse("verticalslash(columns=60, slashes=120, block=64)"), Layout(512)
    listed = pattern.choose(q, k, layout).mask(0, 8)
    # Blocks that hold a pair of tokens of theirs, and none else.
    index = torch.arange(512)
    theirs = columns[:, :, None] | slashes[..., (index[:, None] - index).clamp(min=0)]
    theirs = (theirs & (index[:, None] >= index)).unflatten(3, (8, 64)).unflatten(2, (8, 64)).any(5).any(3)
    assert torch.equal(listed & theirs, theirs)
    assert (listed & ~theirs).sum() <= 8, "only where a distance leaves the line inside of a block"


@pytest.mark.parametrize(
    "text", ["verticalslash(p=0.6, tau=0.3, least=1, block=5)", "verticalslash(columns=2, slashes=3, block=4)"]
)
def test_runs_its_lists_whatever_padding_holds(text):
    layout, pattern = Layout(43, 2, 1), parse(text)
    q, k, v = qkv(layout, 4, 2, 6, batch=2, grad=True)
    mask = torch.ones(2, 46, dtype=torch.bool)
    # One sample ends early, one begins late.
    mask[0, 32:45], mask[1, 2:9] = False, False
    choice = pattern.choose(q, k, layout, mask)
    assert choice.counts.min() >= 1
    other = [torch.where(mask[..., None, None], t, torch.full_like(t, 9.0)) for t in (q, k)]
    assert torch.equal(pattern.choose(*other, layout, mask).mask(0, 11), choice.mask(0, 11))
    # Without its padding a sample chooses the same.
    alone = pattern.choose(q[:1, :32], k[:1, :32], Layout(30, 2))
    side = pattern.block
    blocks = -(-30 // side)
    assert torch.equal(alone.mask(0, blocks)[0], choice.mask(0, -(-43 // side))[0, :, :blocks, :blocks])
    seen = torch.ones(2, 4, 46, 46, dtype=torch.bool)
    seen[:, :, 2:45, 2:45] = pattern.token_mask(choice, layout)
    assert not seen[:, :, 2:45, 2:45].triu(1).any()
    expected = dense_attention(q, k, v, seen & mask[:, None, None], 6**-0.5)
    wanted = gradients(expected, (q, k, v))
    for backend in ("reference", "tiles"):
        out = attention(q, k, v, pattern, layout, key_mask=mask, backend=backend)
        assert (out - expected).abs().max() < 1e-10
        for a, b in zip(gradients(out, (q, k, v)), wanted, strict=True):
            assert (a - b).abs().max() < 1e-10


@pytest.mark.parametrize(
    "text",
    [
        "verticalslash(p=0.6, tau=0.0, least=1, block=4)",
        "verticalslash(p=0.6, tau=1.0, least=2, most=2, block=4)",
        "verticalslash(columns=34, slashes=3, block=4)",
    ],
)
def test_the_first_column_is_that_of_the_first_valid_token(text):
    """Prompts are padded in front: what is listed is what is without the padding."""
    pattern, behind = parse(text), 24
    q, k, _ = qkv(Layout(60 + behind), 2, 1, 6)
    mask = torch.ones(1, 60 + behind, dtype=torch.bool)
    mask[:, :behind] = False
    padded = pattern.choose(q, k, Layout(60 + behind), mask).mask(0, 21)[:, :, 6:]
    alone = pattern.choose(q[:, behind:], k[:, behind:], Layout(60)).mask(0, 15)
    assert torch.equal(padded[..., 6:], alone)
    # Blocks of padding are on a diagonal at most.
    assert not padded[:, :, -1, 1:6].any()


def test_the_whole_share_is_carried_by_all():
    """All tokens carry it, whatever sums of their weights round to: 701 make 6 blocks, counted in 128 tokens."""
    layout = Layout(700)
    q, k, _ = (t.float() for t in qkv(layout, 4, dim=6))
    listed, counted = (
        parse(f"verticalslash({text}, tau=0.0, block=4)").choose(10 * q, k, layout).mask(0, 175)
        for text in ("p=1.0, least=1", "p=0.5, least=6, most=6")
    )
    assert torch.equal(listed, counted)


def test_everything_is_listed_where_it_carries():
    layout = Layout(40)
    q, k, v = qkv(layout, 2, dim=6)
    whole = attention(q, k, v, "verticalslash(least=1.0, block=8)", layout)
    assert (whole - attention(q, k, v, "na(window=-1, causal=true)", layout)).abs().max() < 1e-10


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("verticalslash(p=0)", "p=0 must be a number above 0 and at most 1"),
        ("verticalslash(tau=2)", "tau=2 must be a number from 0 and at most 1"),
        ("verticalslash(least=0)", "least=0 must be"),
        ("verticalslash(columns=30)", "give both, or none and p"),
        ("verticalslash(block=4x4)", "block=\\(4, 4\\) must be one whole number of tokens"),
        ("verticalslash(block=none)", "block=None must be one whole number of tokens"),
    ],
)
def test_bad_parameters_say_what_to_give(text, message):
    with pytest.raises(ValueError, match=message):
        parse(text)
