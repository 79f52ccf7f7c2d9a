"""The rules for scores, and who shares a choice: each against its formula, written out token by token."""

import math

import numpy as np
import pytest
import torch

import visattn
from tests.patterns.test_dynamic import GOLDEN, golden_inputs
from tests.support.cases import qkv
from visattn import Layout, attention, parse, plan, tile_choice
from visattn.patterns.choice import tree
from visattn.patterns.choice.blocks import token_blocks
from visattn.patterns.choice.scores import Score, block_scores

LAYOUT = Layout((5, 6))
BLOCK = "2x4"


def parts_of(text="topk"):
    q, k, _ = qkv(LAYOUT, 4, 2, dim=6)
    blocks = parse(f"{text}(keep=3, block={BLOCK}, key_block=2x2)").blocks(LAYOUT.grid)
    rows, columns = (token_blocks(blocks.grid, box, q.device) for box in (blocks.queries, blocks.keys))
    return q, k.repeat_interleave(2, 2), k, blocks, rows, columns


def valid_tokens(masked):
    valid = torch.ones(1, LAYOUT.tokens, dtype=torch.bool)
    if masked:
        valid[0, 3:17] = False
    return valid


def scores_of(text, q, k, blocks, valid, leaves=0):
    seen, some = block_scores(Score.of(text), q, k, blocks, valid if not valid.all() else None, 0.4, leaves=leaves)
    return torch.cat([each.scores for each in some], 1), seen


@pytest.mark.parametrize("case", [case for case in GOLDEN if "scores" in case], ids=lambda case: case["method"])
def test_scores_are_those_of_the_published_method(case):
    q, k, _ = golden_inputs(case)
    pattern, dim = parse(case["pattern"]), q.shape[3]
    blocks = pattern.blocks(tuple(case["grid"]))
    _, some = block_scores(Score.of(pattern.score), q, k, blocks, None, dim**-0.5)
    found = torch.cat([each.scores for each in some], 1)
    if case["method"] == "xattention":
        # There the shares of the 16 runs of 8 tokens of a block of queries are summed, not averaged.
        found = 16 * found.exp()
    assert (found - case["scores"]).abs().max() < 1e-4 * case["scores"].std()


