"""One problem, run by the Triton kernels and by the reference in float64."""

from __future__ import annotations

import torch

from visattn import attention, parse


def tensors(layout, heads=1, kv_heads=None, dim=16, batch=1, dtype=torch.float32, rpb="", masked=False, seed=0):
    """q, k, v (and rpb for the pattern `rpb`), and a key mask or None."""
    made = torch.Generator().manual_seed(seed)
    own, keys = kv_heads or heads, layout.keys.length
    shapes = [(batch, n, h, dim) for n, h in ((layout.length, heads), (keys, own), (keys, own))]
    found = [torch.randn(s, generator=made).to(dtype) for s in shapes]
    if rpb:
        found.append(torch.randn((heads, *parse(rpb).rpb_shape(layout.grid)), generator=made))
    mask = torch.rand((batch, keys), generator=made) > 0.4 if masked else None
    return found, mask


def results(inputs, pattern, layout, backend, mask=None, scale=None, lse_weight=1.0):
    """Output, log-sum-exp, and gradients of a loss of both."""
    leaves = [t.detach().requires_grad_() for t in inputs]
    rpb = leaves[3] if len(leaves) > 3 else None
    out, lse = attention(
        *leaves[:3], pattern, layout, scale=scale, key_mask=mask, rpb=rpb, backend=backend, return_lse=True
    )
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    loss = (out.double() * weight).sum() + lse_weight * lse.double().nan_to_num(neginf=0.0).square().sum()
    return [out, lse, *torch.autograd.grad(loss, leaves)]


def compare(inputs, pattern, layout, mask=None, scale=None, limit=1e-5):
    """Assert that the kernels' results are those of the reference; returns them."""
    ours = results(inputs, pattern, layout, "triton", mask, scale)
    truth = results([t.double() for t in inputs], pattern, layout, "reference", mask, scale)
    for name, a, b in zip(["out", "lse", "dq", "dk", "dv", "drpb"], ours, truth, strict=False):
        assert a.shape == b.shape
        finite = b.isfinite()
        assert torch.equal(finite, a.isfinite()), f"{name} is finite elsewhere"
        error = (a.double() - b)[finite].norm() / b[finite].norm().clamp(min=1e-6)
        assert error < limit, f"{name} is off by {error:.1e}"
    return ours
