"""The kernels of causal linear attention in Triton's interpreter against the formula in float64, with gradients."""

import pytest
import torch

from tests.kernels.triton.interpreter.test_linear import PHI, tensors
from tests.kernels.triton.interpreter.test_second_order import compare as compare_derivatives
from tests.kernels.triton.interpreter.test_second_order import second
from visattn import Layout, attention
from visattn.kernels.linear.causal import plain_grid_attention
from visattn.kernels.triton.linear.causal import arguments
from visattn.kernels.triton.linear.causal.arguments import Steps
from visattn.kernels.triton.linear.causal.attention import causal_linear_attention
from visattn.problem import Support


def counted(layout, axis, rates):
    """What each product counts, [H, S, S]: decay between tokens of the grid, 1 beside dense tokens."""
    shape = [1] * layout.dims
    shape[axis] = -1
    position = torch.arange(layout.grid[axis]).view(shape).expand(layout.grid).flatten()
    steps = (position[:, None] - position).double()
    grid = torch.where(steps >= 0, (-rates.double()[:, None, None] * steps.clamp(min=0)).exp(), 0.0)
    found = torch.ones(len(rates), layout.length, layout.length, dtype=torch.float64)
    inside = slice(layout.prefix, layout.prefix + layout.tokens)
    found[:, inside, inside] = grid
    return found


