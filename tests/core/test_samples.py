"""A batch is its samples: whatever pattern, backend, key mask and dtype, one by one gives what all give together."""

from dataclasses import replace

import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint

import visattn
from tests.support.cases import gradients, layouts, qkv
from visattn.dispatch import BACKENDS, load, verdict
from visattn.patterns import parse
from visattn.problem import Call, Problem

# Defined on every grid.
PATTERNS = (
    "dense", "na(window=3)", "na(window=4, stride=2, causal=true)", "halo(block=2, halo=1)", "clear(radius=2)",
    "clear(radius=2, pool=2)", "routing(regions=2, topk=1)", "routing(regions=3, topk=2)", "agent(agents=2)",
    "linear(feature=elu)", "linear(feature=hedgehog)", "flow", "mala", "wersa(features=8)",
    "sigmoid(sparse=halo(block=2, halo=1))",
    "sparselinear(sparse=na(window=3))", "clipped(sparse=clear(radius=2), alpha=1)", "groups(2)",
    "selective(of=gated(of=na(window=3)))", "topk(keep=2, block=3)", "topp(p=0.6, block=3, causal=true)",
    "above(tau=0.2, block=1, key_block=4, causal=true)", "topk(keep=1, block=4, rest=mean)",
    "verticalslash(least=1, block=4)", "pruned(by=topk(keep=2, block=4))",
)  # fmt: skip

MODES = ("grad", "none", "inference")


@st.composite
def calls(draw):
    """Pattern, layout, a backend that runs it, q, k, v, key mask, autocast's dtype or None, and a mode."""
    layout, pattern = draw(layouts(sides=(20, 6, 4))), parse(draw(st.sampled_from(PATTERNS)))
    batch, kv_heads = draw(st.integers(0, 3)), draw(st.sampled_from([1, 2]))
    inputs = qkv(layout, 2, kv_heads, 8, batch=batch, dtype=draw(st.sampled_from([torch.float32, torch.float64])))
    mask = None
    if draw(st.booleans()):
        share = draw(st.sampled_from([0.0, 0.3, 0.8, 1.0]))
        mask = torch.rand(batch, layout.length, generator=torch.Generator().manual_seed(4)) < share
    autocast, mode = draw(st.sampled_from([None, torch.bfloat16, torch.float16])), draw(st.sampled_from(MODES))
    dtype = autocast if autocast is not None and inputs[0].dtype != torch.float64 else inputs[0].dtype
    problem = replace(Problem.of(*inputs, Call(pattern, layout, 1.0, mask)), dtype=dtype, grad=mode == "grad")
    able = [n for n in BACKENDS.own if n not in ("triton", "flex") and verdict(load(n), problem).ok]
    return pattern, layout, draw(st.sampled_from(["auto", *able])), inputs, mask, autocast, mode


@settings(deadline=None, max_examples=120)
@given(calls())
def test_a_batch_is_its_samples(call):
    pattern, layout, backend, inputs, mask, autocast, mode = call
    learns = mode == "grad"
    leaves = [t.detach().requires_grad_(learns) for t in inputs]

    def run(tensors, key_mask):
        return visattn.attention(*tensors, pattern, layout, backend=backend, key_mask=key_mask)

    # What one mode leaves in caches is used by the next example's.
    low = torch.autocast("cpu", dtype=autocast or torch.bfloat16, enabled=autocast is not None)
    with low, torch.inference_mode(mode == "inference"):
        out = run(leaves, mask)
    narrow = autocast is not None and inputs[0].dtype != torch.float64
    assert out.dtype == (autocast if narrow else inputs[0].dtype) and out.requires_grad == learns
    assert out.shape == inputs[0].shape and out.isfinite().all()
    cast = [t.detach().to(out.dtype).requires_grad_(learns) for t in inputs]
    parts = [
        run([t[i : i + 1] for t in cast], None if mask is None else mask[i : i + 1]) for i in range(len(inputs[0]))
    ]
    together = torch.cat([cast[0][:0], *parts])
    tolerance = 0.03 if narrow else 1e-4 if out.dtype == torch.float32 else 1e-9
    assert torch.allclose(out, together, atol=tolerance, rtol=tolerance)
    if learns and len(parts):
        found, truth = gradients(out, leaves), gradients(together, cast)
        for own, other, tensor in zip(found, truth, inputs, strict=True):
            assert own.dtype == tensor.dtype and own.isfinite().all()
            assert (own - other).norm() <= 2 * tolerance * other.norm().clamp(min=1.0)


