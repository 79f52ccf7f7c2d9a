"""Linear forms against dense matrices of weights written from the papers' formulas, in float64, with gradients."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import visattn
from tests.support.cases import gradients, layouts, qkv
from tests.support.oracles import dense_attention
from visattn import Layout, attention, parse, plan
from visattn.kernels.linear.flow import flow_attention
from visattn.kernels.linear.mala import mala_attention, mala_features
from visattn.patterns import Linear
from visattn.patterns.linear import FEATURES

FORMS = [*(f"linear(feature={name})" for name in FEATURES), "flow", "mala"]
E = 1e-6


def slow_features(x, feature, weight):
    """One head: [S, D] -> [S, F]."""
    if feature == "elu":
        return torch.nn.functional.elu(x) + 1
    if feature == "relu":
        return x.relu()
    y = x @ weight
    if feature == "exp":
        return torch.cat([y, -y], 1).exp()
    return torch.cat([y.softmax(1), (-y).softmax(1)], 1)


def linear_weights(q, k, keep, feature, maps):
    products = slow_features(q, feature, maps[0]) @ slow_features(k, feature, maps[1]).T * keep
    total = products.sum(1, keepdim=True)
    return products / total.where(total > 0, torch.ones_like(total))


def mala_weights(q, k, keep, scale):
    fq, fk, n = slow_features(q, "elu", None), slow_features(k, "elu", None), keep.sum().clamp(min=1)
    z = scale * fq @ (fk * keep[:, None]).sum(0) / n
    return (scale / n * (fq @ fk.T) * (1 + 1 / (z + E))[:, None] - z[:, None] / n) * keep


def flow_weights(q, k, keep):
    """Conservation of flows among the tokens that exist, one query at a time."""
    fq, fk, there = q.sigmoid(), k.sigmoid(), keep.bool()
    if not there.any():
        return torch.zeros(len(q), len(k), dtype=q.dtype)
    own_q, own_k = fq[there], fk[there]
    incoming = torch.stack([1 / ((row + E) @ (own_k.sum(0) + E) + E) for row in fq])
    outgoing = torch.stack([1 / ((row + E) @ (own_q.sum(0) + E) + E) for row in own_k])
    sink = torch.stack([(row + E) @ ((own_k * outgoing[:, None]).sum(0) + E) + E for row in fq])
    taken = (own_q * incoming[there][:, None]).sum(0)
    source = torch.stack([(row + E) @ (taken + E) + E for row in own_k]).clamp(-1, 1)
    competition = source.softmax(0) * len(own_k)
    inner = (fq @ own_k.T) * competition * (incoming * sink.sigmoid())[:, None]
    weights = torch.zeros(len(q), len(k), dtype=q.dtype)
    weights[:, there] = inner
    return weights


def slow(q, k, v, pattern, key_mask=None, parameters=None, scale=None):
    """The S x S weights of every sample and head times the values."""
    batch, length, heads, dim = q.shape
    scale = dim**-0.5 if scale is None else scale
    keep = torch.ones(batch, length, dtype=q.dtype) if key_mask is None else key_mask.to(q.dtype)
    group, out = heads // k.shape[2], []
    for b, h in itertools.product(range(batch), range(heads)):
        one, other = q[b, :, h], k[b, :, h // group]
        if isinstance(pattern, Linear):
            eye = torch.eye(dim, dtype=q.dtype).expand(heads, -1, -1)
            maps = [(parameters or {}).get(name, eye)[h] for name in ("query_map", "key_map")]
            weights = linear_weights(one, other, keep[b], pattern.feature, maps)
        elif pattern.name == "mala":
            weights = mala_weights(one, other, keep[b], scale)
        else:
            weights = flow_weights(one, other, keep[b])
        out.append(weights @ v[b, :, h // group])
    return torch.stack(out).view(batch, heads, length, dim).transpose(1, 2)


def draw_parameters(pattern, heads, dim, grid, dtype=torch.float64, seed=7):
    made = torch.Generator().manual_seed(seed)
    shapes = pattern.parameter_shapes(heads, dim, grid)
    return {
        name: (0.5 * torch.randn(shape, generator=made, dtype=torch.float64)).to(dtype).requires_grad_()
        for name, shape in shapes.items()
    }


@pytest.mark.parametrize("form", FORMS)
@settings(max_examples=12)
@given(data=st.data())
def test_equals_the_matrix_of_weights_with_gradients(form, data):
    layout, pattern = data.draw(layouts()), parse(form)
    q, k, v = qkv(layout, 4, data.draw(st.sampled_from([1, 2, 4])), data.draw(st.integers(1, 7)), batch=2, grad=True)
    parameters = draw_parameters(pattern, 4, q.shape[3], layout.grid) if data.draw(st.booleans()) else {}
    key_mask = None
    if data.draw(st.booleans()):
        key_mask = torch.rand(2, layout.length, generator=torch.Generator().manual_seed(3)) < 0.6
        key_mask[1] = data.draw(st.booleans())
    scale = data.draw(st.sampled_from([None, 0.7]))
    out = attention(q, k, v, form, layout, key_mask=key_mask, parameters=parameters, scale=scale)
    truth = slow(q, k, v, pattern, key_mask, parameters, scale)
    assert out.shape == q.shape and (out - truth).abs().max() < 1e-9
    inputs = (q, k, v, *parameters.values())
    for ours, theirs in zip(gradients(out, inputs), gradients(truth, inputs), strict=True):
        assert ours.isfinite().all() and (ours - theirs).abs().max() < 1e-7 * (1 + theirs.abs().max())


@pytest.mark.parametrize("form", FORMS)
def test_hidden_tokens_are_as_if_they_were_not_there(form):
    long, short = Layout(12, suffix=5), Layout(12)
    q, k, v = qkv(long, batch=1)
    q[:, 12:], k[:, 12:], v[:, 12:] = 50, 60, 1e6
    key_mask = (torch.arange(17) < 12)[None]
    out = attention(q, k, v, form, long, key_mask=key_mask)
    alone = attention(q[:, :12], k[:, :12], v[:, :12], form, short)
    assert out.isfinite().all() and (out[:, :12] - alone).abs().max() < 1e-9


@pytest.mark.parametrize("form", FORMS)
def test_order_of_keys_and_shape_of_the_grid_do_not_matter(form):
    q, k, v = qkv(Layout((3, 4), 2))
    out = attention(q, k, v, form, Layout((3, 4), 2))
    assert torch.equal(out, attention(q, k, v, form, Layout((7, 2))))
    order = torch.randperm(14)
    mixed = attention(q[:, order], k[:, order], v[:, order], form, Layout(14))
    assert (mixed - out[:, order]).abs().max() < 1e-12


def test_missing_parameters_are_the_initial_ones():
    layout = Layout((4, 5), 1)
    q, k, v = qkv(layout)
    for feature in ("hedgehog", "exp"):
        pattern = Linear(feature)
        initial = pattern.initial_parameters(2, 10, layout.grid)
        assert {n: tuple(t.shape) for n, t in initial.items()} == pattern.parameter_shapes(2, 10, layout.grid)
        assert pattern.learnable and all(t.dtype == torch.float32 for t in initial.values())
        ours = attention(q, k, v, pattern, layout, parameters=initial)
        assert (ours - attention(q, k, v, pattern, layout)).abs().max() < 1e-12
    assert not Linear("elu").learnable and not parse("flow").learnable and not parse("mala").learnable


def codes(layout, classes, size):
    """Tokens that belong to one of a few classes, q and k each the class's axis, scaled."""
    made = torch.Generator().manual_seed(2)
    kinds = torch.randint(classes, (2, layout.length), generator=made)
    return [size * torch.eye(classes, dtype=torch.float64)[kind][None, :, None] for kind in kinds]


