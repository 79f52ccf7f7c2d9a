"""Clipped softmax against dense matrices of weights in float64, and the outputs of its authors' code."""

import itertools
import math
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import visattn
from tests.golden.fill import fill_value, make_input
from tests.patterns.test_mixed import SPARSE, compare, draw, seen_by
from tests.support.cases import qkv
from visattn import Layout, attention, parse
from visattn.patterns import Clipped

GOLDEN = torch.load(Path(__file__).parents[1] / "golden" / "quantizable.pt", weights_only=True)


def slow_clipped(q, k, v, seen, scale, pattern):
    """clip((zeta - gamma) softmax(scale q k) + gamma, 0, 1) v, one sample, head and query at a time."""
    rows = []
    for b, h, i in itertools.product(range(q.shape[0]), range(q.shape[2]), range(q.shape[1])):
        keys, other = seen[b, i].nonzero()[:, 0], h * k.shape[2] // q.shape[2]
        gamma = -pattern.alpha / max(1, len(keys)) if pattern.gamma is None else pattern.gamma
        shares = (scale * k[b, keys, other] @ q[b, i, h]).softmax(0)
        rows.append(((pattern.zeta - gamma) * shares + gamma).clamp(0, 1) @ v[b, keys, other])
    return torch.stack(rows).view(q.shape[0], q.shape[2], q.shape[1], -1).transpose(1, 2)


@pytest.mark.parametrize("sparse", SPARSE)
@settings(max_examples=5)
@given(data=st.data())
def test_it_equals_its_formula_with_gradients(sparse, data):
    ends = data.draw(st.sampled_from([{"alpha": 0.5}, {"alpha": 2}, {"gamma": -0.1}, {"gamma": -0.05, "zeta": 1.3}]))
    pattern = Clipped(parse(sparse), **ends)
    layout, (q, k, v), key_mask, scale, parameters = draw(data, pattern)
    assert not parameters
    # Logits wide enough that weights are clipped at either end.
    scale = 4 * (scale or q.shape[3] ** -0.5)
    out = attention(q, k, v, pattern, layout, key_mask=key_mask, scale=scale)
    truth = slow_clipped(q, k, v, seen_by(pattern.sparse, layout, key_mask, 2), scale, pattern)
    compare(out, truth, (q, k, v))


@pytest.mark.parametrize("name", ["clipped alpha", "clipped gamma"])
def test_outputs_of_the_authors_code(name):
    case, x = GOLDEN["cases"][name], make_input(GOLDEN["input_shape"], GOLDEN["input_seed"]).double()
    q, k, v = (
        (x @ fill_value(f"{part}.weight", (24, 24)).double().T * (3 if part == "query" else 1))
        + fill_value(f"{part}.bias", (24,)).double() * 1
        for part in ("query", "key", "value")
    )
    q, k, v = (t.unflatten(2, (3, 8)) for t in (q, k, v))
    out = attention(q, k, v, Clipped(**case["ours"]), Layout(GOLDEN["grid"]))
    assert (out.flatten(2) - case["output"]).abs().max() < 1e-5


def test_without_clipping_it_is_the_sparse_pattern():
    layout = Layout((6, 5), 2)
    q, k, v = qkv(layout)
    for sparse in (*SPARSE, "clear(radius=2, pool=2)"):
        out = attention(q, k, v, f"clipped(sparse={sparse}, alpha=0)", layout)
        assert (out - attention(q, k, v, sparse, layout)).abs().max() < 1e-12


def test_rows_are_its_weights_and_can_be_zero_and_one():
    layout = Layout((8, 8))
    q, k, v = qkv(layout, 1)
    form = "clipped(sparse=clear(radius=3), gamma=-0.05, zeta=1.05)"
    rows = visattn.attention_rows(q, k, form, layout, range(64), scale=3.0)
    out = torch.einsum("bhrs,bshd->brhd", rows, v)
    assert (attention(q, k, v, form, layout, scale=3.0) - out).abs().max() < 1e-9
    seen = visattn.dense_mask("clear(radius=3)", layout)
    assert (rows[..., seen] == 0).any() and (rows == 1).any() and (rows >= 0).all() and (rows <= 1).all()


def test_a_query_of_equal_logits_does_nothing():
    layout, zero = Layout((5, 5), prefix=1), torch.zeros(1, 26, 2, 4, requires_grad=True)
    out = attention(zero, zero, torch.ones(1, 26, 2, 4), "clipped(sparse=na(window=3))", layout)
    assert torch.equal(out, torch.zeros_like(out))
    assert torch.equal(torch.autograd.grad(out.sum(), zero)[0], torch.zeros_like(zero))


@pytest.mark.parametrize("size", [1.0, 80.0])
def test_bfloat16_over_its_range(size):
    layout, made = Layout((16, 16), prefix=3), torch.Generator().manual_seed(0)
    half = [((torch.rand(1, 259, 2, 16, generator=made) * 2 - 1) * s).bfloat16() for s in (size, size, 1)]
    form = "clipped(sparse=na(window=5), alpha=0.5)"
    out, truth = attention(*half, form, layout), attention(*(t.double() for t in half), form, layout)
    assert out.dtype == torch.bfloat16 and truth.abs().max() > 0.1
    assert (out.double() - truth).abs().max() <= 4 * torch.finfo(torch.bfloat16).eps * truth.abs().max()


def test_text_and_refusals():
    assert parse("clipped") == Clipped() and Clipped().alpha == 4 and Clipped(gamma=-0.1).alpha is None
    for form in ("clipped(sparse=clear(radius=3), alpha=2)", "clipped(sparse=dense, gamma=-0.1, zeta=1.1)"):
        assert parse(str(parse(form))) == parse(form)
    refused = {
        "clipped(alpha=-1)": "alpha=-1 must be a finite float32 number, at least 0",
        "clipped(gamma=0.1)": "gamma=0.1 must be a finite float32 number, at most 0",
        "clipped(zeta=0.9)": "zeta=0.9 must be a finite float32 number, at least 1",
        "clipped(alpha=2, gamma=-0.1)": "exclude each other",
        "clipped(sparse=linear)": "of clipped is a composition",
    }
    for form, message in refused.items():
        with pytest.raises(ValueError, match=message):
            parse(form)
    with pytest.raises(ValueError, match="zeta=None must be a finite float32 number"):
        Clipped(zeta=None)
    with pytest.raises(ValueError, match="alpha=inf must be a finite float32 number"):
        Clipped(alpha=math.inf)
    layout = Layout((4, 4))
    with pytest.raises(ValueError, match="do not sum to 1"):
        attention(*qkv(layout), "clipped", layout, return_lse=True, backend="clipped")
