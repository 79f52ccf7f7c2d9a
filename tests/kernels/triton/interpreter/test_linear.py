"""Linear attention's kernels in Triton's interpreter against the formula in float64, forward and gradients."""

import pytest
import torch

from visattn import Layout, attention
from visattn.kernels.triton.linear.attention import linear_attention
from visattn.problem import Support

# Adding 1 to torch's elu would round small values away.
PHI = {"elu": lambda x: torch.where(x > 0, x + 1, x.clamp(max=0).exp()), "relu": torch.relu, "given": lambda x: x}


def formula(q, k, v, mask, feature):
    """All pairs of tokens."""
    q, k = PHI[feature](q), PHI[feature](k)
    if mask is not None:
        k = k * mask[:, :, None, None]
    k, v = (t.repeat_interleave(q.shape[2] // t.shape[2], 2) for t in (k, v))
    weights = torch.einsum("bihf,bjhf->bhij", q, k)
    total = weights.sum(-1, keepdim=True)
    weights = weights / torch.where(total == 0, 1.0, total)
    return torch.einsum("bhij,bjhd->bihd", weights, v)


def tensors(tokens, features, channels, heads=1, kv_heads=1, batch=1, masked=False, feature="elu", seed=0):
    made = torch.Generator().manual_seed(seed)
    sizes = ((heads, features), (kv_heads, features), (kv_heads, channels))
    q, k, v = (torch.randn((batch, tokens, *s), generator=made) for s in sizes)
    if feature == "given":
        q, k = q.softmax(-1), k.softmax(-1)
    mask = torch.rand((batch, tokens), generator=made) > 0.4 if masked else None
    return [q, k, v], mask


def results(run, inputs, mask, feature):
    leaves = [t.detach().requires_grad_() for t in inputs]
    out = run(*leaves, mask, feature)
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return [out, *torch.autograd.grad((out.double() * weight).sum(), leaves)]


def compare(inputs, mask, feature, limit=1e-5):
    ours = results(linear_attention, inputs, mask, feature)
    truth = results(formula, [t.double() for t in inputs], mask, feature)
    for name, a, b in zip(("out", "dq", "dk", "dv"), ours, truth, strict=True):
        assert a.shape == b.shape and a.isfinite().all(), name
        # Gradients that are 0 are differences of terms of size 1 and above.
        error = (a.double() - b).norm() / b.norm().clamp(min=1.0)
        assert error < limit, f"{name} is off by {error:.1e}"
    return ours


@pytest.mark.parametrize("feature", PHI)
@pytest.mark.parametrize(
    ("tokens", "features", "channels", "special"),
    [
        (1, 16, 16, {}),
        (37, 16, 24, {"masked": True, "batch": 2}),
        (70, 40, 40, {"heads": 4, "kv_heads": 2, "masked": True}),
        (65, 72, 16, {"heads": 2, "kv_heads": 1}),
        (33, 3, 5, {}),
    ],
)
def test_matches_the_formula(feature, tokens, features, channels, special):
    inputs, mask = tensors(tokens, features, channels, feature=feature, **special)
    compare(inputs, mask, feature)


def test_many_features_and_channels():
    compare(*tensors(40, 256, 256, feature="given"), "given")


def test_given_features_may_be_wider_than_values():
    (q, k, v), mask = tensors(50, 32, 16, masked=True, feature="given")
    out = results(linear_attention, [q, k, v.half()], mask, "given")
    truth = results(formula, [t.double() for t in (q, k, v.half())], mask, "given")
    assert out[0].dtype == torch.float16 and out[1].dtype == torch.float32
    for a, b in zip(out, truth, strict=True):
        assert (a.double() - b).norm() < 2e-3 * b.norm()


@pytest.mark.parametrize("shift", [-80.0, 60.0])
def test_features_of_any_size(shift):
    """All features tiny or large: their products would leave float32's range."""
    (q, k, v), _ = tensors(30, 16, 16)
    inputs = [q + shift, k * 20 + shift / 4, v]
    compare(inputs, None, "elu", 1e-3)


@pytest.mark.parametrize(("dtype", "limit"), [(torch.float16, 3e-3), (torch.bfloat16, 1.5e-2)])
def test_half_precision(dtype, limit):
    inputs, mask = tensors(50, 32, 32, masked=True)
    out = compare([t.to(dtype) for t in inputs], mask, "elu", limit)[0]
    assert out.dtype == dtype


def test_samples_without_keys_give_zeros():
    inputs, _ = tensors(21, 16, 16, batch=2)
    mask = torch.ones(2, 21, dtype=torch.bool)
    mask[1] = False
    for result in compare(inputs, mask, "elu"):
        assert (result[1] == 0).all()


def test_queries_without_features_give_zeros():
    (q, k, v), _ = tensors(9, 16, 16)
    q[:, 4] = -1.0
    out, dq, _, _ = compare([q, k, v], None, "relu")
    assert (out[:, 4] == 0).all() and (dq[:, 4] == 0).all()


@pytest.mark.parametrize("how", ["heads first", "packed", "odd strides", "channels not contiguous", "expanded"])
def test_inputs_are_read_where_they_lie(how):
    inputs, _ = tensors(19, 16, 16, heads=2, kv_heads=2)
    if how == "heads first":
        views = [t.transpose(1, 2).contiguous().transpose(1, 2) for t in inputs]
    elif how == "packed":
        views = list(torch.stack(inputs, 2).unbind(2))
    elif how == "odd strides":
        views = [torch.cat([t, t[..., :3]], 3)[..., :-3] for t in inputs]
    elif how == "expanded":
        views = [t[:, :1].expand(-1, 19, -1, -1) for t in inputs]
        inputs = [t.contiguous() for t in views]
    else:
        views = [t.transpose(1, 3).contiguous().transpose(1, 3) for t in inputs]
    assert not any(t.is_contiguous() for t in views)
    for a, b in zip(*(results(linear_attention, t, None, "elu") for t in (inputs, views)), strict=True):
        torch.testing.assert_close(a, b)


def test_same_bits_twice():
    inputs, mask = tensors(77, 24, 16, heads=2, masked=True)
    first, second = (results(linear_attention, inputs, mask, "elu") for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("wanted", range(3))
def test_gradients_only_where_wanted(wanted):
    inputs, _ = tensors(15, 16, 16)
    everything = results(linear_attention, inputs, None, "elu")[1:]
    leaves = [t.detach() for t in inputs]
    leaves[wanted].requires_grad_()
    out = linear_attention(*leaves, None, "elu")
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    (out.double() * weight).sum().backward()
    torch.testing.assert_close(leaves[wanted].grad, everything[wanted])


def test_no_samples():
    leaves = [t[:0].requires_grad_() for t in tensors(8, 16, 16)[0]]
    linear_attention(*leaves).sum().backward()
    assert leaves[0].grad.shape == leaves[0].shape


def test_refusals_say_why():
    q = torch.randn(1, 4, 1, 264)
    with pytest.raises(ValueError, match="264 features and 264 channels: both must be at most 256"):
        linear_attention(q, q, q)
    with pytest.raises(ValueError, match="feature 'exp' must be one of elu, relu, given"):
        linear_attention(q, q, q, None, "exp")


@pytest.mark.parametrize("feature", ["elu", "relu", "hedgehog", "exp"])
def test_the_backend_computes_the_same_with_and_without(monkeypatch, feature):
    layout = Layout((5, 7), 2)
    inputs, mask = tensors(layout.length, 16, 16, heads=4, kv_heads=2, batch=2, masked=True)

    def run(*leaves):
        return attention(*leaves, f"linear(feature={feature})", layout, key_mask=mask, backend="linear")

    found = []
    for fused in (False, True):
        monkeypatch.setattr("visattn.kernels.linear.backend.on_gpu", lambda _, ok=fused: Support(ok))
        leaves = [t.detach().requires_grad_() for t in inputs]
        out = run(*leaves)
        found.append([out, *torch.autograd.grad(out.square().sum(), leaves)])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_a_mask_made_in_inference_mode_trains():
    inputs, _ = tensors(37, 16, 24)
    with torch.inference_mode():
        mask = torch.arange(37)[None] % 3 > 0
    ours, wanted = (results(linear_attention, inputs, each, "elu") for each in (mask, mask.clone()))
    assert all(torch.equal(a, b) for a, b in zip(ours, wanted, strict=True))
