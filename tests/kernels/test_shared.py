"""Every backend against the reference over one list of cases: output, log-sum-exp and gradients."""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from tests.support.cases import layouts, qkv
from tests.support.oracles import visited
from visattn.attend import attention
from visattn.dispatch import NAMES, Call, Problem, load, verdict
from visattn.kernels.flex.blocks import tile_plan
from visattn.layout import Layout
from visattn.patterns import RoutedPattern, dense_mask, parse

# An eager backend runs every case; flex compiles a kernel for each, so it has a list of its own.
EAGER = [name for name in NAMES if name not in ("reference", "flex")]
ON_CPU = [name for name in EAGER if name not in ("triton", "xformers")]
PLACES = [(n, "cpu") for n in ON_CPU] + [pytest.param(n, "cuda", marks=pytest.mark.gpu) for n in EAGER]
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
CASES = {
    "dense": ("dense", Layout((7, 9), 3, 2)),
    "odd window": ("na(window=5x3)", Layout((13, 11), 1, 17)),
    "even window, stride, causal": ("na(window=4, stride=2, causal=true)", Layout(37)),
    "dilated": ("na(window=3x2, dilation=2x4)", Layout((9, 11), 2, 0)),
    "three axes": ("na(window=3x4x4, stride=1x2x2)", Layout((5, 6, 7), 0, 4)),
    "blocked": ("na(window=4x4, stride=4x4)", Layout((8, 12))),
    "whole axis": ("na(window=-1x3)", Layout((6, 8))),
    "short axis": ("na(window=9x9)", Layout((4, 20))),
    "window 1": ("na(window=1x3)", Layout((5, 1), 1)),
    "halo": ("halo(block=4x3, halo=1)", Layout((10, 9), 1, 2)),
    "clear": ("clear(radius=3)", Layout((9, 8), 0, 5)),
    "clear, pooled": ("clear(radius=3, pool=4)", Layout((9, 8), 0, 5)),
    "radial": ("radial(decay=0.5, block=16)", Layout((4, 24), 0, 6)),
    "routing": ("routing(regions=3x2, topk=2)", Layout((9, 8), 1, 0)),
}


def call_of(text, layout, batch, key_mask, rpb, heads, dtype, device, lse):
    pattern = parse(text)
    made = torch.Generator().manual_seed(3)
    mask = None
    if key_mask:
        mask = (torch.rand(batch, layout.length, generator=made) < 0.6).to(device)
        mask[0] = False
    sides = pattern.rpb_shape(layout.grid) if rpb else None
    bias = None if sides is None else torch.randn(heads, *sides, generator=made).to(device, dtype).requires_grad_()
    return Call(pattern, layout, 0.3, mask, bias, lse)


def runs(name, q, k, v, call):
    return verdict(load(name), Problem.of(q, k, v, call)).ok


def results(name, q, k, v, call, grad):
    """Output, log-sum-exp with its infinities as a marker, and gradients of a random weighting of both."""
    given = {"scale": call.scale, "key_mask": call.key_mask, "rpb": call.rpb, "return_lse": call.lse}
    found = attention(q, k, v, call.pattern, call.layout, backend=name, **given)
    out, lse = found if call.lse else (found, None)
    outputs = [out] if lse is None else [out, lse.masked_fill(lse == -math.inf, 123.0)]
    if not grad:
        return outputs
    inputs = [q, k, v] if call.rpb is None else [q, k, v, call.rpb]
    weights = [torch.randn(t.shape, generator=torch.Generator().manual_seed(5)).to(t) for t in outputs]
    return outputs + list(torch.autograd.grad(outputs, inputs, weights))


def compare(name, q, k, v, call, grad, tolerance):
    ours, theirs = (results(n, q, k, v, call, grad) for n in (name, "reference"))
    assert len(ours) == len(theirs)
    for a, b in zip(ours, theirs, strict=True):
        assert a.shape == b.shape and a.dtype == b.dtype
        assert a.isfinite().all()
        assert (a - b).abs().max() <= tolerance * max(1.0, b.abs().max().item())


