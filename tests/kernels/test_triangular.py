"""Lines that are causal as a whole, which torch's causal kernel runs: exactly those, and with what they are."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.cases import gradients, layouts, qkv
from tests.support.oracles import dense_attention
from visattn import attention, clear_caches, explain
from visattn.dispatch import load
from visattn.kernels import sdpa, triangular
from visattn.layout import Layout
from visattn.patterns import Neighborhood, dense_mask, parse
from visattn.problem import Problem, is_triangular

LINE = "na(window=-1, causal=true)"
# Texts and layouts: short and long axes, strides, axes without extent, text on either side.
LINES = {
    "line": (LINE, Layout(37)),
    "longer window": ("na(window=99, causal=true)", Layout(20)),
    "stride": ("na(window=-1, stride=4, causal=true)", Layout(21)),
    "column": ("na(window=3x-1x5, causal=0x1x0)", Layout((1, 18, 1))),
    "prefix": (LINE, Layout(19, prefix=3)),
    "text": (LINE, Layout(19, prefix=2, suffix=5)),
}
OTHERS = {
    "two causal axes": ("na(window=-1x-1, causal=true)", Layout((4, 5))),
    "one causal axis": ("na(window=-1x-1, causal=1x0)", Layout((4, 5))),
    "the last axis": ("na(window=-1x-1, causal=0x1)", Layout((4, 5))),
    "short window": ("na(window=11, causal=true)", Layout(12)),
    "dilated": ("na(window=4, dilation=2, causal=true)", Layout(9)),
    "not causal": ("na(window=5)", Layout(12)),
    "groups": ("groups(count=3)", Layout(12)),
    "other keys": (LINE, Layout(6, key_layout=Layout(6, prefix=2))),
}


def first_dense(mask, layout):
    """A mask with the rows and columns of dense tokens in front."""
    at = torch.arange(layout.length)
    dense = (at < layout.prefix) | (at >= layout.prefix + layout.tokens)
    order = torch.cat([at[dense], at[~dense]])
    return mask[order][:, order], int(dense.sum())


@settings(deadline=None, max_examples=150)
@given(
    layout=layouts(sides=(9, 4, 3)),
    window=st.sampled_from([-1, 1, 2, 3, 8, 9]),
    stride=st.integers(1, 3),
    dilation=st.integers(1, 2),
    kind=st.sampled_from(["causal=true", "causal=false", "circular=true"]),
)
def test_a_line_is_recognised_exactly_where_its_mask_is_a_triangle(layout, window, stride, dilation, kind):
    try:
        pattern = parse(f"na(window={window}, stride={stride}, dilation={dilation}, {kind})")
        mask, dense = first_dense(dense_mask(pattern, layout), layout)
    except ValueError:
        return
    triangle = torch.ones_like(mask).tril() | (torch.arange(layout.length) < dense)[:, None]
    # A single token is dense attention.
    assert is_triangular(pattern, layout) == (layout.tokens > 1 and torch.equal(mask, triangle))


def test_calls_alike_look_at_a_line_once(monkeypatch):
    clear_caches()
    asked, layout = [], Layout(23)
    spans = Neighborhood.spans
    monkeypatch.setattr(Neighborhood, "spans", lambda *given: asked.append(given) or spans(*given))
    q, k, v = qkv(layout, 1, 1, dim=8, batch=1)
    for _ in range(3):
        attention(q, k, v, LINE, layout, backend="sdpa")
    assert len(asked) == 1


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize("name", LINES)
def test_equals_masked_dense_attention_by_the_causal_kernel(name, kv_heads, monkeypatch):
    text, layout = LINES[name]
    q, k, v = qkv(layout, 4, kv_heads, dim=11, batch=2, grad=True)
    monkeypatch.setattr(sdpa, "visible", lambda *_: pytest.fail("a mask was made"))
    # Blocks of a few queries.
    monkeypatch.setattr("visattn.kernels.scores.SCORES", 4 * 2 * layout.length * 5)
    out, lse = attention(q, k, v, text, layout, backend="sdpa", return_lse=True)
    mask = dense_mask(text, layout)
    truth = dense_attention(q, k, v, mask, 11**-0.5)
    keys = k.repeat_interleave(4 // kv_heads, 2)
    logits = 11**-0.5 * torch.einsum("bqhd,bkhd->bqhk", q, keys)
    sums = logits.masked_fill(~mask[None, :, None], -torch.inf).logsumexp(-1)
    assert (out - truth).abs().max() < 1e-12 and (lse - sums).abs().max() < 1e-12
    ours, theirs = (gradients(torch.cat([o, s[..., None]], 3), (q, k, v)) for o, s in ((out, lse), (truth, sums)))
    assert all((a - b).abs().max() < 1e-12 for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("name", OTHERS)
def test_other_patterns_keep_their_masks(name, monkeypatch):
    text, layout = OTHERS[name]
    assert not is_triangular(parse(text), layout)
    monkeypatch.setattr(sdpa, "attend_triangular", lambda *_: pytest.fail("taken for a causal line"))
    q, k, v = qkv(layout)
    out = attention(q, k, v, text, layout, backend="sdpa")
    assert (out - dense_attention(q, k, v, dense_mask(text, layout), 10**-0.5)).abs().max() < 1e-12


def test_a_key_mask_is_never_left_out():
    layout = Layout(15, prefix=2)
    q, k, v = qkv(layout, batch=2)
    key_mask = torch.rand(2, 17, generator=torch.Generator().manual_seed(3)) < 0.6
    out = attention(q, k, v, LINE, layout, key_mask=key_mask, backend="sdpa")
    seen = dense_mask(LINE, layout) & key_mask[:, None]
    assert (out - dense_attention(q, k, v, seen, 10**-0.5)).abs().max() < 1e-12


def test_dense_tokens_that_do_not_see_each_other_are_no_line():
    from visattn.parallel.parts import Rows, SpannedPart

    part = SpannedPart(parse(LINE), Rows((6,), 0, 0, 6, 0, 6), dense_pairs=False)
    assert is_triangular(part, Layout(6)) and not is_triangular(part, Layout(6, prefix=1))


def test_auto_takes_it_for_half_of_dense_attention():
    q = torch.empty(1, 4096, 2, 64)
    found = explain(LINE, Layout(4096), q)
    assert found.choice == "sdpa" and "torch's causal kernel is an estimated" in found.reason
    half, whole = (
        load("sdpa").cost(Problem(parse(t), Layout(4096), 1, 2, 2, 64, q.dtype, "cpu")) for t in (LINE, "dense")
    )
    assert 0.5 < half / whole < 0.65
    masked = explain(LINE, Layout(4096), q, key_mask=True)
    assert {c.backend.name: c.cost for c in masked.candidates}["sdpa"] > whole


def test_long_lines_need_no_mask_that_would_not_fit():
    problem = Problem(parse(LINE), Layout(100_000), 1, 1, 1, 64, torch.float32, "cpu")
    assert load("sdpa").supports(problem).ok
    refused = load("sdpa").supports(
        Problem(parse(LINE), Layout(100_000), 1, 1, 1, 64, torch.float32, "cpu", key_mask=True)
    )
    assert refused.reason.startswith("its dense mask of 1e+10 entries is over")


def test_dense_tokens_cost_their_own_call():
    assert triangular.triangular_part(Layout(4096, suffix=1024)) == pytest.approx(
        triangular.triangular_part(Layout(5120)) + 0.2
    )
