"""attention() at its borders, every pattern on every backend that runs it: empty batches, autocast, odd arguments."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import scaled_dot_product_attention

import visattn
from tests.support.cases import gradients, layouts, qkv
from visattn.checks import factor
from visattn.dispatch import BACKENDS, load, verdict
from visattn.kernels import scores
from visattn.layout import Layout
from visattn.patterns import BiasedPattern, parse
from visattn.patterns.hybrid import soft
from visattn.problem import Call, Problem

LAYOUT = Layout((7, 6), prefix=2, suffix=1)
PATTERNS = (
    "dense", "na(window=3)", "na(window=3, dilation=2, causal=1x0)", "halo(block=2, halo=1)", "clear(radius=2, pool=2)",
    "radial(block=8)", "routing(regions=2, topk=2)", "agent(agents=2)", "linear(feature=hedgehog)", "flow", "mala",
    "wersa(features=8)",
    "sparselinear(sparse=na(window=3), feature=exp)", "sigmoid(sparse=clear(radius=2, pool=2))",
    "clipped(sparse=clear(radius=2, pool=2), alpha=1)", "gated(of=na(window=3))", "selective(values=false)",
    "groups(3)", "linear(causal=0x1, decay=heads)", "topk(keep=2, block=2x1, causal=0x1)",
    "topp(p=0.6, block=4, causal=true)", "verticalslash(least=1, block=8)", "pruned(by=topk(keep=2, block=3x2))",
)  # fmt: skip
# The interpreter and FlexAttention's compiler take seconds a case: they are tested in their own rooms.
SLOW = ("triton", "flex")


def extras(pattern, layout, masked, biased, dtype=torch.float64, grad=True):
    """Key mask, bias and parameters of a call."""
    made = torch.Generator().manual_seed(2)

    def random(shape):
        return torch.randn(shape, generator=made, dtype=torch.float64).to(dtype).requires_grad_(grad)

    found = {"parameters": {n: random(s) for n, s in pattern.parameter_shapes(4, 8, layout.grid).items()}}
    if masked:
        found["key_mask"] = torch.rand(2, layout.length, generator=made) < 0.7
    if biased and isinstance(pattern, BiasedPattern):
        found["rpb"] = random((4, *pattern.rpb_shape(layout.grid)))
    return found


def able(pattern, q, k, given, **more):
    """Names of the quick backends that run a call."""
    call = Call(pattern, LAYOUT, 1.0, given.get("key_mask"), given.get("rpb"), parameters=given["parameters"], **more)
    problem = Problem.of(q, k, k, call)
    names = [name for name in BACKENDS.own if name not in SLOW and verdict(load(name), problem).ok]
    assert names
    return names


CASES = pytest.mark.parametrize(("masked", "biased"), [(False, False), (True, True)])
EVERY = pytest.mark.parametrize("text", PATTERNS)


@EVERY
@CASES
def test_an_empty_batch_gives_an_empty_result_and_gradients(text, masked, biased):
    pattern = parse(text)
    given = extras(pattern, LAYOUT, masked, biased)
    if masked:
        given["key_mask"] = given["key_mask"][:0]
    q, k, v = qkv(LAYOUT, 4, 2, 8, batch=0, grad=True)
    for backend in ("auto", *able(pattern, q, k, given)):
        out = visattn.attention(q, k, v, pattern, LAYOUT, backend=backend, **given)
        assert out.shape == q.shape and out.dtype == q.dtype
        inputs = [q, k, v, *given["parameters"].values(), *([given["rpb"]] if "rpb" in given else [])]
        for grad, tensor in zip(gradients(out, inputs), inputs, strict=True):
            assert grad.shape == tensor.shape and not grad.any()
        with torch.no_grad():
            assert visattn.attention(q, k, v, pattern, LAYOUT, backend=backend, **given).shape == q.shape
    rows = visattn.attention_rows(q, k, pattern, LAYOUT, [0, 7], key_mask=given.get("key_mask"))
    assert rows.shape == (0, 4, 2, LAYOUT.length)


def changed_later(pattern, backend, masked, biased, which="", kv_heads=2, lse=False):
    """Gradients of a call one of whose inputs is changed in place before the backward."""
    given = extras(pattern, LAYOUT, masked, biased)
    leaves = {**dict(zip("qkv", qkv(LAYOUT, 4, kv_heads, 8, batch=2, grad=True), strict=True)), **given["parameters"]}
    leaves |= {"rpb": given["rpb"]} if "rpb" in given else {}
    # Leaves themselves must not be changed in place.
    used = {name: t * 1 for name, t in leaves.items()} | ({"key_mask": given["key_mask"]} if masked else {})
    options = {name: used.get(name) for name in ("key_mask", "rpb")}
    options["parameters"] = {name: used[name] for name in given["parameters"]}
    out = visattn.attention(
        used["q"], used["k"], used["v"], pattern, LAYOUT, backend=backend, return_lse=lse, **options
    )
    out = torch.cat([part.nan_to_num(neginf=0).flatten() for part in out]) if lse else out
    with torch.no_grad():
        if which == "key_mask":
            used[which].logical_not_()
        elif which:
            used[which].mul_(2)
    return gradients(out, list(leaves.values()))


@EVERY
@CASES
def test_what_changes_before_the_backward_is_refused_where_it_is_read_again(text, masked, biased):
    pattern = parse(text)
    given = extras(pattern, LAYOUT, masked, biased)
    q, k, _ = qkv(LAYOUT, 4, 2, 8, batch=2, grad=True)
    for backend in able(pattern, q, k, given):
        same = changed_later(pattern, backend, masked, biased)
        for which in ("q", "k", "v", *given["parameters"], *(name for name in ("key_mask", "rpb") if name in given)):
            try:
                later = changed_later(pattern, backend, masked, biased, which)
            except RuntimeError as error:
                assert "modified by an inplace operation" in str(error)
                continue
            assert all(torch.equal(a, b) for a, b in zip(same, later, strict=True)), (backend, which)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(
    ("text", "backend", "lse"),
    [("sla2(keep=2, block=3, soft=0.2)", "hybrid", False), ("na(window=3)", "sdpa", True), ("dense", "sdpa", True)],
)
def test_what_is_computed_once_more_reads_what_the_forward_read(monkeypatch, text, backend, lse, masked):
    monkeypatch.setattr(soft, "PAIRS", 512)
    monkeypatch.setattr(scores, "SCORES", 64)
    # With a key head each, keys and values in float64 are the very tensors that the user has.
    given = parse(text), backend, masked, False
    same = changed_later(*given, kv_heads=4, lse=lse)
    for which in ("q", "k", "v", *["key_mask"] * masked):
        try:
            later = changed_later(*given, which, kv_heads=4, lse=lse)
        except RuntimeError as error:
            assert "modified by an inplace operation" in str(error)
            continue
        assert all(torch.equal(a, b) for a, b in zip(same, later, strict=True)), which


def test_a_key_mask_of_inference_mode_can_be_trained_with():
    with torch.inference_mode():
        mask = torch.arange(LAYOUT.length)[None] % 3 > 0
    q, k, v = qkv(LAYOUT, grad=True)
    for text, backend in (("na(window=3)", "tiles"), ("sigmoid(sparse=na(window=3))", "auto")):
        out = visattn.attention(q, k, v, text, LAYOUT, key_mask=mask, backend=backend)
        assert all(t.any() for t in gradients(out, (q, k, v)))


def test_an_empty_batch_has_an_empty_lse_and_still_refuses_what_cannot_run():
    q, k, v = (t.half() for t in qkv(LAYOUT, 4, 2, 8, batch=0))
    out, lse = visattn.attention(q, k, v, "na(window=3)", LAYOUT, return_lse=True)
    assert out.dtype == torch.float16 and lse.shape == (0, LAYOUT.length, 4) and lse.dtype == torch.float32
    with pytest.raises(ValueError, match="linear attention has no log-sum-exp"):
        visattn.attention(q, k, v, "linear", LAYOUT, return_lse=True, backend="linear")
    assert "sdpa" in str(visattn.explain("na(window=3)", LAYOUT, q))
    large = Layout((256, 256))
    big = torch.zeros(0, large.length, 1, 8)
    assert visattn.attention(big, big, big, "na(window=3)", large).shape == big.shape, "no mask of S x S is made"


@EVERY
@CASES
def test_autocast_is_that_of_torch_on_every_backend(text, masked, biased):
    """Output in autocast's dtype, to the bit that of inputs in that dtype; gradients in the dtype of the inputs."""
    pattern = parse(text)
    given = extras(pattern, LAYOUT, masked, biased, torch.float32)
    q, k, v = qkv(LAYOUT, 4, 2, 8, batch=2, dtype=torch.float32, grad=True)
    inputs = (q, k, v)
    narrow = [t.detach().bfloat16().requires_grad_() for t in inputs]
    mixed = (narrow[0], k, narrow[2])
    for backend in ("auto", *able(pattern, narrow[0], narrow[1], given)):
        plain = visattn.attention(*narrow, pattern, LAYOUT, backend=backend, **given)
        expected = gradients(plain, narrow)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            outs = [
                visattn.attention(*tensors, pattern, LAYOUT, backend=backend, **given) for tensors in (inputs, mixed)
            ]
            inside = gradients(visattn.attention(*inputs, pattern, LAYOUT, backend=backend, **given), inputs)
        for out in outs:
            assert out.dtype == torch.bfloat16 and torch.equal(out, plain), backend
        for found in (gradients(outs[0], inputs), inside):
            for own, other in zip(found, expected, strict=True):
                assert own.dtype == torch.float32
                # A backward inside of autocast may round more: torch runs its products there in autocast's dtype.
                error = (own - other).norm() / other.float().norm().clamp(min=1e-3)
                assert error < (0.05 if found is inside else 1e-6), backend