VARIANTS = ["plain", "key mask", "rpb", "gqa", "bfloat16"]


@pytest.mark.parametrize(("name", "device"), PLACES)
@pytest.mark.parametrize(
    ("case", "variant"),
    [(case, variant) for case, (text, _) in CASES.items() for variant in VARIANTS if variant != "rpb" or "na(" in text],
)
def test_equals_the_reference(name, case, variant, device):
    text, layout = CASES[case]
    dtype = torch.bfloat16 if variant == "bfloat16" else torch.float32
    kv_heads = 2 if variant == "gqa" else 4
    q, k, v = (t.detach().to(device) for t in qkv(layout, 4, kv_heads, dim=16, batch=2, dtype=dtype))
    call = call_of(text, layout, 2, variant == "key mask", variant == "rpb", 4, dtype, device, lse=True)
    # Everything a backend does for the case: with a gradient or without, with the log-sum-exp or without.
    asked = [(grad, lse) for grad in (True, False) for lse in (True, False)]
    ran = False
    for grad, lse in asked:
        asked_call = replace(call, lse=lse, rpb=None if call.rpb is None else call.rpb.detach().requires_grad_(grad))
        inputs = [t.requires_grad_(grad) for t in (q, k, v)]
        if runs(name, *inputs, asked_call):
            ran = True
            compare(name, *inputs, asked_call, grad, 0.03 if dtype == torch.bfloat16 else 5e-6)
    if not ran:
        pytest.skip(f"{name} refuses: {verdict(load(name), Problem.of(q, k, v, call)).reason}")


FLEX = [
    ("odd window", "plain"),
    pytest.param("dilated", "gqa", marks=pytest.mark.slow),
    ("three axes", "key mask"),
    pytest.param("clear, pooled", "key mask", marks=pytest.mark.slow),
    pytest.param("even window, stride, causal", "rpb", marks=pytest.mark.slow),
    pytest.param("halo", "bfloat16", marks=pytest.mark.slow),
    pytest.param("dense", "plain", marks=pytest.mark.slow),
]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("case", "variant"), FLEX)
def test_flex_equals_the_reference(case, variant, device):
    text, layout = CASES[case]
    dtype = torch.bfloat16 if variant == "bfloat16" else torch.float32
    on_gpu = device == "cuda"
    kv_heads = 2 if variant == "gqa" else 4
    q, k, v = (t.detach().to(device) for t in qkv(layout, 4, kv_heads, dim=16, batch=2, dtype=dtype))
    call = call_of(text, layout, 2, variant == "key mask", variant == "rpb", 4, dtype, device, lse=on_gpu)
    if not on_gpu and call.rpb is not None:
        call = replace(call, rpb=call.rpb.detach())
    inputs = [t.requires_grad_(on_gpu) for t in (q, k, v)]
    if not load("flex").available().ok:
        pytest.skip(load("flex").available().reason)
    # Inductor's CUDA kernels round float32 products to TF32 unless told otherwise.
    compare("flex", *inputs, call, on_gpu, 0.03 if dtype == torch.bfloat16 else 5e-3 if on_gpu else 5e-6)


@st.composite
def patterns(draw, grid):
    """A pattern of any kind that is defined on the grid."""
    size = st.integers(1, 6)
    kind = draw(st.sampled_from(["na", "halo", "clear", "routing", "dense"]))
    if kind == "na":
        window = draw(size)
        text = f"na(window={window}, stride={draw(st.integers(1, window))}, causal={draw(st.booleans())})".lower()
    elif kind == "halo":
        text = f"halo(block={draw(size)}, halo={draw(st.integers(0, 3))})"
    elif kind == "clear":
        text = f"clear(radius={draw(size)})" if draw(st.booleans()) else f"clear(radius={draw(size)}, pool=2)"
    elif kind == "routing":
        text = f"routing(regions={draw(st.integers(1, 3))}, topk={draw(st.integers(1, 2))})"
    else:
        text = "dense"
    try:
        pattern = parse(text)
        pattern.check(grid)
    except ValueError:
        assume(False)
    return text


