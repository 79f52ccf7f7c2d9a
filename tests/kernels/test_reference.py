import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import visattn
from tests.support.cases import gradients, layouts, qkv
from tests.support.oracles import dense_attention
from visattn.layout import Layout
from visattn.patterns import dense_mask, parse

PATTERNS = [
    "dense",
    "na(window=3)",
    "na(window=4, stride=2)",
    "na(window=3, causal=true)",
    "halo(block=2, halo=1)",
    "clear(radius=2)",
]


def close(a, b, tolerance=1e-10):
    assert a.dtype == b.dtype and a.shape == b.shape
    assert (a - b).abs().max() <= tolerance


@settings(deadline=None, max_examples=30)
@given(
    layout=layouts(),
    text=st.sampled_from(PATTERNS),
    kv_heads=st.sampled_from([1, 2, 4]),
    dim=st.sampled_from([1, 10, 12]),
    masked=st.booleans(),
)
def test_equals_masked_dense_attention_in_float64(layout, text, kv_heads, dim, masked):
    q, k, v = qkv(layout, 4, kv_heads, dim, batch=2, grad=True)
    mask = dense_mask(text, layout)
    key_mask = torch.rand(2, layout.length, generator=torch.Generator().manual_seed(7)) < 0.7 if masked else None
    out, lse = visattn.attention(q, k, v, text, layout, key_mask=key_mask, backend="reference", return_lse=True)
    seen = mask.expand(2, -1, -1) if key_mask is None else mask & key_mask[:, None]
    truth = dense_attention(q, k, v, seen, dim**-0.5)
    close(out, truth)
    for ours, theirs in zip(gradients(out, (q, k, v)), gradients(truth, (q, k, v)), strict=True):
        close(ours, theirs)
    assert lse.shape == q.shape[:3]
    assert torch.equal(lse == -math.inf, ~seen.any(-1)[..., None].expand_as(lse))


def test_log_sum_exp_is_that_of_the_visible_logits():
    layout = Layout((4, 5), prefix=2)
    q, k, v = qkv(layout, dim=8)
    _, lse = visattn.attention(q, k, v, "na(window=3)", layout, scale=0.3, backend="reference", return_lse=True)
    logits = 0.3 * torch.einsum("bqhd,bkhd->bqhk", q, k)
    mask = dense_mask("na(window=3)", layout)
    close(lse, logits.masked_fill(~mask[None, :, None], -math.inf).logsumexp(-1))


@pytest.mark.parametrize("backend", ["reference", "sdpa"])
def test_rows_without_a_visible_key_are_zero_with_finite_gradients(backend):
    layout = Layout((3, 3))
    q, k, v = qkv(layout, grad=True)
    key_mask = torch.ones(1, 9, dtype=torch.bool)
    key_mask[0, 4] = False
    out = visattn.attention(q, k, v, "na(window=1)", layout, key_mask=key_mask, backend=backend)
    assert (out[0, 4] == 0).all() and torch.equal(out[0, :4], v[0, :4])
    assert all(g.isfinite().all() for g in gradients(out, (q, k, v)))


def test_half_precision_is_computed_in_float32():
    layout = Layout(12)
    q, k, v = qkv(layout, dtype=torch.bfloat16)
    out, lse = visattn.attention(q, k, v, "na(window=5)", layout, backend="reference", return_lse=True)
    wide = visattn.attention(q.float(), k.float(), v.float(), "na(window=5)", layout, backend="reference")
    assert out.dtype == torch.bfloat16 and lse.dtype == torch.float32
    assert torch.equal(out, wide.bfloat16())


def test_refuses_scores_that_do_not_fit_in_memory():
    layout = Layout((256, 256))
    q = torch.empty(1, 1, 1, 8).expand(1, layout.length, 1, 8)
    with pytest.raises(ValueError, match=r"backend 'reference' cannot run this call: its score matrix of 4.29e\+09"):
        visattn.attention(q, q, q, "na(window=3)", layout, backend="reference")


