"""Patterns that differ from head to head: told ones, and the best of several by measurement."""

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import visattn
from tests.golden.fill import make_input
from tests.support.cases import gradients, layouts, qkv
from visattn import Layout, attention, attention_rows, parse
from visattn.kernels import heads as engine
from visattn.patterns import Best, PerHead
from visattn.problem import Call

GOLDEN = torch.load(Path(__file__).parents[1] / "golden" / "dynamic_heads.pt", weights_only=True)


def test_errors_and_choice_are_those_of_sparse_videogen(monkeypatch):
    """The original's masks of space and time, its rows and its errors."""
    case = GOLDEN[0]
    batch, length, heads, dim = case["shape"]
    found = []
    for i in range(3):
        levels = make_input((batch, -(-length // case["run"]), heads, dim), 10 * case["seed"] + 5 + i)
        noise = make_input((batch, length, heads, dim), 10 * case["seed"] + i)
        found.append(noise + case["level"] * levels.repeat_interleave(case["run"], 1)[:, :length])
    q, k, v = found
    per_frame, frames = case["tokens_per_frame"], case["frames"]
    x = torch.arange(length)
    spatial = (x[:, None] // 128 - x // 128).abs() < 2 * per_frame // 128
    spatial |= (x < per_frame)[None]
    turned = x % per_frame * frames + x // per_frame
    masks = {"na(window=3)": spatial, "na(window=5)": spatial[turned][:, turned]}
    real = engine.attention_rows

    def rows_of(q, k, pattern, layout, rows, **options):
        if pattern == "dense":
            return real(q, k, pattern, layout, rows, **options)
        logits = torch.einsum("brhd,bshd->bhrs", q[:, rows], k) * options["scale"]
        return logits.masked_fill(~masks[str(pattern)][rows], float("-inf")).softmax(-1)

    monkeypatch.setattr(engine, "attention_rows", rows_of)
    monkeypatch.setattr(engine, "sampled_rows", lambda *_: case["rows"])
    call = Call(parse("best(of=[na(window=3), na(window=5)])"), Layout(length), dim**-0.5)
    errors = engine.row_errors(q, k, v, call)[:, 0]
    assert (errors - case["mse"]).abs().max() < 1e-4 * case["mse"].std()
    assert torch.equal(engine.best_patterns(q, k, v, call)[0], case["best"])


PARTS = ("dense", "na(window=3)", "topk(keep=0.3, block=4)", "topp(p=0.6, block=3, rest=mean)", "halo(block=4, halo=1)")


@settings(deadline=None, max_examples=10)
@given(
    data=st.data(),
    layout=layouts(sides=(30, 8, 5)),
    kv_heads=st.sampled_from([1, 2, 4]),
    masked=st.booleans(),
    told=st.booleans(),
)
def test_every_head_is_that_of_its_pattern(data, layout, kv_heads, masked, told):
    parts = data.draw(st.lists(st.sampled_from(PARTS), min_size=2, max_size=3, unique=True))
    q, k, v = qkv(layout, 4, kv_heads, 6, batch=2, grad=True)
    key_mask = None
    if masked:
        key_mask = torch.rand(2, layout.length, generator=torch.Generator().manual_seed(5)) < 0.7
    if told:
        pattern = parse(f"perhead(heads={{0: {parts[0]}, 2-: {parts[1]}}}, rest={parts[-1]})")
        chosen = [pattern.patterns.index(each) for each in pattern.of_heads(4)]
        assert [str(pattern.of_heads(4)[i]) for i in (0, 2, 3)] == [str(parse(parts[i])) for i in (0, 1, 1)]
        chosen = torch.tensor([chosen, chosen])
    else:
        pattern = parse(f"best(of=[{', '.join(parts)}], rows=8)")
        chosen = engine.best_patterns(q, k, v, Call(pattern, layout, 6**-0.5, key_mask))
    whole = [attention(q, k, v, each, layout, key_mask=key_mask, return_lse=True) for each in pattern.patterns]
    sample, token = torch.arange(2)[:, None, None], torch.arange(layout.length)[None, :, None]
    picked = chosen[:, None], sample, token, torch.arange(4)
    expected, lses = (torch.stack(each)[picked] for each in zip(*whole, strict=True))
    out, lse = attention(q, k, v, pattern, layout, key_mask=key_mask, return_lse=True)
    assert (out - expected).abs().max() < 1e-10
    assert torch.allclose(lse, lses)
    for a, b in zip(gradients(out, (q, k, v)), gradients(expected, (q, k, v)), strict=True):
        assert (a - b).abs().max() < 1e-10
    # Samples do not know each other.
    for b in range(2):
        own = None if key_mask is None else key_mask[b : b + 1]
        alone = attention(q[b : b + 1], k[b : b + 1], v[b : b + 1], pattern, layout, key_mask=own)
        assert (alone - out[b : b + 1]).abs().max() < 1e-10
    if told:
        weights = attention_rows(q, k, pattern, layout, range(layout.length), key_mask=key_mask)
        values = v.repeat_interleave(4 // kv_heads, 2)
        assert (torch.einsum("bhrs,bshd->brhd", weights, values) - out).abs().max() < 1e-10


def test_best_takes_what_is_nearest_to_dense_attention():
    layout = Layout((8, 8))
    q, k, v = qkv(layout, 2, dim=8)
    # One head looks at its row of the grid, the other at its column.
    place = torch.nn.functional.one_hot(torch.arange(8), 8).double() * 6
    axis = [place.repeat_interleave(8, 0), place.repeat(8, 1)]
    q, k = (torch.stack(axis, 1)[None] for _ in range(2))
    pattern = parse("best(of=[na(window=-1x3), na(window=3x-1)])")
    chosen = engine.best_patterns(q, k, v, Call(pattern, layout, 1.0))
    assert chosen.tolist() == [[1, 0]]
    near, dense = (attention(q, k, v, each, layout, scale=1.0) for each in (pattern, "dense"))
    assert (near - dense).abs().max() < 1e-3
    assert parse("best(of=[dense, na(window=3x3)])").needs_steps is False
    assert engine.best_patterns(q, k, v, Call(parse("best(of=[na(window=3x3), dense])"), layout, 1.0)).all()


def test_texts_and_equality():
    for text in (
        "best(of=[na(window=3x3), topk(keep=0.2)], rows=32)",
        "perhead(heads={0-3: dense, 5: topk(keep=0.2, score=parts(4x4)), 7-: na(window=9x9)}, rest=na(window=5x5))",
    ):
        pattern = parse(text)
        assert str(pattern) == text
        assert parse(str(pattern)) == pattern and hash(parse(str(pattern))) == hash(pattern)
    given = PerHead({"4-": "na(window=3x3)", 0: "dense"}, "na(window=5x5)")
    assert given == parse("perhead(heads={0: dense, 4-: na(window=3x3)}, rest=na(window=5x5))")
    assert Best(["dense", "na(window=3)"]) == parse("best(of=[dense, na(3)])")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("best(of=[na(window=3x3)])", "of has 1 pattern: give at least two"),
        ("best(of=na(window=3x3))", "must be several patterns, like"),
        (
            "best(of=[na(window=3x3), linear])",
            "of: linear.* is a composition: give patterns that are lists of key tiles",
        ),
        ("best(of=[dense, na(3)], rows=0)", "rows=0 must be one whole number of at least 1$"),
        ("best(of=[dense, na(3)], every=0)", "every=0 must be one whole number"),
        ("best(of=[dense, na(3)], drift=0)", "drift=0 must be a number above 0"),
        ("best(of=[dense, nothing])", "unknown pattern 'nothing'"),
        ("best", "best needs of"),
        ("perhead(heads={})", "heads={} names no head"),
        ("perhead(heads=[dense, na(3)])", "is no pair of heads and a pattern"),
        ("perhead(heads=3)", "must map heads to patterns"),
        ("perhead(heads={0-3 dense})", "write heads: pattern in braces"),
        ("perhead(heads={a: dense})", "heads: 'a' must be one head like 3, or a range like 0-3 or 4-"),
        ("perhead(heads={3-1: dense})", "heads 3-1 is empty"),
        ("perhead(heads={0-3: dense, 2: na(3)})", "heads 0-3 and 2 overlap"),
        ("perhead(heads={0-: dense, 2: na(3)})", "heads 0- and 2 overlap"),
        ("perhead(heads={0: dense}, rest=flow)", "rest: flow is a composition"),
    ],
)
def test_bad_parameters_say_what_to_give(text, message):
    with pytest.raises(ValueError, match=message):
        parse(text)


def test_bad_calls_say_what_to_give():
    layout = Layout((4, 4))
    q, k, v = qkv(layout, 2, dim=4)
    with pytest.raises(ValueError, match=r"heads 2 of perhead.* are not among the 2 heads of the call"):
        attention(q, k, v, "perhead(heads={2: dense}, rest=na(window=3x3))", layout)
    with pytest.raises(ValueError, match="has 3 values but the grid has 2 axes"):
        attention(q, k, v, "best(of=[dense, na(window=3x3x3)])", layout)
    with pytest.raises(ValueError, match="chooses by outputs, and rows have no values"):
        attention_rows(q, k, "best(of=[dense, na(window=3x3)])", layout, [0])
    with pytest.raises(ValueError, match="has no tile plan: it is another list of tiles for each head"):
        visattn.plan("best(of=[dense, na(window=3x3)])", layout)
    with pytest.raises(ValueError, match=r"every=3.* knows no steps"):
        attention(q, k, v, "best(of=[dense, na(window=3x3)], every=3)", layout)