def test_exp_features_become_softmax_at_low_temperature():
    # Zhang et al. 2024, section 3: exponential features are spiky and grow with the product as the softmax does.
    layout = Layout((6, 6))
    v = qkv(layout, 1, dim=8)[2]
    distance = []
    for size in (4.0, 8.0, 16.0, 32.0):
        q, k = codes(layout, 8, size)
        soft = dense_attention(q, k, v, torch.ones(36, 36, dtype=torch.bool), 1.0)
        distance.append((attention(q, k, v, "linear(feature=exp)", layout) - soft).abs().max().item())
    assert all(a > 10 * b for a, b in itertools.pairwise(distance)) and distance[-1] < 1e-10


def test_exp_weights_grow_with_the_product_and_lose_entropy():
    layout = Layout(32)
    q, k, _ = qkv(layout, 1, dim=8, seed=4)
    entropy = []
    for size in (0.5, 1.0, 2.0, 4.0):
        rows = visattn.attention_rows(size * q, size * k, "linear(feature=exp)", layout, range(32))[0, 0]
        entropy.append(-(rows * rows.clamp_min(1e-30).log()).sum(1).mean())
    assert all(a > b for a, b in itertools.pairwise(entropy))
    # The same direction, longer and longer keys: weight rises with the product.
    ray = torch.linspace(-2, 2, 32, dtype=torch.float64)[None, :, None, None] * torch.ones(8, dtype=torch.float64)
    row = visattn.attention_rows(torch.ones_like(ray), ray, "linear(feature=exp)", layout, [0])[0, 0, 0]
    assert (row[16:].diff() > 0).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", [1.0, 8.0, 80.0])
