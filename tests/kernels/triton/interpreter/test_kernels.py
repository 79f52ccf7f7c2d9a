"""Every kernel in Triton's interpreter against the reference, forward and gradients."""

import pytest
import torch

from tests.support.cases_triton import compare, results, tensors
from visattn import Layout, attention, backends, explain, parse
from visattn.parallel.parts import Rows, SpannedPart

# Pattern, layout, and what is special about it.
PROBLEMS = {
    "one token": ("na(window=1)", Layout(1), {}),
    "one token axes": ("na(window=1x3)", Layout((1, 7)), {}),
    "dense with text": ("dense", Layout((5, 7), 3, 5), {}),
    "odd grid, text both sides": ("na(window=5x5)", Layout((9, 11), 3, 40), {}),
    "window 1": ("na(window=1x1)", Layout((5, 6)), {}),
    "stride": ("na(window=4x5,stride=2x3)", Layout((9, 10)), {}),
    "dilation, bias": ("na(window=3x3,dilation=2x3)", Layout((7, 10), 1), {"rpb": "na(window=3x3,dilation=2x3)"}),
    "causal, bias, mask": ("na(window=5,causal=true)", Layout(43), {"rpb": "na(window=5,causal=true)", "masked": True}),
    "window over axis, bias": ("na(window=7x3)", Layout((4, 9)), {"rpb": "na(window=7x3)"}),
    "video": ("na(window=3x3x4)", Layout((3, 5, 6), 0, 2), {}),
    "grouped heads, mask": ("na(window=3x3)", Layout((6, 7), 2, 3), {"heads": 4, "kv_heads": 2, "masked": True}),
    "grouped heads, bias": ("na(window=3)", Layout(21), {"heads": 2, "kv_heads": 1, "rpb": "na(window=3)"}),
    "two samples, mask": ("na(window=5)", Layout(30, 2), {"batch": 2, "masked": True}),
    "circle, pooled keys, mask": ("clear(radius=3,pool=3)", Layout((8, 7), 2, 3), {"masked": True}),
    "circle": ("clear(radius=4)", Layout((11, 9)), {}),
    "halo of odd blocks": ("halo(block=7x7,halo=2)", Layout((10, 9), 1), {}),
    "radial": ("radial(decay=0.3,block=16)", Layout((4, 3, 5), 2), {}),
    "coarser keys, text on one side": (
        "na(window=3x2)",
        Layout((9, 10), 3, 0, Layout((4, 5), 0, 20)),
        {"masked": True},
    ),
    "finer keys, grouped heads": (
        "halo(block=2x3,halo=1)",
        Layout((4, 5), key_layout=Layout((8, 7), 1)),
        {"batch": 2, "heads": 2, "kv_heads": 1},
    ),
    "circle of finer keys, pooled": ("clear(radius=3,pool=3)", Layout((5, 4), 1, 0, Layout((8, 7))), {}),
    "dense, few keys": ("dense", Layout((9, 8), 1, 0, Layout((2, 3), 1)), {}),
    "slab without the pairs of dense tokens": (
        SpannedPart(parse("na(window=5x3)"), Rows((9, 7), 0, 2, 4, 2, 4), False),
        Layout((4, 7), 3, 2),
        {"masked": True},
    ),
    "border of a slab": (
        SpannedPart(parse("na(window=5x3)"), Rows((9, 7), 0, 4, 2, 6, 2), True),
        Layout((2, 7)),
        {"heads": 2, "kv_heads": 1},
    ),
    "ring": ("na(window=5x4,stride=2x1,circular=1x0)", Layout((9, 8), 2), {"masked": True}),
    "dilated ring": ("na(window=3,dilation=3,circular=true)", Layout(36), {}),
    "halo around": ("halo(block=4x3,halo=2,circular=true)", Layout((10, 9), 0, 3), {}),
    "circle around, coarser keys": ("clear(radius=2,circular=true)", Layout((9, 8), key_layout=Layout((6, 4))), {}),
    "routed": ("routing(regions=3x2,topk=2)", Layout((9, 8)), {"batch": 2}),
    "routed, short regions, text": ("routing(regions=2x2,topk=3)", Layout((5, 7), 2, 3), {"batch": 2, "masked": True}),
    "routed to everything": ("routing(regions=2x2,topk=4)", Layout((6, 7), 1), {"heads": 2, "kv_heads": 1}),
    "blocks by their scores": ("topk(keep=2,block=2x4,always=none)", Layout((6, 8)), {"heads": 2}),
    "lists of different length, short blocks, text, mask": (
        "topp(p=0.6,block=3x4)",
        Layout((5, 9), 2, 3),
        {"batch": 2, "heads": 2, "kv_heads": 1, "masked": True},
    ),
    "whole blocks before short ones": (
        "topp(p=0.6,block=4x4)",
        Layout((10, 9), 3),
        {"heads": 2, "kv_heads": 1, "masked": True},
    ),
    "whole blocks before short ones, as many in each list": ("topk(keep=0.5,block=4x4)", Layout((9, 10)), {}),
    "grouped heads, each with a list of its own": (
        "above(tau=0.3,block=8,key_block=4)",
        Layout(37, 2),
        {"batch": 2, "heads": 4, "kv_heads": 2},
    ),
    "a budget per head, empty lists": (
        "topk(keep=1,block=2x4,always=none,per=head)",
        Layout((6, 8)),
        {"heads": 2, "kv_heads": 1},
    ),
    "blocks of a causal line, text, mask": (
        "topk(keep=0.4,block=16,causal=true)",
        Layout(75, 2, 3),
        {"batch": 2, "heads": 2, "kv_heads": 1, "masked": True},
    ),
    "larger blocks of queries on a causal line": ("topp(p=0.7,block=24,key_block=16,causal=true)", Layout(64), {}),
    "larger blocks of keys on a causal line": ("above(tau=0,block=8,key_block=32,causal=true)", Layout(70), {}),
    "tokens of a causal line that choose": ("topk(keep=2,block=1,key_block=16,causal=true)", Layout(70, 2), {}),
    "causal frames": ("topk(keep=2,block=1x4x4,causal=1x0x0)", Layout((3, 5, 8), 3), {"batch": 2}),
    "head dim 40": ("na(window=3x3)", Layout((5, 8)), {"dim": 40}),
    "head dim 8": ("na(window=3x3)", Layout((5, 8)), {"dim": 8}),
}