@settings(deadline=None, max_examples=50)
@given(calls())
def test_what_a_key_mask_hides_changes_nothing_elsewhere(call):
    """Neither as a key nor in what a pattern makes of all queries and keys: routes, agents, means, sums."""
    pattern, layout, backend, inputs, mask, _, _ = call
    if mask is None or not len(mask):
        mask = torch.arange(layout.length).expand(len(inputs[0]), -1) % 3 != 1
    other = [torch.where(mask[:, :, None, None], t, 9 * t.flip(1) + 5) for t in inputs]
    out, changed = (
        visattn.attention(*tensors, pattern, layout, backend=backend, key_mask=mask) for tensors in (inputs, other)
    )
    assert torch.allclose(out[mask], changed[mask], atol=1e-6, rtol=1e-5)


def with_gradients(backend, pattern, layout, inputs, mask):
    """The backend, or "auto" in the place of one that was drawn for a call without gradients."""
    problem = replace(Problem.of(*inputs, Call(pattern, layout, 1.0, mask)), grad=True)
    return backend if backend == "auto" or verdict(load(backend), problem).ok else "auto"


def by_checkpoint(run, inputs, reentrant):
    leaves = [t.detach().requires_grad_() for t in inputs]
    out = checkpoint(run, *leaves, use_reentrant=reentrant)
    # The reentrant form works with backward() alone.
    out.backward(weight_of(out))
    return [t.grad for t in leaves]


def weight_of(out):
    """That of `gradients`."""
    return torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(out.dtype)


def by_function(run, inputs):
    weight = weight_of(inputs[0])
    return torch.func.grad(lambda *own: (run(*own) * weight).sum(), (0, 1, 2))(*inputs)


def by_samples(run, inputs):
    """Under vmap, with samples of one image each."""
    each = torch.func.grad(lambda q, k, v, w: (run(q[None], k[None], v[None])[0] * w).sum(), (0, 1, 2))
    return torch.func.vmap(each)(*inputs, weight_of(inputs[0]))


@settings(deadline=None, max_examples=25)
@given(call=calls(), data=st.data())
def test_gradients_are_the_same_whatever_asks_for_them(call, data):
    """Checkpointing, functional transforms and fake tensors, one after the other on the same caches."""
    pattern, layout, backend, inputs, mask, _, _ = call
    backend = with_gradients(backend, pattern, layout, inputs, mask)

    def run(q, k, v):
        return visattn.attention(q, k, v, pattern, layout, backend=backend, key_mask=mask)

    leaves = [t.detach().requires_grad_() for t in inputs]
    truth = gradients(run(*leaves), leaves)
    ways = {
        "checkpoint": lambda: by_checkpoint(run, inputs, False),
        "reentrant": lambda: by_checkpoint(run, inputs, True),
        "function": lambda: by_function(run, inputs),
        "again": lambda: gradients(run(*leaves), leaves),
    }
    if mask is None and len(inputs[0]):
        ways["samples"] = lambda: by_samples(run, inputs)
    for way in data.draw(st.permutations(list(ways))):
        with FakeTensorMode() as fake:
            stand_ins = [fake.from_tensor(t) for t in inputs]
            shown = None if mask is None else fake.from_tensor(mask)
            out = visattn.attention(*stand_ins, pattern, layout, backend=backend, key_mask=shown)
            assert out.shape == inputs[0].shape and out.dtype == inputs[0].dtype
        for ours, theirs in zip(ways[way](), truth, strict=True):
            limit = 1e-9 if ours.dtype == torch.float64 else 1e-4
            assert (ours - theirs).norm() <= limit * theirs.norm().clamp(min=1.0), way


@settings(deadline=None, max_examples=25)
@given(call=calls())
def test_second_derivatives_are_differences_of_the_first(call):
    pattern, layout, backend, inputs, mask, _, _ = call
    inputs = [t.double() for t in inputs]
    assume(len(inputs[0]))
    backend = with_gradients(backend, pattern, layout, inputs, mask)
    made = torch.Generator().manual_seed(3)
    directions = [torch.randn(t.shape, generator=made, dtype=t.dtype) for t in inputs]

    def first(step, graph=False):
        leaves = [(t + step * d).requires_grad_() for t, d in zip(inputs, directions, strict=True)]
        out = visattn.attention(*leaves, pattern, layout, backend=backend, key_mask=mask)
        # Everything behind the attention is linear.
        found = torch.autograd.grad((out * weight_of(out)).sum(), leaves, create_graph=graph)
        return leaves, sum((g * d).sum() for g, d in zip(found, directions, strict=True))

    leaves, slope = first(0.0, graph=True)
    second = (
        torch.autograd.grad(slope, leaves, allow_unused=True, materialize_grads=True) if slope.requires_grad else []
    )
    ours = sum((g * d).sum().item() for g, d in zip(second, directions, strict=False))
    truths = [((first(h)[1] - first(-h)[1]) / (2 * h)).item() for h in (1e-4, 5e-5)]
    # A choice (of regions, of the sign of a feature) may change between the two ends.
    assume(abs(truths[0] - truths[1]) < 1e-4 * max(1.0, abs(truths[0])))
    assert abs(ours - truths[1]) < 1e-3 * max(1.0, abs(truths[1]))
