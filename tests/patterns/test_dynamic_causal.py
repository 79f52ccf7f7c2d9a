"""Causal axes of patterns that list blocks by their content."""

from pathlib import Path

import numpy as np
import pytest
import torch

from tests.golden.fill import make_input
from tests.support.cases import gradients, qkv
from tests.support.oracles import dense_attention
from visattn import Layout, attention, attention_rows, parse, plan, tile_choice
from visattn.patterns import routed_mask
from visattn.patterns.choice.causal import pairs_on
from visattn.patterns.choice.listening import listening
from visattn.patterns.choice.picks import Seen

GOLDEN = torch.load(Path(__file__).parents[1] / "golden" / "dynamic_causal.pt", weights_only=True)
# Pattern, layout: blocks that end a causal line or reach over borders, tokens that choose, frames, several rules.
CASES = {
    "line": ("topk(keep=0.3, block=4, causal=true)", Layout(37, 3, 2)),
    "runs of a grid": ("topk(keep=2, block=8, key_block=4, causal=true)", Layout((5, 9), 3, 2)),
    "larger blocks of keys": ("topp(p=0.6, block=4, key_block=8, causal=true, always=none)", Layout(37)),
    "larger than a tile": ("topk(keep=2, block=72, causal=true)", Layout(150)),
    "tokens": ("topk(keep=2, block=1, key_block=4, causal=true)", Layout(37, 2)),
    "frames": ("above(tau=0.3, block=1x2x2, causal=1x0x0)", Layout((4, 5, 3), 2, 1)),
    "boxes of its own": ("topk(keep=3, causal=1x0x0)", Layout((3, 4, 20), 2, 1)),
    "a budget of a head": ("topk(keep=0.3, per=head, block=1x2x2, causal=1x0x0)", Layout((4, 5, 3), 2, 1)),
    "a budget of all": ("topp(p=0.4, per=all, block=4, causal=true)", Layout(30)),
    "shared, alike": ("topk(keep=0.3, share=2, block=4, causal=true)", Layout(30, 1)),
    "guard": ("topk(keep=2, alike=0.2, block=4, causal=true)", Layout(30, 1)),
    "shares": ("above(tau=0.2, bar=share, block=4, causal=true)", Layout(30, 1)),
    "diagonals": ("topk(keep=2, score=diagonal(2), block=4, causal=true)", Layout(30, 1)),
    "diagonals of frames": ("topp(p=0.5, score=diagonal(2), block=1x2x2, causal=1x0x0)", Layout((3, 5, 4))),
    "forced ones count": ("topp(p=0.7, always=self+first(1), counted=true, block=4, causal=true)", Layout(41)),
}


