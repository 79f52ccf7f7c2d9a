"""Queries of a block that copy the output of another one."""

from pathlib import Path

import pytest
import torch

from tests.support.cases import gradients, qkv
from tests.support.golden import golden_inputs
from tests.support.oracles import dense_attention
from visattn import Layout, attention, attention_rows, parse
from visattn.patterns.choice.listening import listening

GOLDEN = torch.load(Path(__file__).parents[1] / "golden" / "dynamic_pruned.pt", weights_only=True)[0]
LAYOUT = Layout((5, 7), 2, 1)
TEXT = "pruned(by=topk(keep=2, block=3x4))"


def test_is_what_bidirectional_sparse_attention_gives():
    batch, length, heads, _ = GOLDEN["shape"]
    q, k, v = golden_inputs(GOLDEN)
    pattern, layout = parse(GOLDEN["pattern"]), Layout(length)
    found = pattern.cluster(q, k, layout)
    assert torch.equal(found.listed[:, :, :8], GOLDEN["mask"])
    kept = (found.queries < 8).view(batch, heads, 8, 64)
    assert torch.equal(kept.nonzero()[:, 3].view(GOLDEN["kept_queries"].shape), GOLDEN["kept_queries"].long())
    stored = GOLDEN["output"]
    for backend in ("reference", "ordered"):
        out = attention(q, k, v, pattern, layout, backend=backend).reshape(-1)[:: stored["stride"]]
        assert (out[: len(stored["values"])] - stored["values"]).abs().max() < 1e-4 * stored["values"].std()


def by_hand(pattern, q, layout, valid):
    """Block of each grid token; per head which tokens are kept, and whose output each has; tokens one by one."""
    grid, box = layout.grid, pattern.by.blocks(layout.grid).queries
    block = [(i // grid[1] // box[0]) * -(-grid[1] // box[1]) + i % grid[1] // box[1] for i in range(layout.tokens)]
    kept, copied = set(), list(range(layout.tokens))
    for b in set(block):
        members = [i for i in range(layout.tokens) if block[i] == b]
        there = [i for i in members if valid[i]] or members
        middle = q[there[len(there) // 2]]
        cosine = {i: torch.cosine_similarity(q[i], middle, 0).item() for i in there}
        mine = sorted(sorted(there), key=lambda i: round(cosine[i], 12))[: max(1, -(-len(there) // 2))]
        kept |= set(mine)
        # Distances are those of slots of a whole block in row-major order.
        slot = {i: i // grid[1] % box[0] * box[1] + i % grid[1] % box[1] for i in members}
        for i in members:
            copied[i] = min(mine, key=lambda j: (abs(slot[i] - slot[j]), slot[j]))
    return block, kept, copied


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("text", [TEXT, "pruned(by=topp(p=0.5, block=3x4, always=none))"])
def test_kept_queries_attend_and_the_others_copy(text, masked):
    pattern, (q, k, v) = parse(text), qkv(LAYOUT, 2, 1, 6, batch=2, grad=True)
    key_mask = torch.rand(2, LAYOUT.length, generator=torch.Generator().manual_seed(5)) < 0.7 if masked else None
    at, found = slice(2, 37), pattern.cluster(q, k, LAYOUT, key_mask)
    rows = torch.arange(LAYOUT.length).repeat(2, 2, 1)
    mask = torch.ones(2, 2, LAYOUT.length, LAYOUT.length, dtype=torch.bool)
    for b in range(2):
        valid = [True] * 35 if key_mask is None else key_mask[b, at].tolist()
        for h in range(2):
            block, kept, copied = by_hand(pattern, q[b, at, h].detach(), LAYOUT, valid)
            assert {i for i in range(35) if found.queries[b, h, i] < 4} == kept
            assert found.copied[b, h].tolist() == copied
            rows[b, h, at] = torch.tensor(copied) + 2
            own = torch.tensor(block)
            mask[b, h, at, at] = found.listed[b, h][own[copied]][:, own]
            # The score of a block of queries is that of its kept ones.
            ones = torch.tensor([[i in kept and block[i] == j for i in range(35)] for j in range(4)]).double()
            there = torch.nn.functional.one_hot(own, 4).T.double() * torch.tensor(valid)
            means = [ones / ones.sum(1, keepdim=True) @ q[b, at, h], (there / there.sum(1, keepdim=True)) @ k[b, at, 0]]
            best = (means[0] @ means[1].T).argmax(1)
            assert found.listed[b, h, torch.arange(4), best].all()
    if key_mask is not None:
        mask &= key_mask[:, None, None]
    queries = q.gather(1, rows.transpose(1, 2)[..., None].expand_as(q))
    expected = dense_attention(queries, k.repeat_interleave(2, 2), v.repeat_interleave(2, 2), mask, 6**-0.5)
    wanted = gradients(expected, (q, k, v))
    for backend in ("reference", "ordered"):
        out = attention(q, k, v, pattern, LAYOUT, key_mask=key_mask, backend=backend)
        assert (out - expected).abs().max() < 1e-10
        assert all((a - b).abs().max() < 1e-10 for a, b in zip(gradients(out, (q, k, v)), wanted, strict=True))
    weights = attention_rows(q, k, pattern, LAYOUT, torch.arange(LAYOUT.length), key_mask=key_mask)
    assert (torch.einsum("bhrs,bshd->brhd", weights, v.repeat_interleave(2, 2)) - expected).abs().max() < 1e-10


def test_only_kept_queries_are_counted_and_keeping_all_prunes_nothing():
    q, k, v = qkv(LAYOUT, 2, dim=6)
    heard = []
    with listening(heard.append):
        attention(q, k, v, TEXT, LAYOUT, backend="ordered")
    assert 0.25 < heard[0].max() < 0.35 and len(heard) == 1
    whole = attention(q, k, v, "pruned(by=topk(keep=2, block=3x4), keep=1.0)", LAYOUT, backend="ordered")
    assert (whole - attention(q, k, v, "topk(keep=2, block=3x4)", LAYOUT)).abs().max() < 1e-10


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("pruned(by=na(window=3))", "by=na.* lists no blocks by scores"),
        ("pruned(by=topk, keep=0.0)", "keep=0.0 must be a share of the queries of a block, above 0 and at most 1"),
        ("pruned(by=topk, keep=1.5)", "keep=1.5 must be"),
        ("pruned(by=topk(score=bounds))", "leave score, rest, alike, every, skip, causal and bar=diag out"),
        ("pruned(by=topk(rest=mean))", "leave score, rest"),
        ("pruned(by=topk(causal=true))", "leave score, rest"),
        ("pruned(by=topk(every=4))", "leave score, rest"),
    ],
)
def test_bad_parameters_say_what_to_give(text, message):
    with pytest.raises(ValueError, match=message):
        parse(text)