def formula(q, k, v, layout, axis, rates, mask, feature):
    """All pairs of tokens."""
    q, k = PHI[feature](q), PHI[feature](k)
    if mask is not None:
        k = k * mask[:, :, None, None]
    k, v = (t.repeat_interleave(q.shape[2] // t.shape[2], 2) for t in (k, v))
    weights = torch.einsum("bihf,bjhf->bhij", q, k) * counted(layout, axis, rates)
    total = weights.sum(-1, keepdim=True)
    return torch.einsum("bhij,bjhd->bihd", weights / torch.where(total == 0, 1.0, total), v)


def results(run, inputs):
    leaves = [t.detach().requires_grad_() for t in inputs]
    out = run(*leaves)
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return [out, *torch.autograd.grad((out.double() * weight).sum(), leaves)]


def compare(inputs, layout, axis, rates, mask=None, feature="elu", limit=1e-5):
    ours = results(lambda *t: causal_linear_attention(*t, layout, axis, rates, mask, feature), inputs)
    given = torch.zeros(inputs[0].shape[2]) if rates is None else rates
    truth = results(lambda *t: formula(*t, layout, axis, given, mask, feature), [t.double() for t in inputs])
    for name, a, b in zip(("out", "dq", "dk", "dv"), ours, truth, strict=True):
        assert a.shape == b.shape and a.isfinite().all(), name
        error = (a.double() - b).norm() / b.norm().clamp(min=1.0)
        assert error < limit, f"{name} is off by {error:.1e}"
    return ours


RATES = torch.tensor([0.3, 1.1])


@pytest.mark.parametrize(
    ("layout", "axis", "features", "channels", "rates", "special"),
    [
        # Several chunks of single tokens, the last short; query heads that share keys.
        (Layout((150,)), 0, 16, 24, RATES, {"heads": 2, "kv_heads": 1, "masked": True}),
        # Positions of several tokens, text on both sides, each axis.
        (Layout((7, 5, 3), 2, 1), 0, 16, 16, RATES, {"heads": 2, "kv_heads": 2, "feature": "relu"}),
        (Layout((5, 9, 3), 2, 1), 1, 40, 16, RATES[:1], {"masked": True, "feature": "given"}),
        # Chunks of one position: no products. The second has its text in the states.
        (Layout((3, 70)), 0, 16, 16, None, {}),
        (Layout((10, 3, 8), 3, 0), 1, 8, 5, RATES[1:], {"batch": 2}),
        (Layout((1,), 1, 0), 0, 16, 16, RATES[:1], {}),
    ],
    ids=str,
)
def test_matches_the_formula(layout, axis, features, channels, rates, special, monkeypatch):
    if layout.prefix == 3:
        monkeypatch.setattr(arguments, "CHUNK", 16)
    inputs, mask = tensors(layout.length, features, channels, **special)
    compare(inputs, layout, axis, rates, mask, special.get("feature", "elu"))


def test_chunks():
    assert Steps.of((4096,), 0, 128, True)[:4] == (4096, 1, 1, 128)
    steps = Steps.of((9, 6, 5), 1, 16, False)
    assert steps == (6, 45, 5, 2, False) and steps.chunks == 3 and steps.products
    assert not Steps.of((21, 45, 80), 0, 128, True).products and Steps.of((2, 3), 0, 16, True).size == 2


@pytest.mark.parametrize("shift", [-80.0, 60.0])
def test_features_of_any_size(shift):
    """All features tiny or large: their products would leave float32's range."""
    (q, k, v), _ = tensors(70, 16, 16)
    compare([q + shift, k * 20 + shift / 4, v], Layout((70,)), 0, RATES[:1], limit=1e-3)


@pytest.mark.parametrize(("dtype", "limit"), [(torch.float16, 3e-3), (torch.bfloat16, 1.5e-2)])
def test_half_precision(dtype, limit):
    layout = Layout((70,), 3)
    inputs, mask = tensors(layout.length, 32, 32, masked=True)
    out = compare([t.to(dtype) for t in inputs], layout, 0, RATES[:1], mask, "elu", limit)[0]
    assert out.dtype == dtype


def test_nothing_to_see_gives_zeros():
    layout = Layout((40, 2))
    inputs, _ = tensors(layout.length, 16, 16, batch=2)
    inputs[0][0, 7] = -1.0
    mask = torch.ones(2, layout.length, dtype=torch.bool)
    mask[1] = False
    out, dq, dk, dv = compare(inputs, layout, 0, RATES[:1], mask, "relu")
    assert all((t[1] == 0).all() for t in (out, dq, dk, dv)) and (out[0, 7] == 0).all() and (dq[0, 7] == 0).all()
    leaves = [t[:0].requires_grad_() for t in inputs]
    causal_linear_attention(*leaves, layout, 0, RATES[:1]).sum().backward()
    assert leaves[0].grad.shape == leaves[0].shape


def test_views_are_read_where_they_lie_and_give_the_same_bits():
    layout = Layout((9, 8), 1)
    inputs, _ = tensors(layout.length, 16, 16, heads=2, kv_heads=2)
    packed = list(torch.stack(inputs, 2).unbind(2))
    assert not any(t.is_contiguous() for t in packed)
    run = lambda *t: causal_linear_attention(*t, layout, 0, RATES)  # noqa: E731
    first, again, views = (results(run, t) for t in (inputs, inputs, packed))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    for a, b in zip(first, views, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("wanted", range(3))
def test_gradients_only_where_wanted(wanted):
    layout = Layout((66,), 2)
    inputs, _ = tensors(layout.length, 16, 16)
    run = lambda *t: causal_linear_attention(*t, layout, 0, RATES[:1])  # noqa: E731
    everything = results(run, inputs)[1:]
    leaves = [t.detach() for t in inputs]
    leaves[wanted].requires_grad_()
    out = run(*leaves)
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    (out.double() * weight).sum().backward()
    torch.testing.assert_close(leaves[wanted].grad, everything[wanted])


@pytest.mark.parametrize("prefix", [0, 2])
def test_second_derivatives(prefix):
    layout = Layout((5, 4), prefix)
    inputs, mask = tensors(layout.length, 16, 16, heads=2, masked=True)
    run = lambda *t: causal_linear_attention(*t, layout, 0, RATES, mask)  # noqa: E731
    compare_derivatives(
        second(run, inputs),
        second(lambda *t: formula(*t, layout, 0, RATES, mask, "elu"), [t.double() for t in inputs]),
    )


def test_the_plain_form_of_a_grid():
    inputs, mask = tensors(30, 16, 8, heads=2, kv_heads=1, masked=True)
    q, k, v = (t.double() for t in inputs)
    out = plain_grid_attention(q, k, v, mask, None, RATES.double(), 5, 3, "elu")
    assert (out - formula(q, k, v, Layout((2, 5, 3)), 1, RATES, mask, "elu")).abs().max() < 1e-12


@pytest.mark.parametrize("form", ["feature=elu, causal=0x1, decay=heads", "feature=hedgehog, causal=1x0"])
def test_the_backend_computes_the_same_with_and_without(monkeypatch, form):
    layout = Layout((5, 7), 2)
    inputs, mask = tensors(layout.length, 16, 16, heads=4, kv_heads=2, batch=2, masked=True)
    found = []
    for fused in (False, True):
        monkeypatch.setattr("visattn.kernels.linear.backend.on_gpu", lambda _, ok=fused: Support(ok))
        run = lambda *t: attention(*t, f"linear({form})", layout, key_mask=mask, backend="linear")  # noqa: E731
        found.append(results(run, inputs))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
