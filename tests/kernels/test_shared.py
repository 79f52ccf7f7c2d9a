"""Every backend against the reference over one list of cases: output, log-sum-exp and gradients."""

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from tests.support.cases import crossed, layouts, qkv
from tests.support.oracles import visited
from tests.support.shared import ASKED, CASES, PAIRS, Asked, Case, asks, call_of, compare, refusal
from visattn.attend import attention
from visattn.dispatch import BACKENDS, load, offer, verdict
from visattn.kernels.flex.blocks import tile_plan
from visattn.layout import Layout
from visattn.patterns import RoutedPattern, dense_mask, parse
from visattn.problem import Problem

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def meant():
    """Every backend with the cases that it is meant to run; flex compiles a kernel for each: it has a list of its own.

    The cases of a backend that is not here are one test, skipped with what it says.
    """
    for device in ("cpu", "cuda"):
        marks = [pytest.mark.gpu] if device == "cuda" else []
        for name in BACKENDS.own:
            cases = [Case(*pair, device) for pair in PAIRS]
            runs = [] if name in ("reference", "flex") else [case for case in cases if asks(name, case)]
            here = load(name).available() if runs else None
            if here is not None and not here.ok:
                skip = pytest.mark.skip(reason=here.reason)
                yield pytest.param(name, runs[0], id=f"{name}-{device}", marks=[*marks, skip])
                continue
            for case in runs:
                yield pytest.param(name, case, id=f"{case.case}-{case.variant}-{name}-{device}", marks=marks)


@pytest.mark.parametrize(("name", "case"), meant())
def test_equals_the_reference(name, case):
    for asked in asks(name, case):
        tolerance = 0.03 if case.dtype == torch.bfloat16 else 5e-6
        compare(name, *case.inputs(asked), case.call(asked), asked.grad, tolerance)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("name", [name for name in BACKENDS.own if name != "reference"])
def test_the_others_say_why_not(name, device):
    backend = load(name)
    for pair in PAIRS:
        case = Case(*pair, device)
        for asked in ASKED:
            support = offer(backend, case.problem(asked)).support
            assert support.reason == refusal(name, case, asked), (case, asked)
            assert support.ok == (not support.reason)


FLEX = [
    ("odd window", "plain"),
    pytest.param("dilated", "gqa", marks=pytest.mark.slow),
    ("three axes", "key mask"),
    pytest.param("clear, pooled", "key mask", marks=pytest.mark.slow),
    pytest.param("even window, stride, causal", "rpb", marks=pytest.mark.slow),
    pytest.param("halo", "bfloat16", marks=pytest.mark.slow),
    pytest.param("dense", "plain", marks=pytest.mark.slow),
    ("other keys", "key mask"),
    pytest.param("circular halo", "plain", marks=pytest.mark.slow),
    pytest.param("clear, finer keys", "plain", marks=pytest.mark.slow),
    pytest.param("circular clear", "key mask", marks=pytest.mark.slow),
]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("case", "variant"), FLEX)
def test_flex_equals_the_reference(case, variant, device):
    if not load("flex").available().ok:
        pytest.skip(load("flex").available().reason)
    drawn, on_gpu = Case(case, variant, device), device == "cuda"
    asked = Asked(grad=on_gpu, lse=on_gpu)
    # Inductor's CUDA kernels round float32 products to TF32 unless told otherwise.
    tolerance = 0.03 if drawn.dtype == torch.bfloat16 else 5e-3 if on_gpu else 5e-6
    compare("flex", *drawn.inputs(asked), drawn.call(asked), on_gpu, tolerance)


@st.composite
def patterns(draw, grid):
    """A pattern of any kind that is defined on the grid."""
    size = st.integers(1, 6)
    kind = draw(st.sampled_from(["na", "halo", "clear", "routing", "blocks", "dense"]))
    if kind == "na":
        window = draw(size)
        text = f"na(window={window}, stride={draw(st.integers(1, window))}, causal={draw(st.booleans())})".lower()
    elif kind == "halo":
        text = f"halo(block={draw(size)}, halo={draw(st.integers(0, 3))})"
    elif kind == "clear":
        text = f"clear(radius={draw(size)})" if draw(st.booleans()) else f"clear(radius={draw(size)}, pool=2)"
    elif kind == "routing":
        text = f"routing(regions={draw(st.integers(1, 3))}, topk={draw(st.integers(1, 2))})"
    elif kind == "blocks":
        rule = draw(st.sampled_from(["topk(keep=0.4", "topk(keep=2, per=head", "topp(p=0.6", "above(tau=0.5"]))
        block = "x".join(str(draw(st.integers(1, 4))) for _ in grid) if len(grid) > 1 else "5"
        always = draw(st.sampled_from(["none", "self", "first(1)"]))
        text = f"{rule}, block={block}, always={always})"
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
    compare(name, q, k, v, call, True, 1e-10)


@st.composite
def geometries(draw, layout):
    """A pattern of those that know circular axes and keys of their own."""
    size = st.integers(1, 6)
    ring = "x".join(str(draw(st.integers(0, 1))) for _ in layout.grid) if layout.dims > 1 else "true"
    kind = draw(st.sampled_from(["na", "halo", "clear", "pooled", "dense"]))
    if kind == "dense":
        return kind
    if kind == "halo":
        return f"halo(block={draw(size)}, halo={draw(st.integers(0, 3))}, circular={ring})"
    if kind != "na":
        return f"clear(radius={draw(size)}, circular={ring}{', pool=2' * (kind == 'pooled')})"
    window, dilation = draw(size), draw(st.integers(1, 2))
    text = f"na(window={window}, stride={draw(st.integers(1, window))}, dilation={dilation}, circular={ring})"
    try:
        parse(text).check(*layout.grids)
    except ValueError:
        assume(False)
    return text


@settings(max_examples=40)
@given(data=st.data(), layout=crossed(sides=(40, 9, 5)), kv_heads=st.sampled_from([1, 2]), masked=st.booleans())
@pytest.mark.parametrize("name", ["sdpa", "tiles"])
def test_other_keys_and_rings_equal_the_reference_anywhere(name, data, layout, kv_heads, masked):
    text = data.draw(geometries(layout))
    q, k, v = qkv(layout, 2, kv_heads, 10, batch=2, grad=True)
    call = call_of(text, layout, 2, masked, False, 2, torch.float64, "cpu", lse=True)
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
@pytest.mark.parametrize(
    "text", ["na(window=3)", "clear(radius=2, pool=3)", "routing(regions=2, topk=1)", "topp(block=2x3)"]
)
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
@pytest.mark.parametrize("case", [c for c, (text, _) in CASES.items() if not isinstance(parse(text), RoutedPattern)])
def test_flex_tiles_are_multiples_of_its_kernel_blocks_and_show_the_same(case, volume):
    text, layout = CASES[case]
    tiles = tile_plan(parse(text), layout, volume)
    assert tiles.queries.capacity % volume == tiles.keys.capacity % volume == 0
    assert torch.equal(visited(tiles), dense_mask(text, layout))