@pytest.mark.parametrize("name", PROBLEMS)
def test_matches_reference(name):
    pattern, layout, special = PROBLEMS[name]
    inputs, mask = tensors(layout, **special)
    compare(inputs, pattern, layout, mask)


@pytest.mark.parametrize(("dtype", "limit"), [(torch.float16, 2e-3), (torch.bfloat16, 1.5e-2)])
def test_half_precision(dtype, limit):
    layout = Layout((6, 7), 2)
    inputs, mask = tensors(layout, dtype=dtype, masked=True)
    out = compare(inputs, "na(window=3x3)", layout, mask, limit=limit)[0]
    assert out.dtype == dtype


def test_queries_that_see_no_key_are_zero():
    layout = Layout((5, 6), 2)
    inputs, _ = tensors(layout, batch=2)
    mask = torch.ones(2, layout.length, dtype=torch.bool)
    mask[1] = False
    out, lse, *grads = compare(inputs, "na(window=3x3)", layout, mask)
    assert (out[1] == 0).all() and (lse[1] == float("-inf")).all()
    assert all((g[1] == 0).all() for g in grads)


@pytest.mark.parametrize("scale", [-0.3, 0.0, 2.0])
def test_any_scale(scale):
    layout = Layout((5, 6), 2)
    inputs, mask = tensors(layout, masked=True)
    compare(inputs, "na(window=3x3)", layout, mask, scale=scale)


def test_routes_of_a_negative_scale_are_those_of_the_given_queries():
    layout = Layout((6, 8), 1)
    inputs, _ = tensors(layout)
    compare(inputs, "routing(regions=3x2,topk=1)", layout, scale=-0.5)


def strided(inputs, how):
    """The same values, laid out differently in memory."""
    if how == "heads first":
        return [t.transpose(1, 2).contiguous().transpose(1, 2) for t in inputs]
    if how == "one packed tensor":
        return list(torch.stack(inputs, 2).unbind(2))
    if how == "odd strides":
        return [torch.cat([t, t[:, :, :1, :3].expand(-1, -1, t.shape[2], -1)], 3)[..., :-3] for t in inputs]
    return [t.transpose(1, 3).contiguous().transpose(1, 3) for t in inputs]


@pytest.mark.parametrize("how", ["heads first", "one packed tensor", "odd strides", "channels not contiguous"])
def test_inputs_are_read_where_they_lie(how):
    layout = Layout((5, 7), 1)
    inputs, _ = tensors(layout, heads=2)
    views = strided(inputs, how)
    assert not any(v.is_contiguous() for v in views)
    plain, strided_results = (results(t, "na(window=3x3)", layout, "triton") for t in (inputs, views))
    for a, b in zip(plain, strided_results, strict=True):
        torch.testing.assert_close(a, b)


