"""First, second and third derivatives of a call whose results enter a loss linearly."""

from __future__ import annotations

import math

import torch

from visattn import attention


def derivatives(inputs, pattern, layout, backend, order=2, key_mask=None, scale=None, lse=True, names=()):
    """Gradients of random weightings, each of the gradients before it.

    Args:
        inputs: q, k, v, then rpb or the parameters called `names`.
        pattern: The pattern.
        layout: The tokens.
        backend: The backend.
        order: How many times to differentiate.
        key_mask: bool [B, S], or None.
        scale: Factor on the logits, or None.
        lse: Whether the loss has the log-sum-exp in it.
        names: Names of the parameters behind v; without any it is rpb.
    """
    leaves = [t.detach().requires_grad_() for t in inputs]
    q, k, v, *rest = leaves
    given = {"parameters": dict(zip(names, rest, strict=True))} if names else {"rpb": rest[0] if rest else None}
    found = attention(
        q, k, v, pattern, layout, scale=scale, key_mask=key_mask, backend=backend, return_lse=lse, **given
    )
    outputs = [found[0], found[1].masked_fill(found[1] == -math.inf, 0)] if lse else [found]
    made = torch.Generator().manual_seed(5)
    results = []
    for i in range(order):
        weights = [torch.randn(t.shape, generator=made, dtype=torch.float64).to(t) for t in outputs]
        outputs = torch.autograd.grad(
            outputs, leaves, weights, create_graph=i + 1 < order, allow_unused=True, materialize_grads=True
        )
        results += outputs
    return results