def rpb_bias(layout, window, dilation, rpb):
    """Bias of every pair, by loops: rpb[h, key position - query position + window - 1] in a dilation group."""
    from tests.support.oracles import grid_tokens

    tokens = grid_tokens(layout.grid)
    bias = torch.zeros(len(rpb), layout.length, layout.length, dtype=rpb.dtype)
    for i, q in enumerate(tokens):
        for j, k in enumerate(tokens):
            offset = [b // d - a // d + w - 1 for a, b, w, d in zip(q, k, window, dilation, strict=True)]
            if all(0 <= o < 2 * w - 1 for o, w in zip(offset, window, strict=True)):
                bias[:, layout.prefix + i, layout.prefix + j] = rpb[(slice(None), *offset)]
    return bias


@pytest.mark.parametrize(
    ("grid", "text", "window", "dilation"),
    [
        ((7,), "na(window=3, dilation=2)", (3,), (2,)),
        ((5, 6), "na(window=3x4)", (3, 4), (1, 1)),
        ((5, 6), "na(window=2x3, dilation=2x1, causal=0x1)", (2, 3), (2, 1)),
        ((4, 3), "na(window=7x-1)", (7, 3), (1, 1)),
        ((2, 3, 4), "na(window=1x3x3)", (1, 3, 3), (1, 1, 1)),
    ],
)
def test_relative_position_bias(grid, text, window, dilation):
    layout = Layout(grid, 2, 1)
    q, k, v = qkv(layout, grad=True)
    sides = parse(text).rpb_shape(grid)
    assert sides == tuple(2 * w - 1 for w in window)
    rpb = torch.randn(2, *sides, dtype=torch.float64, requires_grad=True)
    out = visattn.attention(q, k, v, text, layout, rpb=rpb)
    truth = dense_attention(q, k, v, dense_mask(text, layout), 10**-0.5, rpb_bias(layout, window, dilation, rpb))
    close(out, truth)
    inputs = (q, k, v, rpb)
    for ours, theirs in zip(gradients(out, inputs), gradients(truth, inputs), strict=True):
        close(ours, theirs)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"rpb": torch.zeros(2, 5, 5, dtype=torch.float64)},
            r"rpb is \[2, 5, 5\] but na\(window=5\) with 2 heads takes \[2, 9, 9\]",
        ),
        (
            {"pattern": "dense", "rpb": torch.zeros(2, 9, 9)},
            r"rpb is given but dense has no relative position bias: only na",
        ),
        (
            {"key_mask": torch.ones(1, 3, dtype=torch.bool)},
            r"key_mask is torch.bool \[1, 3\] but must be torch.bool \[1, 30\]",
        ),
        ({"key_mask": torch.ones(1, 30)}, r"key_mask is torch.float32 \[1, 30\] but must be torch.bool"),
        ({"pool_weight": torch.ones(2, 2)}, r"pool_weight is given but na\(window=5\) pools no keys: only clear"),
        ({"k": torch.zeros(1, 30, 2, 8, dtype=torch.float64)}, r"must agree in batch, tokens and head_dim"),
        ({"v": torch.zeros(1, 30, 1, 10, dtype=torch.float64)}, r"and k and v also in heads"),
        ({"q": torch.zeros(1, 30, 10, dtype=torch.float64)}, r"must all be \[batch, tokens, heads, head_dim\]"),
        (
            {"q": torch.zeros(1, 30, 3, 10, dtype=torch.float64)},
            r"q has 3 heads, not a multiple of the 2 heads of k and v",
        ),
        (
            {"q": torch.zeros(1, 30, 2, 10)},
            r"must be one floating-point dtype of .*: cast them first",
        ),
        (
            {"q": torch.zeros(1, 30, 2, 10, dtype=torch.float64, device="meta")},
            r"q on meta, k on cpu and v on cpu must be on one",
        ),
        (
            {"key_mask": torch.ones(1, 30, dtype=torch.bool, device="meta")},
            r"key_mask is on meta but q on cpu: move it there",
        ),
        ({"layout": Layout((5, 7))}, r"grid 5x7 has 35 tokens but q has 30: pass layout=Layout\(\(5, 6\)\)"),
        ({"backend": "cuda"}, r"unknown backend 'cuda'; backends: auto, .*reference"),
    ],
)
def test_bad_input(change, message):
    q, k, v = qkv(Layout((5, 6)))
    arguments = {"q": q, "k": k, "v": v, "pattern": "na(window=5)", "layout": Layout((5, 6))} | change
    with pytest.raises(ValueError, match=message):
        visattn.attention(**arguments)


@pytest.mark.parametrize(
    ("grid", "window", "stride", "dilation", "causal"),
    [
        ((13,), (5,), (1,), (2,), (False,)),
        ((12,), (4,), (2,), (1,), (True,)),
        ((9, 8), (3, 4), (1, 2), (2, 1), (False, False)),
        ((8, 8), (7, 7), (1, 1), (1, 1), (True, False)),
        ((4, 6, 6), (2, 3, 4), (1, 1, 2), (2, 1, 1), (True, False, False)),
    ],
)
def test_equals_natten(grid, window, stride, dilation, causal):
    natten = pytest.importorskip("natten")
    q, k, v = qkv(Layout(grid), dim=16, dtype=torch.float32)
    pattern = visattn.patterns.Neighborhood(window, stride, dilation, causal)
    theirs = getattr(natten, f"na{len(grid)}d")(
        *(t.unflatten(1, grid) for t in (q, k, v)),
        kernel_size=window,
        stride=stride,
        dilation=dilation,
        is_causal=causal,
    )
    ours = visattn.attention(q, k, v, pattern, Layout(grid), backend="reference")
    close(ours, theirs.flatten(1, len(grid)), 2e-6)
