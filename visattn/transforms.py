"""`attention()` under torch.func: vmap makes one larger batch of its samples, grad takes the engines' own gradients."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.autograd import forward_ad

from visattn import ops
from visattn.prepare import run_call
from visattn.problem import Call
from visattn.rerun import recompute_gradients

Tensors = Sequence[torch.Tensor | None]


@dataclass(frozen=True)
class Asked:
    """A call without its tensors, which autograd has to see: q, k, v, key mask, bias and parameters in this order.

    Attributes:
        call: The call, whose own tensors are not used.
        backend: Who is to run it.
        names: Of the parameters.
    """

    call: Call
    backend: str
    names: tuple[str, ...]

    def on(self, tensors: Tensors) -> Call:
        """The call on these tensors."""
        given = dict(zip(self.names, tensors[5:], strict=True))
        own = self.call
        return replace(own, key_mask=tensors[3], rpb=tensors[4], parameters=given)


def active() -> bool:
    """Whether a transform of torch.func or forward-mode differentiation is on."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, call: Call, backend: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """A checked call; the log-sum-exp is empty unless `call.lse`."""
    library: Any = torch._C
    stack = library._functorch.peek_interpreter_stack()
    if stack is not None and stack.key() == library._functorch.TransformType.Functionalize:
        # The operator changes nothing in place, and functions of autograd are unknown there.
        where = call.pattern, call.layout, call.scale, call.key_mask, call.rpb
        return ops.attend(q, k, v, *where, call.parameters, backend, call.lse, call.precision)
    names = tuple(call.parameters)
    tensors = (q, k, v, call.key_mask, call.rpb, *call.parameters.values())
    return _Attend.apply(Asked(call, backend, names), *tensors)


class _Attend(torch.autograd.Function):
    """Takes what is asked and its tensors; gives output and log-sum-exp."""

    @staticmethod
    def forward(asked: Asked, *tensors: Any) -> tuple[torch.Tensor, torch.Tensor]:
        call, (q, k, v) = asked.on(tensors), tensors[:3]
        out, lse = run_call(q, k, v, call, asked.backend)
        return ops.detached(out, lse, call.lse)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.asked = inputs[0]
        ctx.save_for_backward(*inputs[1:])
        ctx.save_for_forward(*inputs[1:])

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Any, ...]:
        saved = ctx.saved_tensors
        found = _Gradients.apply(ctx.asked, *grads, *saved)
        return None, *found[:3], None, None if saved[4] is None else found[3], *found[4:]

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        raise ValueError(
            "attention() has no forward-mode derivatives (jvp, jacfwd, forward_ad): use grad, vjp or jacrev"
        )

    @staticmethod
    def vmap(info: Any, dims: tuple[Any, ...], asked: Asked, *tensors: Any) -> tuple[Any, Any]:
        number = info.batch_size
        if any(dim is not None for dim in dims[5:]):
            # Another bias or other parameters for each sample: no one call has that.
            return _one_by_one(_Attend.apply, number, dims[1:], asked, tensors)
        first = [_folded(t, dim, number) for t, dim in zip(tensors[:4], dims[1:5], strict=True)]
        out, lse = _Attend.apply(asked, *first, *tensors[4:])
        return _unfolded((out, lse), number)


class _Gradients(torch.autograd.Function):
    """Takes what is asked, gradients of its results, and its tensors; gives those of q, k, v, bias and parameters."""

    @staticmethod
    def forward(asked: Asked, grad_out: Any, grad_lse: Any, *tensors: Any) -> tuple[torch.Tensor, ...]:
        q, k, v = tensors[:3]
        with _saved_tensor_hooks():
            found = recompute_gradients(grad_out, grad_lse, q, k, v, asked.on(tensors), asked.backend)
        return tuple(found)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        raise ValueError(
            "torch.func takes first derivatives of attention() only: take second ones by "
            "torch.autograd.grad(..., create_graph=True) outside of its transforms"
        )

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        return _Attend.jvp(ctx, *tangents)

    @staticmethod
    def vmap(info: Any, dims: tuple[Any, ...], asked: Asked, *tensors: Any) -> tuple[Any, Any]:
        number = info.batch_size
        if any(t is not None for t in tensors[6:]):
            # One call would add up their gradients over the samples.
            return _one_by_one(_Gradients.apply, number, dims[1:], asked, tensors)
        folded = [_folded(t, dim, number) for t, dim in zip(tensors[:6], dims[1:7], strict=True)]
        return _unfolded(_Gradients.apply(asked, *folded, None), number)


@contextmanager
def _saved_tensor_hooks() -> Iterator[None]:
    """Let engines checkpoint: torch.func forbids hooks of saved tensors, but here none of its tensors is left."""
    hooks: Any = torch._C
    reason = hooks._autograd._saved_tensors_hooks_get_disabled_error_message()
    if reason is None:
        yield
        return
    hooks._autograd._saved_tensors_hooks_enable()
    try:
        yield
    finally:
        hooks._autograd._saved_tensors_hooks_disable(reason)


def _folded(tensor: torch.Tensor | None, dim: int | None, number: int) -> torch.Tensor | None:
    """A tensor [B, ...] of every sample as [samples * B, ...]; an empty log-sum-exp [0] stays so."""
    if tensor is None:
        return None
    if tensor.ndim - (dim is not None) < 2:
        # Where nobody asked for the log-sum-exp.
        return tensor if dim is None else tensor.select(dim, 0)
    each = tensor.expand(number, *tensor.shape) if dim is None else tensor.movedim(dim, 0)
    return each.flatten(0, 1)


def _unfolded(results: Sequence[torch.Tensor], number: int) -> tuple[Any, Any]:
    """Results [samples * B, ...] as [samples, B, ...], and where the samples are."""
    whole = [t.ndim > 1 for t in results]
    shaped = (t.unflatten(0, (number, len(t) // number)) if full else t for t, full in zip(results, whole, strict=True))
    return tuple(shaped), tuple(0 if full else None for full in whole)


def _one_by_one(
    apply: Callable[..., Any], number: int, dims: Sequence[Any], asked: Asked, tensors: Tensors
) -> tuple[Any, Any]:
    """The results of each sample on its own, stacked."""
    results = []
    for i in range(number):
        own = (t if t is None or d is None else t.select(d, i) for t, d in zip(tensors, dims, strict=True))
        results.append(apply(asked, *own))
    stacked = tuple(torch.stack(each) for each in zip(*results, strict=True))
    return stacked, (0,) * len(stacked)
