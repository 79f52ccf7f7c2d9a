"""The CPU engine against masked dense attention in float64 and against NATTEN, forward and gradients."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.cases import gradients, layouts, qkv
from visattn import Layout, attention, explain
from visattn.dispatch import load, milliseconds
from visattn.kernels.reference import backend as reference
from visattn.kernels.tiles import backend as tiles
from visattn.kernels.tiles import batches as tiles_batches
from visattn.kernels.tiles import fused as tiles_kernels
from visattn.kernels.tiles.backend import backend as engine
from visattn.kernels.tiles.backend import visited_pairs
from visattn.kernels.tiles.boxes import AxisKinds, axis_kinds
from visattn.kernels.tiles.rule import choose_axes, problem_cost
from visattn.patterns import Dense, Halo, Neighborhood, dense_mask, parse
from visattn.patterns.kinds import with_pooled_keys
from visattn.plans import plan
from visattn.problem import Call, Problem

EPS = torch.finfo(torch.float32).eps


@st.composite
def neighborhoods(draw, grid):
    """A neighborhood pattern that is defined on a grid."""
    axes = []
    for n in grid:
        window = draw(st.integers(1, n + 1))
        dilation = draw(st.integers(1, max(1, n // window)))
        window = min(window, n) if dilation > 1 else window
        axes.append((window, draw(st.integers(1, window)), dilation, draw(st.booleans())))
    return Neighborhood(*(tuple(values) for values in zip(*axes, strict=True)))


def run_both(pattern, layout, dtype=torch.float32, key_mask=None, rpb=None, with_lse=True, **shape):
    """Output, lse and gradients of the reference in float64 and of the engine in `dtype`."""
    results = []
    for backend, kind in ((reference, torch.float64), (engine, dtype)):
        q, k, v = qkv(layout, dtype=kind, grad=True, **shape)
        bias = None if rpb is None else rpb.to(kind).requires_grad_()
        keys, values, mask = with_pooled_keys(pattern, k, v, key_mask, layout)
        call = Call(pattern, layout, q.shape[-1] ** -0.5, mask, bias, True)
        out, lse = backend.run(q, keys, values, call)
        seen = lse.masked_fill(lse == -math.inf, 0).double()
        both = torch.cat([out.double(), seen[..., None]], -1) if with_lse else out.double()
        inputs = [q, k, v] + ([] if bias is None else [bias])
        results.append((out.detach().double(), lse.detach().double(), [g.double() for g in gradients(both, inputs)]))
    return results


def check(pattern, layout, key_mask=None, rpb=None, with_lse=True, **shape):
    """Forward within 2e-6; gradients within what float32 sums of that many terms may differ."""
    (out, lse, grads), (own, own_lse, own_grads) = run_both(
        pattern, layout, key_mask=key_mask, rpb=rpb, with_lse=with_lse, **shape
    )
    assert (out - own).abs().max() <= 2e-6
    assert torch.equal(lse == -math.inf, own_lse == -math.inf)
    assert torch.nan_to_num(lse - own_lse, nan=0.0).abs().max() <= 4e-6
    for expected, found in zip(grads, own_grads, strict=True):
        terms = math.sqrt(layout.length)
        assert (expected - found).abs().max() <= 8 * EPS * terms * (1 + expected.abs().max())


@settings(max_examples=40)
@given(st.data())
def test_neighborhoods_equal_masked_dense_attention(data):
    layout = data.draw(layouts(sides=(40, 12, 6)))
    pattern = data.draw(neighborhoods(layout.grid))
    heads, kv_heads = data.draw(st.sampled_from([(1, 1), (2, 2), (4, 2), (3, 1)]))
    dim, batch = data.draw(st.sampled_from([10, 12, 32, 40, 64])), data.draw(st.integers(1, 2))
    key_mask = torch.rand(batch, layout.length) > 0.5 if data.draw(st.booleans()) else None
    rpb = torch.randn(heads, *pattern.rpb_shape(layout.grid)) if data.draw(st.booleans()) else None
    with_lse = data.draw(st.booleans())
    shape = {"heads": heads, "kv_heads": kv_heads, "dim": dim, "batch": batch}
    check(pattern, layout, key_mask, rpb, with_lse, **shape)


@pytest.mark.parametrize(
    "text",
    [
        "halo(block=4, halo=2)",
        "groups(4)",
        "clear(radius=4)",
        "clear(radius=3, pool=4)",
        "routing(regions=3, topk=2)",
        "routing(regions=2, topk=4)",
        "radial(decay=0.5, block=16)",
        "dense",
    ],
)
@pytest.mark.parametrize(("prefix", "suffix"), [(0, 0), (3, 2)])
@pytest.mark.parametrize("masked", [False, True])
def test_other_patterns_equal_masked_dense_attention(text, prefix, suffix, masked):
    pattern = parse(text)
    grid = (3, 5, 7) if pattern.name == "radial" else (13, 11)
    layout = Layout(grid, 0 if pattern.name == "radial" else prefix, suffix)
    key_mask = torch.rand(2, layout.length) > 0.4 if masked else None
    check(pattern, layout, key_mask, heads=4, kv_heads=2, dim=12, batch=2)
    check(pattern, layout, key_mask, with_lse=False, heads=2, dim=12, batch=2)


def test_float64_is_as_exact_as_the_reference():
    pattern, layout = Neighborhood((5, 4), (2, 1)), Layout((13, 11), 1, 2)
    (out, lse, grads), (own, own_lse, own_grads) = run_both(pattern, layout, torch.float64, heads=4, kv_heads=2)
    for expected, found in zip([out, lse, *grads], [own, own_lse, *own_grads], strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_stays_within_its_rounding(dtype):
    pattern, layout = Neighborhood((5, 4)), Layout((13, 11), 1, 2)
    rpb = torch.randn(2, 9, 7)
    (out, _, grads), (own, own_lse, own_grads) = run_both(pattern, layout, dtype, rpb=rpb, with_lse=False)
    assert own_lse.dtype == torch.float64  # after the conversion; the engine's own is float32
    for expected, found in zip([out, *grads], [own, *own_grads], strict=True):
        assert (expected - found).abs().max() <= 6 * torch.finfo(dtype).eps * (1 + expected.abs().max())


def test_rows_without_visible_key_are_zero_with_lse_minus_infinity():
    layout = Layout((6, 6), 1)
    q, k, v = qkv(layout, batch=2, dtype=torch.float32, grad=True)
    key_mask = torch.ones(2, layout.length, dtype=torch.bool)
    key_mask[1] = False
    out, lse = attention(q, k, v, "na(3x3)", layout, key_mask=key_mask, backend="tiles", return_lse=True)
    assert (out[1] == 0).all() and (lse[1] == -math.inf).all() and lse[0].isfinite().all()
    for grad in gradients(out, (q, k, v)):
        assert grad.isfinite().all() and (grad[1] == 0).all()


def test_padding_slots_never_reach_the_result():
    # NaN at the token that empty slots repeat would spread if they were not masked.
    layout, pattern = Layout((7, 5)), parse("clear(radius=2)")
    q, k, v = qkv(layout, dtype=torch.float32)
    expected = attention(q, k, v, pattern, layout, backend="tiles")
    q = q.clone()
    q[:, 0] = math.nan
    found = attention(q, k, v, pattern, layout, backend="tiles")
    assert found[:, 0].isnan().all()
    assert torch.equal(found[:, 1:], expected[:, 1:])


def test_batches_of_one_problem_give_the_same(monkeypatch):
    pattern, layout = parse("clear(radius=4, pool=3)"), Layout((9, 8), 2, 1)
    whole = run_both(pattern, layout, batch=2)[1]
    monkeypatch.setitem(tiles_batches.BATCH_BYTES, "cpu", 1)
    single = run_both(pattern, layout, batch=2)[1]
    for a, b in zip([whole[0], *whole[2]], [single[0], *single[2]], strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=2e-6)


@pytest.mark.parametrize("text", ["na(window=5x4)", "halo(block=4, halo=1)", "clear(radius=3)"])
def test_kept_batches_fit_their_call(text):
    """Calls of other shapes, in turns: what one call keeps is not what another takes."""
    pattern, layout = parse(text), Layout((13, 9), 1)
    shapes = [(1, 4, 4), (3, 4, 4), (1, 4, 2), (1, 4, 4), (2, 2, 1), (3, 4, 4)]
    for batch, heads, kv_heads in shapes:
        for dtype, near in ((torch.float32, 2e-6), (torch.float64, 1e-12)):
            q, k, v = qkv(layout, batch=batch, heads=heads, kv_heads=kv_heads, dtype=dtype)
            call = Call(pattern, layout, q.shape[-1] ** -0.5)
            out, lse = engine.run(q, k, v, call)
            assert lse is None
            expected, _ = reference.run(q.double(), k.double(), v.double(), call)
            assert (out - expected).abs().max() <= near


def test_no_more_is_kept_than_allowed(monkeypatch):
    pattern, layout = parse("na(window=5x5)"), Layout((17, 19))
    monkeypatch.setattr(tiles_batches, "KEPT_BYTES", 1000)
    q, k, v = qkv(layout, dtype=torch.float32)
    first = engine.run(q, k, v, Call(pattern, layout, 0.3))[0]
    assert not tiles._static_problems(pattern, layout, q.device, False).kept
    monkeypatch.undo()
    second = engine.run(q, k, v, Call(pattern, layout, 0.3))[0]
    kept = tiles._static_problems(pattern, layout, q.device, False).kept
    assert len(kept) == 1 and torch.equal(first, second)
    assert torch.equal(engine.run(q, k, v, Call(pattern, layout, 0.3))[0], second)
    for batch in range(2, 5):
        engine.run(*qkv(layout, batch=batch, dtype=torch.float32), Call(pattern, layout, 0.3))
    assert len(kept) <= tiles_batches.KEPT_SHAPES


def test_strided_inputs_are_read_in_place():
    layout = Layout((8, 8))
    packed = torch.randn(2, 64, 3, 4, 16)
    q, k, v = packed.unbind(2)
    heads_first = [t.transpose(1, 2).contiguous().transpose(1, 2) for t in (q, k, v)]
    expected = attention(*(t.contiguous() for t in (q, k, v)), "na(5x5)", layout, backend="tiles")
    assert torch.equal(attention(q, k, v, "na(5x5)", layout, backend="tiles"), expected)
    assert torch.equal(attention(*heads_first, "na(5x5)", layout, backend="tiles"), expected)


def test_gradients_are_the_same_every_time():
    layout = Layout((20, 20), 1)
    inputs = qkv(layout, heads=4, dtype=torch.float32, grad=True)
    first, again = (gradients(attention(*inputs, "na(7x7)", layout, backend="tiles"), inputs) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


@pytest.mark.parametrize("with_bias", [False, True])
def test_plain_operators_equal_the_fused_kernel(with_bias):
    q, k, v = (torch.randn(3, 2, n, 12, dtype=torch.float64) for n in (5, 9, 9))
    bias = torch.zeros(1, 1, 5, 9, dtype=torch.float64).masked_fill(torch.rand(5, 9) > 0.7, -math.inf)
    bias = bias if with_bias else None
    out, lse = tiles_kernels.forward(q, k, v, bias, 0.3)
    for a, b in zip(tiles_kernels.plain_forward(q, k, v, bias, 0.3), (out, lse), strict=True):
        torch.testing.assert_close(a, b)
    fused = tiles_kernels.backward(out, None, q, k, v, out, lse, bias, 0.3, False)
    plain = tiles_kernels.backward(out, torch.zeros_like(lse), q, k, v, out, lse, bias, 0.3, True)
    for a, b in zip(fused[:3], plain[:3], strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.gpu
@pytest.mark.parametrize(
    "text", ["na(window=5x4, stride=2x1)", "clear(radius=4, pool=3)", "routing(regions=3, topk=2)"]
)
def test_runs_on_a_gpu(text):
    pattern, layout = parse(text), Layout((13, 11), 2, 1)
    results = []
    for device in ("cpu", "cuda"):
        q, k, v = (t.detach().to(device).requires_grad_() for t in qkv(layout, heads=4, kv_heads=2))
        out = attention(q, k, v, pattern, layout, backend="tiles")
        results.append([t.cpu() for t in (out.detach(), *torch.autograd.grad(out.square().sum(), (q, k, v)))])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


def test_composed_patterns_are_refused():
    layout = Layout((8, 8))
    q, k, v = qkv(layout)
    with pytest.raises(ValueError, match="backend 'tiles' cannot run this call: agent is not a list of key tiles"):
        attention(q, k, v, "agent(agents=2x2)", layout, backend="tiles")


@pytest.mark.parametrize(
    ("grid", "window", "options"),
    [
        ((24,), 5, {}),
        ((24,), 6, {"stride": 3, "dilation": 2}),
        ((12, 15), (5, 4), {"stride": (2, 1), "dilation": (1, 3)}),
        ((12, 10), (3, 4), {"is_causal": (True, False)}),
        ((6, 7, 8), (3, 4, 5), {"stride": (1, 2, 2), "is_causal": (True, False, False)}),
    ],
)
def test_equals_natten(grid, window, options):
    natten = pytest.importorskip("natten")
    layout = Layout(grid)
    q, k, v = qkv(layout, heads=4, kv_heads=2, dim=32, batch=2, dtype=torch.float32)
    renamed = {"causal" if name == "is_causal" else name: value for name, value in options.items()}
    own = attention(q, k, v, Neighborhood(window, **renamed), layout, backend="tiles")
    boxed = (t.unflatten(1, grid) for t in (q, k, v))
    theirs = getattr(natten, f"na{len(grid)}d")(*boxed, kernel_size=window, **options).flatten(1, len(grid))
    torch.testing.assert_close(own, theirs, rtol=0, atol=2e-6)


@given(layouts(sides=(60, 12, 5)), st.data())
def test_classes_of_an_axis_hold_every_tile_once_with_its_mask(layout, data):
    pattern = data.draw(neighborhoods(layout.grid))
    spans = pattern.spans(layout.grid)[0]
    seen = np.zeros((spans.length, spans.length), int)
    for c in axis_kinds(spans, data.draw(st.integers(1, 9))).classes():
        for query, key in zip(c.query, c.key, strict=True):
            rows, columns = query + c.step * np.arange(c.mask.shape[0]), key + c.step * np.arange(c.mask.shape[1])
            seen[np.ix_(rows, columns)] += c.mask
            assert c.relative == (key - query) // c.step
    assert (seen == spans.mask()).all()


def test_the_rule_adds_up_what_its_tiles_cost():
    spans = parse("na(window=15x15)").spans((64, 48))
    axes = [kinds.classes() for kinds in choose_axes(spans, 3)]
    assert [max(c.mask.shape[0] for c in axis) for axis in axes] == [8, 8]
    pairs = visited_pairs(parse("na(window=15x15)"), Layout((64, 48), 3))
    grid = sum(
        len(a.query) * len(b.query) * a.count * b.count * (a.mask.shape[1] * b.mask.shape[1] + 3)
        for a in axes[0]
        for b in axes[1]
    )
    assert pairs == grid + 3 * Layout((64, 48), 3).length
    assert problem_cost(64, 500) < 64 * 2048


def test_a_stride_that_fits_the_tile_visits_nothing_hidden():
    pattern, layout = parse("na(window=16x16, stride=8x8)"), Layout((64, 64))
    assert visited_pairs(pattern, layout) == dense_mask(pattern, layout).sum()
    assert visited_pairs(Halo(8, 3), layout) == dense_mask(Halo(8, 3), layout).sum()
    assert visited_pairs(Dense(), layout) == layout.length**2
    routing = parse("routing(regions=8x8, topk=4)")
    assert visited_pairs(routing, layout) == layout.length**2 / plan(routing, layout).flop_bound


def test_auto_takes_dense_where_it_is_faster():
    def choice(pattern, side, heads=4):
        return explain(pattern, Layout((side, side)), torch.empty(1, side**2, heads, 64)).choice

    assert choice("na(7x7)", 8) == "sdpa"
    assert choice("na(13x13)", 14) == "sdpa"
    assert choice("na(7x7)", 64) == "tiles"
    assert choice("dense", 64) == "sdpa"


# Side of the grid, and whether lists that q and k choose beat dense attention (docs/cpu-engine.md; 0.7 by arithmetic;
# 0.3 took 0.78 of dense attention's time on 32x32, 0.5 with means 1.15, 0.6 1.03 to 1.43).
@pytest.mark.parametrize(
    ("pattern", "side", "faster"),
    [
        ("topk(keep=0.15)", 16, False),
        ("topk(keep=0.3)", 32, True),
        ("topk(keep=0.5,rest=mean)", 32, False),
        ("topk(keep=0.6)", 32, False),
        ("topk(keep=0.15)", 64, True),
        ("topk(keep=0.15,rest=mean)", 64, True),
        ("topk(keep=0.3,rest=mean)", 96, True),
        ("topk(keep=0.7)", 64, False),
    ],
)
def test_the_cost_of_chosen_lists_says_where_they_beat_dense_attention(pattern, side, faster):
    inputs, call = (torch.empty(2, side**2, 3, 64),) * 3, Call(parse(pattern), Layout((side, side)), 1.0)
    dense = load("sdpa").cost(Problem.of(*inputs, replace(call, pattern=Dense())))
    assert (engine.cost(Problem.of(*inputs, call)) < dense) == faster


@pytest.mark.parametrize(
    ("pattern", "grid", "heads", "ms"),
    [("na(window=3x5x5)", (69, 64, 96), 8, 70.0), ("na(window=11x11x11)", (121, 128, 192), 4, 1557.0)],
)
def test_what_is_made_of_operators_costs_a_gpu_what_it_took_there(pattern, grid, heads, ms):
    """On an H200, in a call of the decoder of LTX-2.5; the first one took the Triton kernels 2.9 ms."""
    problem = Problem(parse(pattern), Layout(grid), 1, heads, heads, 64, torch.bfloat16, "cuda")
    assert 0.7 * ms < milliseconds(problem, engine.cost(problem)) < 1.4 * ms
    assert load("triton").cost(problem) < 0.1 * engine.cost(problem)


def test_cost_grows_with_batch_and_heads():
    def cost(batch, heads):
        layout = Layout((32, 32))
        q, k, v = qkv(layout, heads=heads, batch=batch, dim=64, dtype=torch.float32)
        return engine.cost(Problem.of(q, k, v, Call(parse("na(7x7)"), layout, 1.0)))

    assert cost(1, 4) < cost(2, 4) < cost(2, 8)


def test_what_a_long_causal_line_costs_is_known_without_its_masks(monkeypatch):
    monkeypatch.setattr(AxisKinds, "classes", lambda self: pytest.fail("masks of a line that nobody runs"))
    pattern, layout = parse("na(window=-1, causal=true)"), Layout(2**15, 64)
    pairs = visited_pairs(pattern, layout)
    assert layout.pairs / 2 < pairs < 0.52 * layout.pairs


def test_masks_that_no_memory_holds_are_refused(monkeypatch):
    monkeypatch.setattr("visattn.memory.machine_memory", lambda: 2**20)
    q, k, v = torch.zeros(3, 1, 4096, 1, 8)
    with pytest.raises(ValueError, match=r"masks of \d+ kinds of tiles would take .* choose another backend"):
        attention(q, k, v, "na(window=-1, causal=true)", Layout(4096), backend="tiles")
