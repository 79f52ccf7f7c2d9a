"""Sigmoid and sparse-linear attention against dense matrices of weights in float64, with gradients."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import visattn
from tests.support.cases import gradients, layouts, qkv
from tests.support.oracles import dense_attention
from visattn import Layout, attention, dense_mask, parse
from visattn.patterns import Sigmoid, SparseLinear
from visattn.patterns.linear import FEATURES

SPARSE = ("na(window=3)", "na(window=3, stride=2, causal=true)", "halo(block=2, halo=1)", "clear(radius=2)", "dense")


def seen_by(pattern, layout, key_mask, batch):
    mask = dense_mask(pattern, layout)[None].expand(batch, -1, -1)
    return mask if key_mask is None else mask & key_mask[:, None]


def slow_sigmoid(q, k, v, seen, scale, bias, offset):
    """sigmoid(scale q k + b) v, one sample and head at a time."""
    out = torch.zeros_like(q)
    rows = []
    for b, h in itertools.product(range(q.shape[0]), range(q.shape[2])):
        other = h * k.shape[2] // q.shape[2]
        count = seen[b].sum(1, keepdim=True).clamp(min=1).to(q.dtype)
        shift = (-count.log() if bias is None else bias) + offset[h]
        weights = (scale * q[b, :, h] @ k[b, :, other].T + shift).sigmoid() * seen[b]
        rows.append(weights @ v[b, :, other])
    return torch.stack(rows).view(q.shape[0], q.shape[2], q.shape[1], -1).transpose(1, 2) + out


def slow_features(x, feature, weight):
    if feature == "elu":
        return torch.nn.functional.elu(x) + 1
    if feature == "relu":
        return x.relu()
    y = x @ weight
    return torch.cat([y, -y], 1).exp() if feature == "exp" else torch.cat([y.softmax(1), (-y).softmax(1)], 1)


def slow_sparse_linear(q, k, v, pattern, seen, shown, scale, parameters):
    """Softmax over the seen keys and linear attention over the shown others, mixed per head."""
    soft = dense_attention(q, k, v, seen, scale)
    rows, eye = [], torch.eye(q.shape[3], dtype=q.dtype).expand(q.shape[2], -1, -1)
    for b, h in itertools.product(range(q.shape[0]), range(q.shape[2])):
        other, hidden = h * k.shape[2] // q.shape[2], shown[b] & ~seen[b]
        fq = slow_features(q[b, :, h], pattern.feature, parameters.get("query_map", eye)[h])
        fk = slow_features(k[b, :, other], pattern.feature, parameters.get("key_map", eye)[h])
        products = fq @ fk.T * hidden
        total = products.sum(1, keepdim=True)
        linear = products / total.where(total > 0, torch.ones_like(total)) @ v[b, :, other]
        mix = parameters["mix"][h] * hidden.any(1, keepdim=True)
        rows.append(soft[b, :, h] + mix * (linear - soft[b, :, h]))
    return torch.stack(rows).view(q.shape[0], q.shape[2], q.shape[1], -1).transpose(1, 2)


def draw(data, pattern):
    """Layout, inputs, key mask, scale and parameters of a case."""
    layout = data.draw(layouts(sides=(9, 5, 3)))
    q, k, v = qkv(layout, 4, data.draw(st.sampled_from([1, 2, 4])), data.draw(st.integers(1, 7)), batch=2, grad=True)
    key_mask = None
    if data.draw(st.booleans()):
        key_mask = torch.rand(2, layout.length, generator=torch.Generator().manual_seed(3)) < 0.6
        key_mask[1] = data.draw(st.booleans())
    made = torch.Generator().manual_seed(7)
    parameters = {
        name: (0.5 * torch.randn(shape, generator=made, dtype=torch.float64)).requires_grad_()
        for name, shape in pattern.parameter_shapes(4, q.shape[3], layout.grid).items()
    }
    return layout, (q, k, v), key_mask, data.draw(st.sampled_from([None, 0.7])), parameters


def compare(out, truth, inputs):
    assert (out - truth).abs().max() < 1e-9
    for ours, theirs in zip(gradients(out, inputs), gradients(truth, inputs), strict=True):
        assert ours.isfinite().all() and (ours - theirs).abs().max() < 1e-7 * (1 + theirs.abs().max())


@pytest.mark.parametrize("sparse", SPARSE)
@settings(max_examples=8)
@given(data=st.data())
def test_sigmoid_equals_its_formula_with_gradients(sparse, data):
    pattern = Sigmoid(parse(sparse), data.draw(st.sampled_from([None, -1.5])))
    layout, (q, k, v), key_mask, scale, parameters = draw(data, pattern)
    out = attention(q, k, v, pattern, layout, key_mask=key_mask, scale=scale, parameters=parameters)
    seen = seen_by(pattern.sparse, layout, key_mask, 2)
    truth = slow_sigmoid(q, k, v, seen, scale or q.shape[3] ** -0.5, pattern.bias, parameters["bias"])
    compare(out, truth, (q, k, v, *parameters.values()))


@pytest.mark.parametrize("feature", FEATURES)
@settings(max_examples=8)
@given(data=st.data(), sparse=st.sampled_from(SPARSE))
def test_sparse_linear_equals_its_formula_with_gradients(feature, data, sparse):
    pattern = SparseLinear(parse(sparse), feature)
    layout, (q, k, v), key_mask, scale, parameters = draw(data, pattern)
    out = attention(q, k, v, pattern, layout, key_mask=key_mask, scale=scale, parameters=parameters)
    shown = torch.ones(2, 1, layout.length, dtype=torch.bool) if key_mask is None else key_mask[:, None]
    seen = seen_by(pattern.sparse, layout, key_mask, 2)
    truth = slow_sparse_linear(q, k, v, pattern, seen, shown, scale or q.shape[3] ** -0.5, parameters)
    compare(out, truth, (q, k, v, *parameters.values()))


def test_without_a_mix_sparse_linear_is_the_sparse_pattern():
    layout = Layout((6, 5), 2)
    q, k, v = qkv(layout)
    for sparse in SPARSE:
        form = f"sparselinear(sparse={sparse})"
        initial = parse(form).initial_parameters(2, 10, layout.grid)
        assert (
            attention(q, k, v, form, layout, parameters=initial) - attention(q, k, v, sparse, layout)
        ).abs().max() < 1e-12


def test_pooled_keys_of_clear_are_read_by_both():
    layout = Layout((8, 8))
    q, k, v = qkv(layout, 1)
    for form in ("sigmoid(sparse=clear(radius=2, pool=4))", "sparselinear(sparse=clear(radius=2, pool=4))"):
        rows = visattn.attention_rows(q, k, form, layout, range(64))
        out = torch.einsum("bhrs,bshd->brhd", rows, v)
        assert (attention(q, k, v, form, layout) - out).abs().max() < 1e-9
        # Pooled keys carry something of every token.
        assert (rows > 0).all()


@pytest.mark.parametrize("size", [1.0, 8.0, 80.0])
@pytest.mark.parametrize("form", ["sigmoid(sparse=na(window=5))", "sparselinear(sparse=na(window=5), feature=elu)"])
def test_bfloat16_over_its_range(form, size):
    layout, made = Layout((16, 16), prefix=3), torch.Generator().manual_seed(0)
    q, k = ((torch.rand(1, 259, 2, 16, generator=made) * 2 - 1) * size for _ in range(2))
    v, mix = torch.randn(1, 259, 2, 16, generator=made), {}
    if "linear" in form:
        mix = {"mix": torch.tensor([0.3, 0.9])}
    half = [t.bfloat16() for t in (q, k, v)]
    out = attention(*half, form, layout, parameters=mix)
    truth = attention(*(t.double() for t in half), form, layout, parameters=mix)
    assert out.dtype == torch.bfloat16 and out.isfinite().all()
    assert (out.double() - truth).abs().max() <= 4 * torch.finfo(torch.bfloat16).eps * truth.abs().max()


def test_default_bias_makes_rows_of_equal_logits_sum_to_about_one():
    layout = Layout((16, 16))
    zero, one = torch.zeros(1, 256, 1, 4), torch.ones(1, 256, 1, 4)
    out = attention(zero, zero, one, "sigmoid(sparse=na(window=7))", layout)
    # 49 keys of sigmoid(-log 49) = 1 / 50 each.
    assert (out - 49 / 50).abs().max() < 1e-6
    assert attention(zero, zero, one, "sigmoid(bias=0)", layout).sub(128).abs().max() < 1e-3


def test_text_and_refusals():
    assert parse("sigmoid") == Sigmoid() and str(parse("sigmoid(sparse=na(window=3), bias=-2)")).endswith("bias=-2.0)")
    for form in ("sigmoid(sparse=clear(radius=3))", "sparselinear(sparse=na(window=3x5), feature=hedgehog)"):
        assert parse(str(parse(form))) == parse(form)
    with pytest.raises(ValueError, match="of sigmoid is a composition: give a pattern that is a list of key tiles"):
        parse("sigmoid(sparse=mala)")
    with pytest.raises(ValueError, match="computes its lists from q and k: give na, halo, clear or radial"):
        parse("sparselinear(sparse=routing(regions=2, topk=1))")
    with pytest.raises(ValueError, match="must be a finite float32 number"):
        Sigmoid(bias=math.inf)
    with pytest.raises(ValueError, match="must be one of elu, relu, hedgehog, exp"):
        parse("sparselinear(sparse=na(window=3), feature=cosine)")
