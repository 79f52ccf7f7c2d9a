"""Gradients of a call that runs again for them, below autograd's part of torch's dispatcher too."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch

from visattn.prepare import run_like
from visattn.problem import Call


@contextmanager
def autograd_inside_operator() -> Iterator[None]:
    """An operator runs below the autograd keys of torch's dispatcher: record a graph there all the same."""
    autograd = [getattr(torch._C.DispatchKey, key) for key in ("AutogradCPU", "AutogradCUDA", "ADInplaceOrView")]
    excluded = torch._C._dispatch_tls_local_exclude_set()
    for key in autograd:
        excluded = excluded.remove(key)
    with torch._C._ForceDispatchKeyGuard(torch._C._dispatch_tls_local_include_set(), excluded):
        yield


def gradient_leaf(t: torch.Tensor, graph: bool) -> torch.Tensor:
    """What to differentiate by instead of an input; with `graph` still connected to where the input comes from."""
    return t.view_as(t) if graph and t.requires_grad else t.detach().requires_grad_()


def recompute_gradients(
    grad_out: torch.Tensor | None,
    grad_lse: torch.Tensor | None,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    call: Call,
    backend: str,
    graph: bool = False,
) -> list[torch.Tensor]:
    """Run the call again with gradients; returns those of q, k, v, rpb (empty without one) and the parameters.

    Gradients of results that are None are zeros. With `graph` the found ones can be differentiated again.
    """
    with autograd_inside_operator(), torch.enable_grad():
        leaves = [gradient_leaf(t, graph) for t in (q, k, v)]
        rpb = None if call.rpb is None else gradient_leaf(call.rpb, graph)
        parameters = {name: gradient_leaf(t, graph) for name, t in call.parameters.items()}
        own = replace(call, rpb=rpb, parameters=parameters)
        out, lse = run_like(leaves[0], leaves[1], leaves[2], own, backend)
        outputs, grads = [out], [torch.zeros_like(out) if grad_out is None else grad_out]
        if call.lse and lse is not None and grad_lse is not None:
            outputs.append(lse)
            grads.append(grad_lse)
        inputs = [*leaves, *([] if rpb is None else [rpb]), *parameters.values()]
        # A pattern that covers the grid may not use all of its parameters.
        again = {"create_graph": graph, "allow_unused": True, "materialize_grads": True}
        found = torch.autograd.grad(outputs, inputs, grads, **again)
        made = [g.contiguous() for g in found]
        return made if rpb is not None else [*made[:3], q.new_empty(0), *made[3:]]