@EVERY
def test_autocast_leaves_float64_and_other_devices_alone(text):
    q, k, v = qkv(LAYOUT, 4, 2, 8, batch=2)
    plain = visattn.attention(q, k, v, text, LAYOUT)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(visattn.attention(q, k, v, text, LAYOUT), plain)
    with torch.autocast("cuda", dtype=torch.bfloat16, enabled=torch.cuda.is_available()):
        assert torch.equal(visattn.attention(q, k, v, text, LAYOUT), plain)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rows = visattn.attention_rows(q.float(), k.float(), text, LAYOUT, [0, 9])
    assert torch.equal(rows, visattn.attention_rows(q.float(), k.float(), text, LAYOUT, [0, 9]))


@settings(deadline=None, max_examples=20)
@given(st.data())
def test_dtypes_under_autocast_are_sdpas(data):
    kinds = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
    layout, wanted = data.draw(layouts()), data.draw(st.sampled_from(kinds[:2]))
    dtypes = [data.draw(st.sampled_from(kinds)) for _ in range(3)]
    tensors = [t.to(kind) for t, kind in zip(qkv(layout), dtypes, strict=True)]

    def result(run):
        try:
            return run().dtype
        except (ValueError, RuntimeError):
            return "refused"

    with torch.autocast("cpu", dtype=wanted):
        theirs = result(lambda: scaled_dot_product_attention(*(t.transpose(1, 2) for t in tensors)))
        assert result(lambda: visattn.attention(*tensors, "na(window=3)", layout)) == theirs
        if len(set(dtypes)) == 1:
            assert visattn.explain("na(window=3)", layout, tensors[0]).problem.dtype == theirs