@pytest.mark.parametrize("case", GOLDEN, ids=lambda case: case["method"])
def test_lists_what_the_published_method_lists(case):
    batch, length, heads, dim = case["shape"]
    q, k, v = (
        make_input((batch, length, heads, dim), 10 * case["seed"] + i)
        + case.get("level", 1.0)
        * make_input((batch, -(-length // case.get("run", 64)), heads, dim), 10 * case["seed"] + 5 + i)
        .repeat_interleave(case.get("run", 64), 1)[:, :length]
        for i in range(3)
    )  # fmt: skip
    pattern, layout = parse(case["pattern"]), Layout(length)
    if "mask" in case:
        chosen = pattern.choose(q, k, layout).mask(0, pattern.blocks((length,)).columns)
        first = case.get("first_row", 0)
        assert torch.equal(chosen[:, :, first:], case["mask"][:, :, first:])
    if "output" in case:
        stored = case["output"]
        for backend in ("reference", "tiles"):
            found = attention(q, k, v, pattern, layout, backend=backend).reshape(-1)[:: stored["stride"]]
            assert (found[: len(stored["values"])] - stored["values"]).abs().max() < 1e-4 * stored["values"].std()


def test_picks_of_seer_attention():
    """Its scores, as shares of what a row sees: those over a bar, and a number of them."""
    case = torch.load(Path(__file__).parents[1] / "golden" / "dynamic_gate.pt", weights_only=True)[0]
    layout, scores = Layout(case["shape"][1]), case["scores"].log()
    bar = f"above(tau={case['threshold']}, bar=share, always=none, block=64, causal=true)"
    # A ratio of 0.5 of the causal pairs are 1.46 of 5 blocks in each row, rounded down.
    for text, name in ((bar, "mask_threshold"), ("topk(keep=1, always=none, block=64, causal=true)", "mask_ratio")):
        pattern = parse(text)
        assert torch.equal(pattern.pick(scores, Seen(), pattern.blocks(layout.grid)).mask(0, 5), case[name])


def later(pattern, layout):
    """Which grid keys come after a query, by the definition."""
    places = np.indices(layout.grid).reshape(layout.dims, -1)
    if pattern.causal is True:
        return torch.ones(layout.tokens, layout.tokens, dtype=torch.bool).triu(1)
    axes = [axis for axis, causal in enumerate(pattern.causal) if causal]
    return torch.from_numpy((places[axes][:, None] > places[axes][:, :, None]).any(0))


@pytest.mark.parametrize("name", CASES)
def test_a_query_sees_listed_blocks_up_to_itself(name):
    text, layout = CASES[name]
    # Padding in every other case.
    masked = list(CASES).index(name) % 2
    pattern, at = parse(text), slice(layout.prefix, layout.prefix + layout.tokens)
    assert parse(str(pattern)) == pattern
    q, k, v = qkv(layout, 2, 1, 6, batch=2, grad=True)
    key_mask = torch.rand(2, layout.length, generator=torch.Generator().manual_seed(5)) < 0.7 if masked else None
    blocks, hidden = pattern.blocks(layout.grid), later(pattern, layout)
    choice = pattern.choose(q, k, layout, key_mask)
    rows, columns = (
        torch.from_numpy(np.ravel_multi_index(
            [x // side for x, side in zip(np.indices(blocks.grid).reshape(len(box), -1), box, strict=True)],
            [-(-n // side) for n, side in zip(blocks.grid, box, strict=True)],
        ))
        for box in (blocks.queries, blocks.keys)
    )  # fmt: skip
    listed = choice.mask(0, blocks.columns)
    # No list has a block that nobody of the row may see.
    reach = torch.zeros(blocks.rows, blocks.columns, dtype=torch.bool)
    reach.index_put_(
        (rows[:, None].expand_as(hidden)[~hidden], columns[None].expand_as(hidden)[~hidden]), torch.tensor(True)
    )
    assert not (listed & ~reach).any()
    mask = torch.ones(2, 2, layout.length, layout.length, dtype=torch.bool)
    mask[:, :, at, at] = listed.expand(-1, 2, -1, -1)[:, :, rows][..., columns] & ~hidden
    assert torch.equal(routed_mask(pattern, layout, q, k, key_mask).expand_as(mask), mask)
    seen = mask if key_mask is None else mask & key_mask[:, None, None]
    keys, values = (t.repeat_interleave(2, 2) for t in (k, v))
    expected = dense_attention(q, keys, values, seen, 6**-0.5)
    wanted = gradients(expected, (q, k, v))
    for backend in ("reference", "tiles", "sdpa"):
        out = attention(q, k, v, pattern, layout, key_mask=key_mask, backend=backend)
        assert (out - expected).abs().max() < 1e-10
        assert all((a - b).abs().max() < 1e-10 for a, b in zip(gradients(out, (q, k, v)), wanted, strict=True))
    weights = attention_rows(q, k, pattern, layout, torch.arange(layout.length), key_mask=key_mask)
    assert (torch.einsum("bhrs,bshd->brhd", weights, values) - expected).abs().max() < 1e-10
    # Two samples are two samples.
    one = attention(q[1:], k[1:], v[1:], pattern, layout, key_mask=None if key_mask is None else key_mask[1:])
    assert (one - out[1:]).abs().max() < 1e-10


def test_what_is_later_changes_nothing():
    layout, pattern = Layout(64, 2), parse("topp(p=0.5, block=8, causal=true)")
    q, k, v = qkv(layout, 2, dim=8)
    out = attention(q, k, v, pattern, layout)
    other = [t.clone() for t in (q, k, v)]
    for t in other:
        t[:, 2 + 40 :] += 3.0
    assert torch.equal(attention(*other, pattern, layout)[:, 2 : 2 + 40], out[:, 2 : 2 + 40])


def test_what_nobody_may_see_is_not_forced():
    """Of its neighbours a block of a causal line may list the one before alone, which two places are enough for."""
    pattern = parse("topk(keep=2, always=near(1), block=4, causal=true)")
    pattern.check((32,))
    q, k, _ = qkv(Layout(32), 2, dim=4)
    chosen = pattern.choose(q, k, Layout(32)).mask(0, 8)
    assert torch.equal(chosen, torch.ones(8, 8, dtype=torch.bool).tril().triu(-1).expand(1, 2, -1, -1))
    parse("topk(keep=2, per=head, always=near(1), block=4, causal=true)").check((32,))


def test_a_full_list_is_causal_attention():
    layout = Layout((3, 4, 5), 2, 1)
    q, k, v = qkv(layout, 2, dim=8)
    for text, same in (
        ("topk(keep=1.0, block=1x2x2, causal=1x0x0)", "na(window=-1x-1x-1, causal=1x0x0)"),
        ("topp(p=1.0, block=16, causal=true)", None),
    ):
        out = attention(q, k, v, text, layout)
        if same is None:
            line = Layout(60, 2, 1)
            wanted = attention(q, k, v, "na(window=-1, causal=true)", line)
        else:
            wanted = attention(q, k, v, same, layout)
        assert (out - wanted).abs().max() < 1e-10


@pytest.mark.parametrize("text", ["topk(keep=0.4, block=1x2x2, causal=1x0x0)", "topk(keep=3, block=8, causal=true)"])
def test_who_listens_hears_of_the_pairs_that_are_seen(text):
    layout, pattern, heard = Layout((4, 5, 6)), parse(text), []
    q, k, _ = qkv(layout, 2, dim=8)
    with listening(heard.append):
        choice = pattern.choose(q, k, layout)
    seen = pattern.token_mask(choice, layout)
    assert (heard[0] - seen.double().mean((2, 3))).abs().max() < 1e-12
    blocks = pattern.blocks(layout.grid)
    assert pairs_on(blocks, q.device).sum() == (~later(pattern, layout)).sum()
    # What is expected for random scores is near what is reached, and every tile that is listed is counted as one.
    expected = plan(pattern, layout).density
    assert abs(expected - tile_choice(q, k, pattern, layout).double().mean().item()) < 0.02


@pytest.mark.parametrize(
    ("text", "grid", "message"),
    [
        ("topk(causal=1x0x0, block=4x4x4)", (8, 8, 8), r"axis 0 of \(8, 8, 8\) is causal and blocks of 4 tokens reach"),
        ("topk(causal=1x0x0, block=64)", (8, 8, 8), "causal=1x0x0 is for axes of the grid and block=64 is a run"),
        ("topk(causal=1x0)", (8, 8, 8), "causal=1x0 has 2 values but the grid has 3 axes"),
        ("topk(causal=3)", (8,), "causal=3 must be true or false"),
        ("topk(causal=true, rest=mean)", (8,), "leave rest=mean out"),
        ("topk(causal=true, skip=0.1)", (8,), "leave skip=0.1 out"),
        ("topk(causal=true, score=tree(2))", (8,), r"leave score=tree\(2\) out"),
        ("topk(causal=true, score=lowbit(4))", (8,), r"leave score=lowbit\(4\) out"),
        ("above(causal=true, bar=diag)", (8,), "leave bar=diag out"),
        ("above(bar=share, tau=1.0)", (8,), "above 0 and below 1"),
        ("above(bar=share, tau=0.1, per=head)", (8,), "per=row"),
        ("topp(counted=2)", (8,), "counted=2 must be true or false"),
        ("topp(counted=true, of=height)", (8,), "of=height always counts"),
    ],
)
def test_what_cannot_be_causal_says_why(text, grid, message):
    with pytest.raises(ValueError, match=message):
        parse(text).check(grid)
