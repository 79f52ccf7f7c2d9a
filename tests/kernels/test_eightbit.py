"""`precision=`: the simulation against the float64 oracle, its errors, and what is refused."""

import pytest
import torch

import visattn
from tests.support import eightbit as oracle
from visattn import Layout, attention, dense_mask, parse
from visattn.kernels.tiles.eightbit import PER_STEP, walk_of

PRECISIONS = ("int8", "fp8")
# Relative errors that rounding makes on normal data (docs/precision.md).
ERRORS = {"int8": 0.02, "fp8": 0.04}


def tensors(layout, heads=2, kv_heads=1, dim=32, dtype=torch.float64, seed=0):
    """q, k, v of one sample, keys and values with a mean that only a shift takes away."""
    made = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(shape, generator=made, dtype=torch.float64)

    n = layout.keys.length
    k = normal(1, n, kv_heads, dim) + 3 * normal(1, 1, kv_heads, dim)
    v = normal(1, n, kv_heads, dim) + 3 * normal(1, 1, kv_heads, dim)
    return [t.to(dtype) for t in (normal(1, layout.length, heads, dim), k, v)]


def error(ours, truth):
    return float((ours.double() - truth).norm() / (truth - truth.mean(1, keepdim=True)).norm())


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize(
    ("pattern", "layout"),
    [("na(window=3x5)", Layout((5, 9), 2, 3)), ("dense", Layout(11)), ("clear(radius=2)", Layout((4, 6)))],
)
def test_simulation_rounds_as_the_oracle_does(pattern, layout, precision):
    q, k, v = tensors(layout)
    out, lse = attention(q, k, v, pattern, layout, precision=precision, backend="tiles", return_lse=True)
    walk = walk_of(parse(pattern), layout, torch.device("cpu"))
    steps = oracle.steps_of_walk(walk, dense_mask(parse(pattern), layout), PER_STEP)
    truth, sums = oracle.attend(q[0], k[0], v[0], steps, 32**-0.5, precision, range(layout.length))
    torch.testing.assert_close(out[0], truth, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(lse[0], sums, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_errors_on_normal_data(precision):
    layout = Layout((24, 24), 8)
    q, k, v = tensors(layout, dim=128, dtype=torch.float32)
    truth = attention(*(t.double() for t in (q, k, v)), "na(window=13x13)", layout)
    ours = attention(q, k, v, "na(window=13x13)", layout, precision=precision)
    assert 0.3 * ERRORS[precision] < error(ours, truth) < ERRORS[precision]


def test_floats_of_8_bits_mind_no_lopsided_range():
    """Errors of e4m3 grow with what is rounded: from the middle of a range that one token widens they would double."""
    layout = Layout((16, 16))
    q, k, v = tensors(layout, dim=64, dtype=torch.float32)
    v[:, 37] += 12
    truth = attention(*(t.double() for t in (q, k, v)), "na(window=9x9)", layout)
    assert error(attention(q, k, v, "na(window=9x9)", layout, precision="fp8"), truth) < ERRORS["fp8"]


def test_means_of_keys_and_values_cost_nothing():
    layout = Layout((12, 12))
    q, k, v = tensors(layout)
    own = k - k.mean(1, keepdim=True), v - v.mean(1, keepdim=True)
    near = attention(q, *own, "na(window=5x5)", layout, precision="int8")
    far = attention(q, own[0] + 50, own[1] + 50, "na(window=5x5)", layout, precision="int8") - 50
    torch.testing.assert_close(near, far, rtol=0, atol=1e-9)


def test_masked_and_routed_calls():
    layout = Layout((8, 8), 3)
    q, k, v = tensors(layout, dtype=torch.float32)
    mask = torch.rand(1, layout.length, generator=torch.Generator().manual_seed(1)) > 0.4
    for pattern in ("na(window=5x5)", "topk(keep=0.5,block=4x4)", "routing(regions=2x2,topk=2)"):
        given = {"key_mask": mask, "return_lse": True}
        truth, lse = attention(q, k, v, pattern, layout, **given, backend="reference")
        out, sums = attention(q, k, v, pattern, layout, **given, precision="int8")
        assert error(out, truth.double()) < 0.03 and (lse - sums).abs().max() < 0.05
    nothing = torch.zeros_like(mask)
    out, lse = attention(q, k, v, "na(window=5x5)", layout, key_mask=nothing, precision="fp8", return_lse=True)
    assert not out.any() and (lse == -torch.inf).all()


@pytest.mark.parametrize("precision", ["int8", "fp8"])
@pytest.mark.parametrize("pattern", ["na(window=5x5)", "clear(radius=2, pool=4)", "topk(keep=0.5,block=4x4)", "dense"])
def test_what_a_mask_hides_moves_no_scale(pattern, precision):
    layout = Layout((8, 8), 3)
    q, k, v = tensors(layout, dtype=torch.float32)
    mask = torch.rand(1, layout.length, generator=torch.Generator().manual_seed(1)) > 0.4
    options = {"key_mask": mask, "precision": precision, "return_lse": True}
    hidden = ~mask[..., None, None]
    wild = (t.masked_fill(hidden, value) for t, value in ((k, -3e4), (v, 1e4)))
    tame, ours = attention(q, k, v, pattern, layout, **options), attention(q, *wild, pattern, layout, **options)
    assert all(torch.equal(one, other) for one, other in zip(tame, ours, strict=True))


def test_constant_and_empty_inputs():
    layout = Layout((6, 6))
    zeros, ones = torch.zeros(1, 36, 2, 32), torch.ones(1, 36, 2, 32)
    assert attention(zeros, zeros, ones, "na(window=3x3)", layout, precision="int8").equal(ones)
    assert attention(ones[:0], ones[:0], ones[:0], "na(window=3x3)", layout, precision="int8").shape[0] == 0


@pytest.mark.parametrize(
    ("options", "pattern", "message"),
    [
        ({"precision": "int4"}, "na(window=3x3)", r"precision='int4' must be None or one of 'int8', 'fp8'"),
        (
            {"precision": "int8", "backend": "sdpa"},
            "na(window=3x3)",
            "'sdpa' cannot run this call: it does not compute",
        ),
        ({"precision": "fp8"}, "linear()", "linear: it does not compute in fp8"),
        ({"precision": "fp8"}, "topk(keep=0.5,block=2x2,rest=mean)", "it pools no keys of what topk leaves out"),
        ({"precision": "int8"}, "topk(keep=0.5,block=2x2,skip=0.01)", "it skips nothing of what topk lists"),
    ],
)
def test_refuses(options, pattern, message):
    x = torch.randn(1, 36, 2, 32)
    with pytest.raises(ValueError, match=message):
        attention(x, x, x, pattern, Layout((6, 6)), **options)


def test_refuses_gradients_and_bias():
    x, layout = torch.randn(1, 36, 2, 32, requires_grad=True), Layout((6, 6))
    with pytest.raises(ValueError, match="rounding to 8 bits has no gradient"):
        attention(x, x, x, "na(window=3x3)", layout, precision="int8")
    with torch.no_grad():
        assert attention(x, x, x, "na(window=3x3)", layout, precision="int8").isfinite().all()
        with pytest.raises(ValueError, match="adds no relative position bias"):
            attention(x, x, x, "na(window=3x3)", layout, rpb=torch.zeros(2, 5, 5), precision="int8")


def test_compiled_calls_round_too():
    layout, (q, k, v) = Layout((6, 6)), tensors(Layout((6, 6)), dtype=torch.float32)
    compiled = torch.compile(
        lambda q, k, v: attention(q, k, v, "na(window=3x3)", layout, precision="fp8"), backend="eager", fullgraph=True
    )
    eager = attention(q, k, v, "na(window=3x3)", layout, precision="fp8")
    assert compiled(q, k, v).equal(eager) and not eager.equal(attention(q, k, v, "na(window=3x3)", layout))


def test_explain_says_that_errors_are_simulated():
    x = torch.randn(1, 36, 2, 32)
    found = visattn.explain("na(window=3x3)", Layout((6, 6)), x, precision="int8")
    assert found.choice == "tiles" and found.problem.precision == "int8"
    gpu = visattn.dispatch.replace(found.problem, device="cuda")
    support = visattn.dispatch.offer(visattn.dispatch.load("tiles"), gpu).support
    assert not support.ok and "for its errors and not for speed" in support.reason