def test_autocast_and_compile():
    q, k, v = qkv(LAYOUT, 2, dtype=torch.float32, grad=True)

    @torch.compile(backend="aot_eager", fullgraph=True)
    def run(q, k, v):
        return visattn.attention(q, k, v, "na(window=3)", LAYOUT)

    with torch.autocast("cpu", dtype=torch.bfloat16):
        out, plain = run(q, k, v), visattn.attention(q, k, v, "na(window=3)", LAYOUT)
    assert out.dtype == torch.bfloat16 and torch.equal(out, plain)
    assert all(grad.dtype == torch.float32 for grad in gradients(out, (q, k, v)))
    empty = [t[:0].detach().requires_grad_() for t in (q, k, v)]
    out = run(*empty)
    assert out.shape == empty[0].shape and all(
        g.shape == t.shape for g, t in zip(gradients(out, empty), empty, strict=True)
    )


def test_a_scale_that_wants_a_gradient_is_refused():
    q, k, v = qkv(LAYOUT)
    learned = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    for call in (visattn.attention, lambda q, k, v, *rest, **more: visattn.attention_rows(q, k, *rest, [0], **more)):
        with pytest.raises(TypeError, match=r"scale is a tensor that requires a gradient.*multiply q by it and pass"):
            call(q, k, v, "na(window=3)", LAYOUT, scale=learned)
    # What the text says gives the gradient.
    out = visattn.attention(q * learned, k, v, "na(window=3)", LAYOUT, scale=1.0)
    assert torch.autograd.grad(out.sum(), learned)[0].abs() > 0
    with torch.no_grad():
        assert torch.allclose(visattn.attention(q, k, v, "na(window=3)", LAYOUT, scale=learned), out.detach())
    for value in (learned.detach(), np.float32(0.3), torch.tensor([0.3])):
        assert visattn.attention(q, k, v, "na(window=3)", LAYOUT, scale=value).isfinite().all()
    assert factor(None, 16) == 0.25


@pytest.mark.parametrize("scale", [float("nan"), float("inf"), "big", torch.zeros(2), [1, 2], 1e300, 10**400])
def test_a_scale_that_is_no_number_is_refused(scale):
    with pytest.raises(ValueError, match=r"scale=.* must be one finite float32 number, or None for head_dim \*\* -0.5"):
        visattn.attention(*qkv(LAYOUT), "dense", LAYOUT, scale=scale)


def zeros(tokens=30, heads=2, dim=8, dtype=torch.float32):
    return torch.zeros(1, tokens, heads, dim, dtype=dtype)


