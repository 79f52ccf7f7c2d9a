"""A batch is its samples: whatever pattern, backend, key mask and dtype, one by one gives what all give together."""

from dataclasses import replace

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import visattn
from tests.support.cases import gradients, layouts, qkv
from visattn.dispatch import BACKENDS, Call, Problem, load, verdict
from visattn.patterns import parse

# Defined on every grid.
PATTERNS = (
    "dense", "na(window=3)", "na(window=4, stride=2, causal=true)", "halo(block=2, halo=1)", "clear(radius=2)",
    "clear(radius=2, pool=2)", "routing(regions=2, topk=1)", "routing(regions=3, topk=2)", "agent(agents=2)",
    "linear(feature=elu)", "linear(feature=hedgehog)", "flow", "mala", "sigmoid(sparse=halo(block=2, halo=1))",
    "sparselinear(sparse=na(window=3))",
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


@settings(deadline=None, max_examples=80)
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