@pytest.mark.parametrize("masked", [False, True])
def test_diagonal_is_the_share_of_the_softmax_of_antidiagonals(masked):
    q, keys, k, blocks, rows, columns = parts_of()
    valid, length = valid_tokens(masked), 2
    found, _ = scores_of("diagonal(2)", q, k, blocks, valid)

    def runs(of, box, number):
        """Slots of each run, row-major inside the box as it would be without a border: token or -1."""
        height, width = blocks.grid
        made = []
        for b in range(number):
            per_row = -(-width // box[1])
            top, left = b // per_row * box[0], b % per_row * box[1]
            slots = [(top + i, left + j) for i in range(box[0]) for j in range(box[1])]
            tokens = [y * width + x if y < height and x < width else -1 for y, x in slots]
            made.append([tokens[i : i + length] for i in range(0, len(tokens), length)])
        return made

    ok = lambda t: t >= 0 and bool(valid[0, t])  # noqa: E731
    for head in range(4):
        key_runs = [(j, run) for j, each in enumerate(runs(columns, blocks.keys, blocks.columns)) for run in each]
        for i, query_runs in enumerate(runs(rows, blocks.queries, blocks.rows)):
            total, number = torch.zeros(blocks.columns, dtype=torch.float64), 0
            for run in query_runs:
                number += any(ok(t) for t in run)
                logits = []
                for _, other in key_runs:
                    pairs = [(a, b) for a, b in zip(run[::-1], other, strict=True) if ok(a) and ok(b)]
                    products = [0.4 * (q[0, a, head] @ keys[0, b, head]).item() for a, b in pairs]
                    logits.append(sum(products) / len(products) if products else -math.inf)
                if max(logits) == -math.inf:
                    continue
                for (j, _), share in zip(key_runs, torch.tensor(logits, dtype=torch.float64).softmax(0), strict=True):
                    total[j] += share
            if number:
                assert (found[0, head, i].exp() - total / number).abs().max() < 1e-12


@pytest.mark.parametrize("masked", [False, True])
def test_lowbit_is_the_largest_weight_of_products_of_integers(masked):
    q, keys, k, blocks, rows, columns = parts_of()
    valid = valid_tokens(masked)
    found, _ = scores_of("lowbit(4)", q, k, blocks, valid)
    at = valid[0]
    query, key = 0.4 * q[0], keys[0]
    query, key = query - query[at].mean(0), key - key[at].mean(0)
    mean = (0.4 * q[0])[at].mean(0)

    def rounded(x):
        unit = x.abs().amax(-1, keepdim=True) / 7
        return (x / unit).round() * unit

    logits = torch.einsum("qhd,khd->hqk", rounded(query), rounded(key)) + torch.einsum("hd,khd->hk", mean, key)[:, None]
    weights = logits.masked_fill(~at, -math.inf).log_softmax(-1)
    for i in range(blocks.rows):
        for j in range(blocks.columns):
            part = weights[:, (rows == i) & at][:, :, (columns == j) & at]
            if part.numel():
                assert (found[0, :, i, j] - part.amax((1, 2))).abs().max() < 1e-12
    # Exact products would say nearly the same.
    exact = torch.einsum("qhd,khd->hqk", 0.4 * q[0], keys[0]).masked_fill(~at, -math.inf).log_softmax(-1)
    assert (exact - weights)[:, :, at].abs().mean() < 0.2


@pytest.mark.parametrize("dense", [0, 64])
def test_a_tree_finds_the_best_children_of_good_nodes(dense, monkeypatch):
    # Nodes picked out of a level one by one, or a level as a whole.
    monkeypatch.setattr(tree, "DENSE", dense)
    monkeypatch.setattr(tree, "GATHERED", 500)
    layout = Layout(46)
    q, k, _ = qkv(layout, 2, dim=4)
    blocks = parse("topk(keep=3, block=2)").blocks(layout.grid)
    found, _ = scores_of("tree(2)", q, k, blocks, torch.ones(1, 46, dtype=torch.bool), leaves=3)
    mean = [t[0].unflatten(0, (23, 2)).mean(1) for t in (q, k)]
    for head in range(2):
        # 23 leaves, 12, 6 nodes: those six are all kept.
        level, counts = [mean[1][:, head]], [torch.ones(23)]
        while len(level[0]) > 6:
            pairs = [(i, min(i + 1, len(level[0]) - 1)) for i in range(0, len(level[0]), 2)]
            weight = [counts[0][a] + (counts[0][b] if b != a else 0) for a, b in pairs]
            sums = [level[0][a] * counts[0][a] + (level[0][b] * counts[0][b] if b != a else 0) for a, b in pairs]
            level.insert(0, torch.stack([s / w for s, w in zip(sums, weight, strict=True)]))
            counts.insert(0, torch.stack(weight))
        for i in range(23):
            nodes = set(range(6))
            for depth in range(1, len(level)):
                below = [c for n in sorted(nodes) for c in (2 * n, 2 * n + 1) if c < len(level[depth])]
                score = {c: 0.4 * (mean[0][i, head] @ level[depth][c]).item() for c in below}
                nodes = set(below) if depth + 1 == len(level) else set(sorted(below, key=lambda c: -score[c])[:6])
            assert set(found[0, head, i].isfinite().nonzero()[:, 0].tolist()) == nodes
            assert all(abs(found[0, head, i, c].item() - score[c]) < 1e-12 for c in nodes)
    monkeypatch.undo()
    wide, _ = scores_of("tree(2)", q, k, blocks, torch.ones(1, 46, dtype=torch.bool), leaves=23)
    assert torch.equal(wide, scores_of("mean", q, k, blocks, torch.ones(1, 46, dtype=torch.bool))[0])


def test_heads_that_share_choose_by_the_mean_of_their_scores():
    q, _, k, blocks, *_ = parts_of()
    scores = scores_of("mean", q, k, blocks, valid_tokens(False))[0]
    for share, groups in ((2, 4), (4, 1), ("all", 1)):
        pattern = parse(f"topk(keep=3, share={share}, always=none, block={BLOCK}, key_block=2x2)")
        routes = pattern.choose(q, k, LAYOUT, scale=0.4)
        assert routes.groups == groups
        mean = scores.unflatten(1, (-1, 4 if share == "all" else share)).mean(2)
        best = torch.zeros(mean.shape, dtype=torch.bool).scatter(3, mean.topk(3).indices, True)
        assert torch.equal(routes.mask(0, blocks.columns), best.repeat_interleave(groups // best.shape[1], 1))
    with pytest.raises(ValueError, match=r"4 heads cannot be shared by 3: give a divisor of 4, or all"):
        attention(q, k, k, f"topk(keep=3, share=3, block={BLOCK})", LAYOUT)


def test_one_budget_of_all_heads_goes_to_the_pairs_that_carry_most():
    q, _, k, blocks, *_ = parts_of()
    scores = scores_of("mean", q, k, blocks, valid_tokens(False))[0]
    pattern = parse(f"topk(keep=0.25, per=all, always=none, block={BLOCK}, key_block=2x2)")
    mask = pattern.choose(q, k, LAYOUT, scale=0.4).mask(0, blocks.columns)
    number = 4 * math.ceil(0.25 * blocks.rows * blocks.columns)
    shares = scores.softmax(-1)
    assert mask.sum() == number and len({int(n) for n in mask.sum((0, 2, 3))}) > 1
    assert shares[mask].min() >= shares[~mask].max()
    pattern = parse(f"topp(p=0.5, per=all, always=none, least=0, block={BLOCK}, key_block=2x2)")
    mask = pattern.choose(q, k, LAYOUT, scale=0.4).mask(0, blocks.columns)
    assert shares[mask].sum() > 0.5 * 4 * blocks.rows > shares[mask].sum() - shares[mask].min()


def test_blocks_unlike_their_mean_are_listed_by_everyone():
    layout = Layout(64)
    q, k, _ = qkv(layout, 1, dim=8)
    # All but one block of queries and one of keys point one way; keys differ from block to block.
    q[:] = torch.ones(8) + 0.01 * q
    k[:] = torch.randn(8, 1, 8).repeat_interleave(8, 0) + 0.01 * k
    q[:, 16:24], k[:, 40:48] = torch.randn(8, 1, 8), torch.randn(8, 1, 8)
    listed = tile_choice(q, k, "topk(keep=2, alike=0.8, always=none, block=8)", layout)[0, 0]
    assert listed[2].all() and listed[:, 5].all()
    others = listed[[i for i in range(8) if i != 2]][:, [j for j in range(8) if j != 5]]
    assert (others.sum(1) == 2).all()
    plain = tile_choice(q, k, "topk(keep=2, alike=-1, always=none, block=8)", layout)
    assert torch.equal(plain, tile_choice(q, k, "topk(keep=2, always=none, block=8)", layout))


@pytest.mark.parametrize(
    "text", ["topk(keep=0.4, share=all", "topp(p=0.6, share=all, rest=mean", "topk(keep=0.3, per=all"]
)
def test_shared_lists_run_forward_and_backward_on_every_engine(text):
    layout = Layout((5, 6), 2)
    q, k, v = qkv(layout, 4, 2, dim=6, batch=2, grad=True)
    found = []
    for backend in ("reference", "tiles", *(() if "rest" in text else ("sdpa",))):
        out = attention(q, k, v, f"{text}, block=2x2)", layout, backend=backend)
        found.append([out, *torch.autograd.grad(out.square().sum(), (q, k, v))])
    for other in found[1:]:
        for a, b in zip(found[0], other, strict=True):
            assert (a - b).abs().max() < 1e-10


def test_choices_keep_no_scores_and_see_some_heads_at_a_time(monkeypatch):
    from visattn.patterns.choice import slices

    layout, pattern = Layout((8, 8)), parse("topp(p=0.5, block=2x2, score=parts(2x2))")
    q, k, _ = qkv(layout, 6, 3, dim=8)
    whole = pattern.choose(q, k, layout)
    monkeypatch.setitem(slices.SCORES, "cpu", 1)
    assert torch.equal(pattern.choose(q, k, layout).tiles, whole.tiles)
    visattn.clear_caches()
    assert np.isfinite(plan(pattern, layout).density)


@pytest.mark.parametrize(
    "text",
    [
        "topp(p=0.99, most=3, always=self+first(1), block=4)",
        "above(tau=-9.0, most=3, always=self+first(1), block=4)",
        "above(tau=-9.0, most=3, always=self+first(1), per=all, block=4)",
        "topk(keep=3, per=all, always=first(2), block=4)",
    ],
)
def test_padding_that_is_forced_takes_no_place(text):
    """What is listed is what would be, were the block of padding not forced."""
    layout = Layout(32)
    q, k, _ = qkv(layout, 2, dim=4, batch=2)
    mask = torch.ones(2, 32, dtype=torch.bool)
    mask[0, :4] = False
    chosen = parse(text).choose(q, k, layout, mask).mask(0, 8)
    listed = chosen[0].sum(-1)
    # A row of its own, or 16 rows that share.
    assert listed.sum() == 48 if "topk" in text else (listed[:, 1:] == 3).all()
    assert not chosen[0, :, 1:, 0].any()
