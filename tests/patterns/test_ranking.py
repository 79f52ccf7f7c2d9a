"""Who comes last when blocks are ranked: what nothing was estimated of before padding and what nobody may see."""

import pytest
import torch

from tests.support.cases import qkv
from visattn import Layout, attention, parse


def chosen(text, layout, mask=None, q=None, k=None, **options):
    pattern = parse(text)
    made = qkv(layout, 2, dim=4, **options)
    routes = pattern.choose(made[0] if q is None else q, made[1] if k is None else k, layout, mask)
    listed, blocks = routes.mask(0, pattern.blocks(layout.grid).columns), routes.tiles.numel()
    assert listed.sum() == (blocks if routes.counts is None else routes.counts.sum()), "a block is listed twice"
    return listed


def unmet():
    """Six blocks of two tokens: 0 is padding, and of 1 and 5 only first tokens are valid, which meet no first one."""
    mask = torch.ones(1, 12, dtype=torch.bool)
    mask[0, [0, 1, 3, 11]] = False
    return Layout(12), mask


@pytest.mark.parametrize("rule", ["topk(keep=5", "topp(p=0.1, least=5", "topp(p=0.1, least=5, most=5"])
@pytest.mark.parametrize("causal", [False, True])
def test_a_block_without_a_valid_pair_comes_before_padding(rule, causal):
    layout, mask = unmet()
    listed = chosen(f"{rule}, always=none, score=diagonal(2), block=2, causal={causal})".lower(), layout, mask)
    # Row 5 lists all that has a valid token: 2 to 4, which its token meets, then 1 and itself.
    assert listed[0, :, 5].tolist() == [[False, True, True, True, True, True]] * 2


def test_a_block_without_a_valid_pair_comes_before_what_nobody_may_see():
    """Where the second axis is the causal one, some that nobody may see have lower indices than others."""
    layout = Layout((4, 3))
    mask = torch.ones(1, 12, dtype=torch.bool)
    # Of the block that begins at (2, 0) only the first token is valid, and of the one at (0, 0) too.
    mask[0, [3, 9]] = False
    listed = chosen("topk(keep=2, always=none, score=diagonal(2), block=2x1, causal=0x1)", layout, mask)
    # The blocks of the first place see blocks 0 and 3, of which neither has a pair with them.
    assert listed[0, :, [0, 3]].tolist() == [[[True, False, False, True, False, False]] * 2] * 2


@pytest.mark.parametrize(
    ("rule", "pairs"),
    [("topk(keep=0.5, per=head", 5), ("topk(keep=0.5, per=all", 5), ("topp(p=0.5", 6), ("above(tau=-1.0", 0)],
)
def test_rows_without_a_score_choose_by_their_order(rule, pairs):
    """Runs that a border cuts to one token meet nobody: no row has a score, and nothing is no number."""
    listed = chosen(f"{rule}, always=none, score=diagonal(2), block=1x2, causal=1x0)", Layout((3, 1)))
    ordered = [(0, 0), (1, 0), (1, 1), (2, 0), (2, 1), (2, 2)]
    if "all" in rule:
        # One head after the other.
        assert listed[0, 0].nonzero().tolist() == [list(pair) for pair in ordered]
        assert listed.sum() == 2 * pairs
    else:
        assert listed[0].nonzero()[:, 1:].tolist() == 2 * [list(pair) for pair in ordered[:pairs]]


@pytest.mark.parametrize("rule", ["cover", "under"])
@pytest.mark.parametrize("more", ["", ", of=height", ", per=head", ", least=4, most=4"])
def test_the_whole_share_is_carried_by_all(rule, more):
    """Sums of shares may round to more than 1; what is then left out would be up to the order of additions."""
    layout = Layout(96)
    listed = chosen(f"topp(p=1.0, rule={rule}{more}, always=none, block=1)", layout, dtype=torch.float32)
    if "most" in more:
        assert (listed.sum(-1) == 4).all()
        best = parse("topk(keep=4, always=none, block=1)")
        assert torch.equal(listed, chosen(str(best), layout, dtype=torch.float32))
    else:
        assert listed.all()


@pytest.mark.parametrize("text", ["topp(p=1.0, most=3, always=none, block=4)", "topp(p=1.0, least=3, most=3, block=4)"])
def test_padding_takes_no_place_of_blocks_that_score_below_it(text):
    layout = Layout(32)
    mask = torch.ones(1, 32, dtype=torch.bool)
    mask[0, :16] = False
    # Means of padding are zero, which is more than any product here.
    q = torch.rand(1, 32, 2, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64) + 0.1
    listed = chosen(text, layout, mask, q, -q)
    assert not listed[0, :, 4:, :4].any() and (listed[0, :, 4:].sum(-1) == 3).all()


@pytest.mark.parametrize("score", ["diagonal(2)", "lowbit(4)"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_factor_on_the_logits_rounds_no_queries(score, dtype):
    layout = Layout(256)
    pattern = parse(f"topk(keep=5, always=none, score={score}, block=4)")
    q, k, _ = qkv(layout, 4, dim=6, dtype=dtype)
    wide = pattern.choose(q.float(), k.float(), layout).tiles
    assert torch.equal(pattern.choose(q, k, layout).tiles, wide)


@pytest.mark.parametrize(
    ("text", "layout"),
    [
        ("topk(keep=1, block=1x128)", Layout((3, 81), 1)),
        ("topp(p=0.4, block=100x1)", Layout((69, 3))),
        ("verticalslash(least=1, block=128)", Layout(81, 2)),
    ],
)
def test_an_axis_may_be_shorter_than_a_block(text, layout):
    """Tiles are parts of an axis of more than 64 tokens, and need not divide a block that is longer."""
    q, k, v = qkv(layout, 2, dim=4)
    expected = attention(q, k, v, text, layout, backend="reference")
    assert (attention(q, k, v, text, layout, backend="tiles") - expected).abs().max() < 1e-12
