"""`attention()` as one operator of torch, so that torch.compile sees a single opaque node."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch

from visattn.checks import check_call
from visattn.dispatch import Call, run_call
from visattn.layout import Layout
from visattn.patterns import Pattern, parse


def attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    pattern: Pattern | str,
    layout: Layout,
    scale: float,
    key_mask: torch.Tensor | None,
    rpb: torch.Tensor | None,
    pool_weight: torch.Tensor | None,
    backend: str,
    lse: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The traceable form of `attention`; the log-sum-exp is empty unless `lse`."""
    where = _text(pattern), list(layout.grid), layout.prefix, layout.suffix
    return _attend(q, k, v, key_mask, rpb, pool_weight, *where, scale, backend, lse)


def _text(pattern: Pattern | str) -> str:
    return str(parse(pattern))


# What `torch.compiler.assume_constant_result` does, without importing the compiler (a second) for those who do not
# compile.
_text._dynamo_marked_constant = True  # type: ignore[attr-defined]


@torch.library.custom_op("visattn::attend", mutates_args=())
def _attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    key_mask: torch.Tensor | None,
    rpb: torch.Tensor | None,
    pool_weight: torch.Tensor | None,
    pattern: str,
    grid: list[int],
    prefix: int,
    suffix: int,
    scale: float,
    backend: str,
    lse: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    call = Call(parse(pattern), Layout(grid, prefix, suffix), scale, key_mask, rpb, lse, pool_weight)
    return detached(*run_call(q, k, v, call, backend), call)


def detached(out: torch.Tensor, lse: torch.Tensor | None, call: Call) -> tuple[torch.Tensor, torch.Tensor]:
    """What an operator may return: contiguous tensors that alias no input, an empty lse where none is wanted."""
    wide = torch.promote_types(out.dtype, torch.float32)
    wanted = lse.contiguous() if call.lse and lse is not None else out.new_empty(0, dtype=wide)
    return out.contiguous(), wanted


def empty_results(q: torch.Tensor, lse: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Shapes of an operator's results, for tracing."""
    wide = torch.promote_types(q.dtype, torch.float32)
    return q.new_empty(q.shape), q.new_empty(q.shape[:3] if lse else (0,), dtype=wide)


@_attend.register_fake
def _(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    key_mask: torch.Tensor | None,
    rpb: torch.Tensor | None,
    pool_weight: torch.Tensor | None,
    pattern: str,
    grid: list[int],
    prefix: int,
    suffix: int,
    scale: float,
    backend: str,
    lse: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    check_call(q, k, v, parse(pattern), Layout(grid, prefix, suffix), key_mask, rpb, pool_weight)
    return empty_results(q, lse)


@torch.library.custom_op("visattn::attend_backward", mutates_args=())
def _attend_backward(
    grad_out: torch.Tensor,
    grad_lse: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    key_mask: torch.Tensor | None,
    rpb: torch.Tensor | None,
    pool_weight: torch.Tensor | None,
    pattern: str,
    grid: list[int],
    prefix: int,
    suffix: int,
    scale: float,
    backend: str,
    lse: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    call = Call(parse(pattern), Layout(grid, prefix, suffix), scale, key_mask, rpb, lse, pool_weight)
    dq, dk, dv, *optional = recompute_gradients(grad_out, grad_lse, q, k, v, call, backend)
    return dq, dk, dv, optional[0], optional[1]


@contextmanager
def autograd_inside_operator() -> Iterator[None]:
    """An operator runs below the autograd keys of torch's dispatcher: record a graph there all the same."""
    autograd = [getattr(torch._C.DispatchKey, key) for key in ("AutogradCPU", "AutogradCUDA", "ADInplaceOrView")]
    excluded = torch._C._dispatch_tls_local_exclude_set()
    for key in autograd:
        excluded = excluded.remove(key)
    with torch._C._ForceDispatchKeyGuard(torch._C._dispatch_tls_local_include_set(), excluded):
        yield


def recompute_gradients(
    grad_out: torch.Tensor,
    grad_lse: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    call: Call,
    backend: str,
) -> list[torch.Tensor]:
    """Run the call again with gradients; returns those of q, k, v, rpb and pool_weight (empty without one)."""
    with autograd_inside_operator(), torch.enable_grad():
        leaves = [t.detach().requires_grad_() for t in (q, k, v)]
        given = [None if t is None else t.detach().requires_grad_() for t in (call.rpb, call.pool_weight)]
        again = replace(call, rpb=given[0], pool_weight=given[1])
        out, lse = run_call(leaves[0], leaves[1], leaves[2], again, backend)
        outputs, grads = [out], [grad_out]
        if call.lse and lse is not None:
            outputs.append(lse)
            grads.append(grad_lse)
        inputs = [*leaves, *(t for t in given if t is not None)]
        found = iter([g.contiguous() for g in torch.autograd.grad(outputs, inputs, grads)])
        return [q.new_empty(0) if t is None else next(found) for t in (*leaves, *given)]


@_attend_backward.register_fake
def _(
    grad_out: torch.Tensor, grad_lse: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *args: Any
) -> tuple[torch.Tensor, ...]:
    optional = (q.new_empty(0) if t is None else t.new_empty(t.shape) for t in args[1:3])
    return *(t.new_empty(t.shape) for t in (q, k, v)), *optional


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, torch.Tensor]) -> None:
    ctx.save_for_backward(*inputs[:6])
    ctx.rest = inputs[6:]
    ctx.set_materialize_grads(True)


def _backward(ctx: Any, grad_out: torch.Tensor, grad_lse: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    dq, dk, dv, *optional = _attend_backward(grad_out, grad_lse, *ctx.saved_tensors, *ctx.rest)
    given = [None if t is None else g for t, g in zip(ctx.saved_tensors[4:], optional, strict=True)]
    return dq, dk, dv, None, *given, *(None for _ in ctx.rest)


_attend.register_autograd(_backward, setup_context=_setup_context)