@pytest.mark.parametrize("form", FORMS)
def test_half_precision_over_its_range(form, size, dtype):
    layout = Layout((16, 16), prefix=3)
    made = torch.Generator().manual_seed(0)
    q, k = (((torch.rand(1, 259, 2, 16, generator=made) * 2 - 1) * size).to(dtype).requires_grad_() for _ in range(2))
    v = torch.randn(1, 259, 2, 16, generator=made).to(dtype).requires_grad_()
    out = attention(q, k, v, form, layout)
    assert out.dtype == dtype
    wide = [t.detach().double().requires_grad_() for t in (q, k, v)]
    truth = slow(*wide, parse(form)) if form != "linear(feature=exp)" else attention(*wide, form, layout)
    assert (out.double() - truth).abs().max() <= 2 * torch.finfo(dtype).eps * (truth.abs().max() + 1e-3)
    for ours, theirs in zip(gradients(out, (q, k, v)), gradients(truth, wide), strict=True):
        assert ours.isfinite().all()
        assert (ours.double() - theirs).abs().max() <= 0.02 * theirs.abs().max() + 1e-5


def test_opposite_extremes_do_not_vanish():
    q = torch.tensor([[-80.0, 80.0], [80.0, -80.0]])[None, :, None]
    out = attention(q, -q, torch.eye(2)[None, :, None].contiguous(), "linear(feature=exp)", Layout(2))
    assert (out[0, :, 0] - (torch.tensor([[0.0, 1.0], [1.0, 0.0]]))).abs().max() < 1e-6
    small = torch.full((1, 4, 1, 2), -80.0)
    for form in ("linear(feature=elu)", "linear(feature=hedgehog)", "linear(feature=exp)", "flow", "mala"):
        assert attention(small, small, torch.ones_like(small), form, Layout(4)).isfinite().all()
    assert (attention(small, small, torch.ones_like(small), "linear(feature=elu)", Layout(4)) - 1).abs().max() < 1e-6
    # No feature of a query meets one of a key: zeros, not NaN.
    assert (attention(small, small, torch.ones_like(small), "linear(feature=relu)", Layout(4)) == 0).all()


class Largest(torch.utils._python_dispatch.TorchDispatchMode):
    """Notes the largest tensor that any operator makes."""

    def __init__(self):
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else [out]:
            if isinstance(tensor, torch.Tensor):
                self.numel = max(self.numel, tensor.numel())
        return out


@pytest.mark.parametrize("form", [*FORMS, "sigmoid(sparse=na(window=5x5))", "sparselinear(sparse=na(window=5x5))"])
def test_memory_is_linear_in_the_tokens(form):
    largest = []
    for side in (48, 96):
        layout = Layout((side, side), 5)
        q, k, v = qkv(layout, 1, dim=8, dtype=torch.float32, grad=True)
        parameters = parse(form).initial_parameters(1, 8, layout.grid)
        with Largest() as seen:
            gradients(attention(q, k, v, form, layout, parameters=parameters), (q, k, v))
        largest.append(seen.numel)
    # The engines over tile plans bound a chunk of pairs by a constant.
    constant = 2**22 if "sparse" in form else 0
    assert largest[1] <= max(6 * largest[0], 2 * constant) and largest[1] < 9221**2 / 8