@settings(max_examples=60)
@given(data=st.data(), layout=layouts(sides=(40, 9, 5)), kv_heads=st.sampled_from([1, 2]), masked=st.booleans())
@pytest.mark.parametrize("name", ["sdpa", "tiles"])
def test_equals_the_reference_anywhere(name, data, layout, kv_heads, masked):
    text = data.draw(patterns(layout.grid))
    dim = data.draw(st.sampled_from([1, 10, 32, 40]))
    q, k, v = qkv(layout, 2, kv_heads, dim, batch=2, grad=True)
    call = call_of(text, layout, 2, masked, False, 2, torch.float64, "cpu", lse=True)
    if not runs(name, q, k, v, call):
        call = replace(call, lse=False)
    compare(name, q, k, v, call, True, 1e-10)


@settings(max_examples=25)
@given(data=st.data(), layout=layouts(sides=(20, 8, 5)), kv_heads=st.sampled_from([1, 2]))
def test_natten_equals_the_reference_on_its_domain(data, layout, kv_heads):
    axes = []
    for n in layout.grid:
        assume(n >= 2)
        window = data.draw(st.integers(2, n))
        stride, dilation = data.draw(st.integers(1, window)), data.draw(st.integers(1, n // window))
        axes.append((window, stride, dilation, data.draw(st.integers(0, 1))))
    sides = ["x".join(map(str, values)) for values in zip(*axes, strict=True)]
    if layout.dims == 1:
        sides[3] = "true" if axes[0][3] else "false"
    text = "na(window={}, stride={}, dilation={}, causal={})".format(*sides)
    q, k, v = qkv(layout, 2, kv_heads, 8, dtype=torch.float32)
    call = call_of(text, layout, 1, False, False, 2, torch.float32, "cpu", lse=True)
    support = verdict(load("natten"), Problem.of(q, k, v, call))
    if not support.ok:
        if "not installed" in support.reason or "does not import" in support.reason:
            pytest.skip(support.reason)
        assert "causal window over the whole axis" in support.reason
        return
    compare("natten", q, k, v, call, False, 5e-6)


def test_natten_takes_a_scale_of_zero_as_zero():
    layout = Layout((6, 6), 1)
    q, k, v = qkv(layout, dim=8, dtype=torch.float32)
    if not load("natten").available().ok:
        pytest.skip(load("natten").available().reason)
    out, truth = (attention(q, k, v, "na(window=3)", layout, scale=0, backend=n) for n in ("natten", "reference"))
    assert (out - truth).abs().max() < 1e-6


@pytest.mark.parametrize("name", ["sdpa", "tiles"])
@pytest.mark.parametrize("text", ["na(window=3)", "clear(radius=2, pool=3)", "routing(regions=2, topk=1)"])
def test_writes_all_of_its_outputs(name, text):
    layout = Layout((7, 8), 3, 2)
    q, k, v = qkv(layout, grad=True)
    call = call_of(text, layout, 1, False, False, 2, torch.float64, "cpu", lse=True)
    # In this mode torch fills the memory of every new tensor with NaN.
    torch.use_deterministic_algorithms(True)
    try:
        compare(name, q, k, v, call, True, 1e-10)
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("volume", [64, 128])
@pytest.mark.parametrize("case", CASES)
def test_flex_tiles_are_multiples_of_its_kernel_blocks_and_show_the_same(case, volume):
    text, layout = CASES[case]
    if isinstance(parse(text), RoutedPattern):
        pytest.skip("routed lists depend on q and k")
    tiles = tile_plan(parse(text), layout, volume)
    assert tiles.queries.capacity % volume == tiles.keys.capacity % volume == 0
    assert torch.equal(visited(tiles), dense_mask(text, layout))
