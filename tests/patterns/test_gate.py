"""Lists that trained weights choose."""

from pathlib import Path

import pytest
import torch

import visattn
from tests.golden.fill import fill_value, make_input
from tests.support.cases import qkv
from visattn import Layout, attention, parse
from visattn.patterns import routed_mask
from visattn.patterns.tailed import holding

GOLDEN = torch.load(Path(__file__).parents[1] / "golden" / "dynamic_gate.pt", weights_only=True)
LAYOUT = Layout((4, 6), 2, 1)
TEXT = "gate(by=topk(keep=3, block=2x2), dim=5)"


def weights(pattern, heads=4, head_dim=6):
    generator = torch.Generator().manual_seed(2)
    shapes = pattern.parameter_shapes(heads, head_dim, LAYOUT.grid)
    return {n: torch.randn(s, generator=generator, dtype=torch.float64) for n, s in shapes.items()}


def test_scores_are_those_of_seer_attention():
    case = GOLDEN[0]
    batch, length, heads, dim = case["shape"]
    found = []
    for i, number in ((0, heads), (1, case["kv_heads"])):
        noise = make_input((batch, length, number, dim), 10 * case["seed"] + i)
        levels = make_input((batch, -(-length // 64), number, dim), 10 * case["seed"] + 5 + i)
        found.append(noise + levels.repeat_interleave(64, 1)[:, :length])
    q, k = found
    named = case["parameters"]
    query, key = (fill_value(n, tuple(named[n])) for n in ("mask_linear_q.weight", "mask_linear_k.weight"))
    given = {"query": query, "key": key.repeat_interleave(heads // case["kv_heads"], 0)}
    pattern = parse(f"gate(by=topk(keep=0.5, block={case['block']}), dim={case['gate_dim']})")
    scores, _ = pattern.scores(q, k, Layout(length), None, given)
    # The original hides the future, and its last block is filled up.
    future = torch.ones(5, 5, dtype=torch.bool).triu(1)
    shares = scores.masked_fill(future, float("-inf")).softmax(-1)
    assert (shares - case["scores"])[:, :, :4].abs().max() < 1e-4 * case["scores"].std()


@pytest.mark.parametrize(
    "by", ["topk(keep=3, block=2x2)", "topp(p=0.5, block=2x3, rest=mean)", "above(tau=0.3, block=5)"]
)
@pytest.mark.parametrize("masked", [False, True])
def test_runs_what_the_scores_pick(by, masked):
    pattern = parse(f"gate(by={by}, dim=5)")
    q, k, v = qkv(LAYOUT, 4, 2, 6, batch=2, grad=True)
    key_mask = torch.rand(2, LAYOUT.length, generator=torch.Generator().manual_seed(5)) < 0.7 if masked else None
    given = weights(pattern)
    out = attention(q, k, v, pattern, LAYOUT, parameters=given, key_mask=key_mask)
    choice = pattern.choose(q, k, LAYOUT, key_mask, given)
    with holding(pattern.by, choice):
        expected = attention(q, k, v, pattern.by, LAYOUT, key_mask=key_mask, backend="reference")
    assert (out - expected).abs().max() < 1e-10
    found, wanted = (torch.autograd.grad(t.square().sum(), (q, k, v)) for t in (out, expected))
    assert all((a - b).abs().max() < 1e-10 for a, b in zip(found, wanted, strict=True))
    # The lists are not those of the pattern's own scores.
    own = routed_mask(pattern.by, LAYOUT, q, k, key_mask)
    with holding(pattern.by, choice):
        assert not torch.equal(routed_mask(pattern.by, LAYOUT, q, k, key_mask), own)
    alone = attention(
        q[:1], k[:1], v[:1], pattern, LAYOUT, parameters=given, key_mask=key_mask if key_mask is None else key_mask[:1]
    )
    assert (alone - out[:1]).abs().max() < 1e-10


def test_the_best_blocks_of_a_gate_by_hand():
    pattern, layout = parse("gate(by=topk(keep=1, always=none, block=4), dim=3, query=max, key=avg+min)"), Layout(12)
    q, k, _ = qkv(layout, 1, dim=4)
    given = weights(pattern, 1, 4)
    cut_q, cut_k = (t[0, :, 0].unflatten(0, (3, 4)) for t in (q, k))
    query = cut_q.amax(1) @ given["query"][0]
    key = torch.cat([cut_k.mean(1), cut_k.amin(1)], 1) @ given["key"][0]
    best = (query @ key.T).argmax(1)
    assert torch.equal(pattern.choose(q, k, layout, None, given).tiles[0, 0, :, 0], best)


def test_a_gate_without_weights_is_refused(tmp_path):
    q, k, v = qkv(LAYOUT, 4, 2, 6)
    with pytest.raises(
        ValueError, match="lists blocks by trained weights, and query and key are missing: pass parameters"
    ):
        attention(q, k, v, TEXT, LAYOUT)
    with pytest.raises(ValueError, match=r"query is \[1, 2, 3\] but gate"):
        attention(q, k, v, TEXT, LAYOUT, parameters={"query": torch.ones(1, 2, 3)})
    pytest.importorskip("diffusers")
    from tests.support import tiny_models

    model, _ = tiny_models.flux(single=1)
    with pytest.raises(ValueError, match="chooses by trained weights: pass weights= with a file"):
        visattn.apply(model, "gate(by=topk(keep=0.3, block=2x3))")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("gate", "gate needs by"),
        ("gate(by=na(3))", "by=na.* lists no blocks by scores: give topk"),
        ("gate(by=topk(every=2))", "leave alike, every, skip and rests but drop and mean out"),
        ("gate(by=topk(rest=slope))", "leave alike, every, skip"),
        ("gate(by=above(bar=diag))", "bar=diag is made of means, a gate has none"),
        ("gate(by=topk, dim=0)", "dim=0 must be one whole number"),
        ("gate(by=topk, query=sum)", "query='sum' must be of max, min and avg"),
        ("gate(by=topk, key=avg+avg)", "each once"),
    ],
)
def test_bad_parameters_say_what_to_give(text, message):
    with pytest.raises(ValueError, match=message):
        parse(text)