GRID = Layout((6, 5))


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        (
            [zeros().transpose(1, 2)] * 3,
            r"q \[1, 2, 30, 8\].* are in torch's order \[batch, heads, tokens, head_dim\]: pass",
        ),
        ([zeros(heads=4).transpose(1, 2), *[zeros().transpose(1, 2)] * 2], r"in torch's order.*q.transpose\(1, 2\)"),
        ([zeros().numpy()] * 3, r"q is a numpy.ndarray: pass torch tensors \[batch, tokens, heads, head_dim\]"),
        ([zeros(), None, zeros()], r"k is a builtins.NoneType: pass torch tensors"),
        ([zeros(heads=0)] * 3, r"must have at least one head and one channel per head"),
        ([zeros(), *[zeros(heads=0)] * 2], r"must have at least one head"),
        ([zeros(dim=0)] * 3, r"must have at least one head and one channel per head"),
        (
            [zeros(), zeros(dim=16), zeros(dim=16)],
            r"must agree in batch, tokens and head_dim, and k and v also in heads",
        ),
        (
            [zeros(), zeros(6), zeros(6)],
            r"patterns are for self-attention, in which queries and keys are the same tokens",
        ),
        (
            [zeros(dtype=torch.float8_e4m3fn)] * 3,
            r"q torch.float8_e4m3fn.* must be one floating-point dtype of float16",
        ),
        ([zeros(dtype=torch.complex64)] * 3, r"q torch.complex64.* must be one floating-point dtype of float16"),
    ],
)
def test_tensors_that_cannot_be_attended(tensors, message):
    for backend in ("auto", "reference", "sdpa", "tiles"):
        with pytest.raises(ValueError, match=message):
            visattn.attention(*tensors, "na(window=3x3)", GRID, backend=backend)
    if all(t is tensors[0] for t in tensors):
        with pytest.raises(ValueError, match=message):
            visattn.explain("na(window=3x3)", GRID, tensors[0])


def test_as_many_heads_as_tokens_are_no_sign_of_another_order():
    square = zeros(30, heads=30)
    assert visattn.attention(square, square, square, "na(window=3x3)", GRID).shape == square.shape


@pytest.mark.parametrize("name", ["key_mask", "rpb", "parameters"])
def test_further_arguments_that_are_no_tensors(name):
    given = np.ones((1, 30), bool)
    with pytest.raises(ValueError, match=r"is a ndarray: pass a torch tensor"):
        visattn.attention(
            *[zeros()] * 3, "na(window=3)", GRID, **{name: {"bias": given} if name == "parameters" else given}
        )


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"layout": (6, 5)}, r"layout=\(6, 5\) is a tuple: pass a Layout, like Layout\(\(64, 64\), prefix=1\)"),
        ({"layout": None}, r"layout=None is a NoneType: pass a Layout"),
        ({"rpb": torch.zeros(2, 5, 5, dtype=torch.int64)}, r"rpb is torch.int64 but must be floating-point: cast it"),
        ({"parameters": [torch.zeros(2)]}, r"parameters=.* is a list: pass a mapping from their names to tensors"),
        ({"pattern": None}, r"pattern None is a NoneType: pass a Pattern or a text"),
        ({"backend": None}, r"unknown backend None"),
        ({"backend": ["tiles"]}, r"unknown backend \['tiles'\]"),
    ],
)
def test_further_arguments_of_another_kind(given, message):
    tensors = dict.fromkeys("qkv", zeros())
    if "layout" in given:
        for run in (visattn.plan, visattn.dense_mask):
            with pytest.raises(ValueError, match=message):
                run("na(window=3)", **given)
    with pytest.raises(ValueError, match=message):
        visattn.attention(**(tensors | {"pattern": "na(window=3)", "layout": GRID} | given))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"grid": (8, 8), "prefix": None}, r"prefix None and suffix 0 must be whole numbers of at least 0"),
        ({"grid": (8, 8), "suffix": float("nan")}, r"suffix nan must be whole numbers"),
        ({"grid": (float("inf"), 8)}, r"grid \(inf, 8\) must be 1 to 3 whole numbers of at least 1"),
        ({"grid": "88"}, r"grid '88' must be 1 to 3 whole numbers"),
        ({"grid": None}, r"grid None must be 1 to 3 whole numbers"),
        ({"grid": (2, 4, 4, 4)}, r"must be 1 to 3 whole numbers"),
        ({"grid": (4, None)}, r"must be 1 to 3 whole numbers"),
    ],
)
def test_layouts_that_are_none(options, message):
    with pytest.raises(ValueError, match=message):
        Layout(**options)


def test_whole_numbers_of_other_types_are_whole_numbers():
    assert Layout(np.int64(64)) == Layout(64) and Layout(np.array([8, 8]), np.int32(2)) == Layout((8, 8), 2)
    assert Layout(torch.Size((4, 4))) == Layout((4.0, 4))