def test_same_bits_twice():
    layout = Layout((6, 7), 3)
    inputs, mask = tensors(layout, heads=2, kv_heads=1, rpb="na(window=3x3)", masked=True)
    first, second = (results(inputs, "na(window=3x3)", layout, "triton", mask) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_gradients_only_where_wanted():
    layout = Layout((4, 5))
    (q, k, v), _ = tensors(layout)
    v.requires_grad_()
    attention(q, k, v, "na(window=3x3)", layout, backend="triton").sum().backward()
    assert v.grad is not None and q.grad is None


@pytest.mark.parametrize("learns", range(4), ids=["q", "k", "v", "rpb"])
def test_one_input_alone_may_learn(learns):
    layout = Layout((4, 5))
    inputs, _ = tensors(layout, rpb="na(window=3x3)")
    grads = []
    # The second call runs what was prepared for the first.
    for backend in ("triton", "triton", "reference"):
        leaves = [t.detach().requires_grad_(i == learns) for i, t in enumerate(inputs)]
        out = attention(*leaves[:3], "na(window=3x3)", layout, rpb=leaves[3], backend=backend)
        grads += torch.autograd.grad(out.square().sum(), leaves[learns])
    for own in grads[:2]:
        torch.testing.assert_close(own, grads[2])


def test_a_key_mask_that_changed_before_the_backward_is_refused():
    layout = Layout((4, 5))
    leaves, mask = tensors(layout, masked=True)
    out = attention(leaves[0].requires_grad_(), *leaves[1:], "na(window=3x3)", layout, key_mask=mask, backend="triton")
    mask.logical_not_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def test_only_the_log_sum_exp_is_differentiated():
    layout = Layout((4, 5))
    inputs, _ = tensors(layout)
    grads = []
    for backend in ("triton", "reference"):
        leaves = [t.detach().requires_grad_() for t in inputs]
        lse = attention(*leaves, "na(window=3x3)", layout, backend=backend, return_lse=True)[1]
        grads.append(torch.autograd.grad(lse.square().sum(), leaves[:2]))
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b)


def test_no_samples():
    layout = Layout((4, 5))
    leaves = [t[:0].requires_grad_() for t in tensors(layout)[0]]
    attention(*leaves, "na(window=3x3)", layout, backend="triton").sum().backward()
    assert leaves[0].grad.shape == leaves[0].shape


@pytest.mark.parametrize(
    ("dim", "dtype", "reason"),
    [
        (16, torch.float64, "torch.float64 is none of float16, bfloat16 and float32"),
        (264, torch.float16, "head_dim 264 is not a multiple of 8 up to 256"),
        (136, torch.float32, "head_dim 136 is not a multiple of 8 up to 128"),
        (12, torch.float16, "head_dim 12 is not a multiple of 8"),
    ],
)
def test_refusals_say_why(dim, dtype, reason):
    layout = Layout((4, 5))
    q = torch.randn(1, 20, 1, dim, dtype=dtype)
    with pytest.raises(ValueError, match=reason):
        attention(q, q, q, "na(window=3x3)", layout, backend="triton")


def test_auto_never_takes_the_interpreter():
    layout = Layout((4, 5))
    assert backends()["triton"].ok
    assert explain("na(window=3x3)", layout, torch.randn(1, 20, 1, 16)).choice != "triton"


def test_refuses_another_device():
    from visattn.kernels.triton.backend import fits

    support = fits("meta", torch.float32, 16)
    assert support == (False, "q is on meta, and it runs on the CPU only while TRITON_INTERPRET is set")


def test_inside_a_compiled_graph():
    layout = Layout((4, 6), 2)
    inputs, mask = tensors(layout, masked=True)

    def step(q, k, v):
        return attention(q * 1.5, k, v, "na(window=3x3)", layout, key_mask=mask, backend="triton").sin()

    found = []
    for run in (step, torch.compile(step, backend="aot_eager", fullgraph=True)):
        leaves = [t.detach().requires_grad_() for t in inputs]
        out = run(*leaves)
        found.append([out, *torch.autograd.grad(out.sum(), leaves)])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b)


def test_a_bias_and_pooling_weight_inside_a_compiled_graph():
    layout = Layout((6, 6))
    inputs, _ = tensors(layout)
    weight = torch.randn(3, 3, requires_grad=True)

    def step(q, k, v, w):
        return attention(q, k, v, "clear(radius=2,pool=3)", layout, pool_weight=w, backend="triton")

    grads = [
        torch.autograd.grad(run(*inputs, weight).sum(), weight)[0]
        for run in (step, torch.compile(step, backend="aot_eager", fullgraph=True))
    ]
    torch.testing.assert_close(*grads)
    assert grads[0].abs().sum() > 0
