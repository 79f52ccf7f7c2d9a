"""Second derivatives of engines whose own backward has none.

A backward runs with gradients enabled where somebody asks for its graph (`create_graph=True`). What kernels compute
there has no graph: the gradient would be a constant, and second derivatives zero without a word. So every engine that
is no composition of differentiable operators has a *formula*, its gradients by plain operators, for that case: our own
functions take it in their backward, other people's engines run `with_formula`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch

from visattn.kernels.tiles.backend import listed_call
from visattn.kernels.tiles.plain import gradients
from visattn.kernels.unchanged import once_more
from visattn.operands import wants_gradient
from visattn.problem import Call

Results = tuple[torch.Tensor, torch.Tensor | None]
Tensors = Sequence[torch.Tensor | None]
# Of the inputs and the gradients of the outputs, None for zeros: the gradients of the inputs.
Formula = Callable[[Tensors, Tensors], Tensors]


def of_lists(call: Call, choice: torch.Tensor | None = None) -> Formula:
    """The formula of attention along tile lists: inputs q, k, v and the bias if there is one, outputs out and lse.

    Args:
        call: The call.
        choice: The regions that routing chose in the forward; None chooses again.
    """
    # A formula outlives the forward, and what it holds autograd cannot free or recompute.
    bare = replace(call, rpb=None, parameters={})

    def formula(inputs: Tensors, grads: Tensors) -> Tensors:
        q, k, v, rpb = (*inputs, None)[:4]
        assert q is not None and k is not None and v is not None
        own = listed_call(q, k, v, replace(bare, rpb=rpb), choice)
        return gradients(*own.tensors, rpb, own.work(bare.scale), *(*grads, None)[:2])[: len(inputs)]

    return once_more(formula, (call.key_mask,))


def by_autograd(compute: Callable[..., torch.Tensor]) -> Formula:
    """The formula of one output that differentiable operators compute from the same inputs."""

    def formula(inputs: Tensors, grads: Tensors) -> Tensors:
        if grads[0] is None:
            return [None] * len(inputs)
        graph = torch.is_grad_enabled()
        with torch.enable_grad():
            # Views, so that the gradient of one input does not pass through another that was computed from it.
            own = [t if t is None else t.view_as(t) for t in inputs]
            wanted = [t for t in own if t is not None and t.requires_grad]
            made = torch.autograd.grad(compute(*own), wanted, grads, create_graph=graph, allow_unused=True)
        found = iter(made)
        return [next(found) if t is not None and t.requires_grad else None for t in own]

    return formula


def lists_with_formula(
    engine: Callable[[torch.Tensor, torch.Tensor, torch.Tensor, Call], Results],
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    call: Call,
    of_operators: bool = False,
) -> Results:
    """`with_formula` of an engine along tile lists; arguments and results as in `Backend.run`."""
    if call.rpb is None:
        return with_formula(lambda q, k, v: engine(q, k, v, call), (q, k, v), lambda: of_lists(call), of_operators)
    run = lambda q, k, v, rpb: engine(q, k, v, replace(call, rpb=rpb))  # noqa: E731
    return with_formula(run, (q, k, v, call.rpb), lambda: of_lists(call), of_operators)


def with_formula(
    engine: Callable[..., Results],
    inputs: Sequence[torch.Tensor],
    formula: Callable[[], Formula],
    of_operators: bool = False,
) -> Results:
    """Run an engine with its own gradients, and with a formula's where their graph is asked for.

    Args:
        engine: Gives one or two outputs for the inputs.
        inputs: What it is differentiated by.
        formula: Makes the formula where there are gradients at all.
        of_operators: Whether the engine is made of torch's own operators: their backward is nothing where no gradient
            comes. Other people's functions may compute with zeros.
    """
    if not wants_gradient(*inputs) or _transformed():
        return engine(*inputs)
    out, lse = engine(*(inputs if of_operators else _entered(inputs)))
    if lse is None:
        return _Out.apply(formula(), 1, out, *inputs)[0], None
    return _Out.apply(formula(), 2, out, lse, *inputs)


def _transformed() -> bool:
    """Whether a tracer or function transform is at work, which has second derivatives or refuses them by itself."""
    return torch.compiler.is_compiling() or torch.jit.is_tracing() or torch._C._are_functorch_transforms_active()


def _entered(inputs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """The inputs of an engine, so that its gradients can be left out; constants stay constants."""
    passed = iter(_In.apply(*(t for t in inputs if t.requires_grad)))
    return [next(passed) if t.requires_grad else t for t in inputs]


class _In(torch.autograd.Function):
    """Where inputs enter an engine: no gradient of a graph comes back from there."""

    @staticmethod
    def forward(ctx: Any, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """The inputs."""
        ctx.set_materialize_grads(False)
        return tuple(t.detach() for t in inputs)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        """The engine's gradients, or nothing."""
        return (None,) * len(grads) if torch.is_grad_enabled() else grads


class _Out(torch.autograd.Function):
    """Where outputs leave an engine: gradients of a graph go to its inputs by the formula."""

    @staticmethod
    def forward(ctx: Any, formula: Formula, number: int, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """The outputs, which are the first `number` tensors; the others are the inputs."""
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors[number:])
        ctx.formula, ctx.number = formula, number
        # Not as views: callers may change an output in place.
        return tuple(t.detach() for t in tensors[:number])

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        """Gradients of the outputs for the engine's own backward, or gradients of the inputs."""
        inputs = ctx.saved_tensors
        if not torch.is_grad_enabled():
            return None, None, *grads, *(None for _ in inputs)
        return None, None, *(None for _ in grads), *ctx.formula(inputs, grads)