@pytest.mark.parametrize("form", FORMS)
def test_compiles_as_one_graph(form):
    layout, pattern = Layout((4, 5), 1, 2), parse(form)
    q, k, v = qkv(layout, 4, 2, grad=True)
    parameters = draw_parameters(pattern, 4, 10, layout.grid)
    key_mask = torch.arange(layout.length)[None] != 3

    def call(q, k, v, parameters):
        return attention(q, k, v, form, layout, key_mask=key_mask, parameters=parameters).sin()

    torch._dynamo.reset()
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    out, truth = compiled(q, k, v, parameters), call(q, k, v, parameters)
    assert (out - truth).abs().max() < 1e-12
    inputs = (q, k, v, *parameters.values())
    for ours, theirs in zip(gradients(out, inputs), gradients(truth, inputs), strict=True):
        assert (ours - theirs).abs().max() < 1e-12


def test_mala_takes_z_from_unrotated_features():
    q, k, v = qkv(Layout(9), 2, dim=4)
    fq, fk = mala_features(q), mala_features(k)
    turn = torch.linalg.qr(torch.randn(4, 4, dtype=torch.float64))[0]
    out = mala_attention(fq, fk, v, rotated=(fq @ turn, fk @ turn.flip(0)), scale=0.5)
    for h in range(2):
        z = 0.5 * fq[0, :, h] @ fk[0, :, h].mean(0)
        product = 0.5 / 9 * (fq[0, :, h] @ turn) @ (fk[0, :, h] @ turn.flip(0)).T @ v[0, :, h]
        truth = product * (1 + 1 / (z + E))[:, None] - z[:, None] * v[0, :, h].mean(0)
        assert (out[0, :, h] - truth).abs().max() < 1e-12
    # The same rotation of both is none at all, and the weights then sum to 1.
    assert (mala_attention(fq, fk, v, rotated=(fq @ turn, fk @ turn)) - mala_attention(fq, fk, v)).abs().max() < 1e-9
    assert (mala_attention(fq, fk, torch.ones_like(v)) - 1).abs().max() < 1e-5


def test_flow_conserves():
    q, k, v = qkv(Layout(20), 1, dim=6)
    # Each query takes in at most what flows out of the keys: a weight of 1 per key is what it starts from.
    out = flow_attention(q, k, torch.ones_like(v))
    assert (out > 0).all() and (out < 1.5).all()


def test_text_of_patterns():
    assert str(parse("linear")) == "linear(feature=elu)" and parse("linear(relu)") == Linear("relu")
    for form in FORMS:
        assert parse(str(parse(form))) == parse(form)
    with pytest.raises(ValueError, match=r"feature='elo' must be one of elu, relu, hedgehog, exp"):
        parse("linear(feature=elo)")
    with pytest.raises(ValueError, match=r"feature=3 in 'linear\(feature=3\)' is not a word|feature=3 must be one of"):
        parse("linear(feature=3)")


def test_refusals():
    layout = Layout((4, 4))
    q, k, v = qkv(layout)
    with pytest.raises(ValueError, match=r"linear\(feature=elu\) has no mask: every token reads every other"):
        visattn.dense_mask("linear", layout)
    with pytest.raises(ValueError, match=r"mala has no tile plan: it is a product with sums over all keys"):
        plan("mala", layout)
    with pytest.raises(ValueError, match=r"'linear' cannot run this call: it runs linear, flow, mala and wersa only"):
        attention(q, k, v, "na(window=3)", layout, backend="linear")
    with pytest.raises(ValueError, match=r"linear: linear attention has no log-sum-exp"):
        attention(q, k, v, "flow", layout, return_lse=True)
    with pytest.raises(ValueError, match=r"linear\(feature=elu\) has no parameter 'query_map'; parameters: none"):
        attention(q, k, v, "linear", layout, parameters={"query_map": torch.ones(2, 10, 10)})
    with pytest.raises(ValueError, match=r"key_map is \[10, 10\] but linear\(feature=hedgehog\) takes \[2, 10, 10\]"):
        attention(q, k, v, "linear(hedgehog)", layout, parameters={"key_map": torch.ones(10, 10)})
    weight = torch.ones(2, 2)
    with pytest.raises(ValueError, match=r"pool_weight is given twice: as an argument and in parameters"):
        attention(q, k, v, "clear(radius=2, pool=2)", layout, pool_weight=weight, parameters={"pool_weight": weight})


def test_explain_names_the_backend():
    for form in FORMS:
        found = visattn.explain(form, Layout((32, 32)), torch.empty(1, 1024, 2, 32))
        assert found.choice == "linear" and "a composition with an engine of its own" in str(found)
