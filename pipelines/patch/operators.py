"""Patched attention as operators of torch: torch.compile sees opaque nodes and traces no decision.

The step, the grid and the pattern are looked up when an operator runs, so that none of them is a constant of a
compiled graph.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from visattn.operands import wants_gradient
from visattn.operator import above, below, define
from visattn.ops import without_values
from visattn.patterns import Dense
from visattn.patterns.choice.memory import Place, placed
from visattn.pipelines.families.base import Seen
from visattn.pipelines.patch.decision import DECISION_BYTES, Decision
from visattn.pipelines.patch.numbering import look_up, path_of, stock_of
from visattn.pipelines.patch.on_slabs import attend_again, attend_on_slabs
from visattn.prepare import PLAIN
from visattn.rerun import autograd_inside_operator, gradient_leaf
from visattn.runtime.call import AttentionCall
from visattn.runtime.masks import key_validity
from visattn.runtime.sequences import Sequences
from visattn.runtime.where import Sample


@contextmanager
def _told(owner: Any, module: torch.Tensor | None) -> Iterator[None]:
    """Inside, what patterns keep belongs to the module that compiled code told."""
    if module is None:
        yield
        return
    here = owner.run.here
    here.told = path_of(owner.number, int(module))
    try:
        yield
    finally:
        here.told = None


def _patched_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor | None,
    scale: float | None,
    grouped: bool,
    group: int,
    parameters: list[torch.Tensor],
    module: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    owner = look_up(group)
    call = AttentionCall(q, k, v, mask, scale, grouped)
    if owner is None:
        # A processor that has outlived its patch.
        stock = stock_of(group)
        assert stock is not None, f"compiled code of group {group} outlives its processors"
        return stock(call).contiguous(), Decision((), Dense(), "auto", None, stock).encode()
    if owner.run.sharding is not None:
        out, shared = attend_on_slabs(owner, call, compiled=True)
        return out.contiguous(), owner.encoded(shared.layouts, shared.cut, shared.pattern)
    kind = owner.key(q, k, v, scale, False, "compiled") if mask is None and not parameters else None
    given = {n: t.detach().to(q.device) for n, t in zip(owner.parameters, parameters, strict=True)}
    with _told(owner, module):
        out, layouts = owner.attend(call, None, given, kind, "compiled")
    return out.contiguous(), owner.encoded(layouts)


def _fake_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor | None,
    scale: float | None,
    grouped: bool,
    group: int,
    parameters: list[torch.Tensor],
    module: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    return q.new_empty((*q.shape[:3], v.shape[3])), torch.empty(DECISION_BYTES, dtype=torch.uint8)


def _patched_attention_backward(
    grad: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor | None,
    decision: torch.Tensor,
    scale: float | None,
    grouped: bool,
    parameters: list[torch.Tensor],
) -> list[torch.Tensor]:
    return _again(grad, q, k, v, mask, decision, scale, grouped, parameters, graph=False)


def _again(
    grad: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor | None,
    decision: torch.Tensor,
    scale: float | None,
    grouped: bool,
    parameters: list[torch.Tensor],
    graph: bool,
) -> list[torch.Tensor]:
    """Run the call again for the gradients of q, k, v and the parameters; with `graph` they have a graph themselves."""
    made = Decision.decode(decision)
    with autograd_inside_operator(), torch.enable_grad():
        leaves = [gradient_leaf(t, graph) for t in (q, k, v, *parameters)]
        call = AttentionCall(leaves[0], leaves[1], leaves[2], mask, scale, grouped)
        if made.layouts:
            keys = key_validity(mask, q, made.mask_row, k.shape[1])
            assert not isinstance(keys, str), keys
            given = {n: t.to(q.device) for n, t in zip(made.names, leaves[3:], strict=True)}
            with placed(Place(None)):
                if made.cut is not None:
                    out = attend_again(call, made.pattern, made.layouts[0], made.cut, made.backend, keys)
                else:
                    sequences = Sequences.of(call, keys, made.layouts[0])
                    out = sequences.attend(made.pattern, made.layouts, made.backend, given)
        else:
            out = made.stock(call)
        # The stock attention uses no parameters.
        found = torch.autograd.grad(out, leaves, grad, create_graph=graph, allow_unused=True, materialize_grads=True)
    return [g.contiguous() for g in found]


def _fake_backward(
    grad: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *rest: Any
) -> list[torch.Tensor]:
    return [t.new_empty(t.shape) for t in (q, k, v, *rest[-1])]


PATCHED_ATTENTION = define("patched_attention", _patched_attention, _fake_attention)
PATCHED_BACKWARD = define("patched_attention_backward", _patched_attention_backward, _fake_backward)


class _Attention(torch.autograd.Function):
    """The operator with its gradient."""

    @staticmethod
    def forward(rest: tuple[float | None, bool, int], module: torch.Tensor | None, *tensors: Any) -> Any:
        q, k, v, mask, *parameters = tensors
        return below(PATCHED_ATTENTION, q, k, v, mask, *rest, parameters, module)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, torch.Tensor]) -> None:
        (scale, grouped, _), _, q, k, v, mask, *parameters = inputs
        ctx.save_for_backward(q, k, v, mask, output[1], *parameters)
        ctx.mark_non_differentiable(output[1])
        ctx.rest = scale, grouped

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor, _: Any) -> tuple[Any, ...]:
        saved = ctx.saved_tensors
        given: Any = (grad, *saved[:5], *ctx.rest, list(saved[5:]))
        # What an operator returns has no graph: where one is asked for, the same is done outside of it.
        gradients = _again(*given, graph=True) if torch.is_grad_enabled() else PATCHED_BACKWARD(*given)
        return None, None, *gradients[:3], None, *gradients[3:]


def patched_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor | None,
    scale: float | None,
    grouped: bool,
    group: int,
    parameters: list[torch.Tensor],
    module: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of q, k, v [B, S, H, D] at a module of a group; returns the output and the encoded decision.

    `module` is its number in the group's paths, where what the pattern keeps goes by modules.
    """
    if wants_gradient(q, k, v, *parameters):
        return _Attention.apply((scale, grouped, group), module, q, k, v, mask, *parameters)
    plain = type(q) in PLAIN and type(k) in PLAIN and type(v) in PLAIN
    owner = look_up(group) if mask is None and not parameters and plain and not without_values(q) else None
    if owner is not None and owner.run.sharding is None:
        stock = functools.partial(owner.stock.unmasked, q, k, v, scale, grouped)
        with _told(owner, module):
            found = owner.attend_alike(q, k, v, scale, False, "compiled", stock)
        if found is not None:
            return found[0].contiguous(), owner.encoded(found[1])
    return below(PATCHED_ATTENTION, q, k, v, mask, scale, grouped, group, parameters, module)


above(PATCHED_ATTENTION, patched_attention)


def _begin_forward(
    latents: torch.Tensor,
    ids: torch.Tensor | None,
    grid: list[int],
    prefix: int,
    suffix: int,
    samples: list[int],
    why: str,
    run: int,
    gradients: bool,
) -> torch.Tensor:
    """Tell a run that a forward begins; returns the latents, so that everything after depends on it.

    `samples` are the numbers of each `Sample`, one after the other; `gradients` says whether they are switched on
    around the model, which no operator can see.
    """
    owner = look_up(run)
    if owner is not None:
        size = owner.family.dims + 1
        each = [samples[at : at + size] for at in range(0, len(samples), size)]
        apart = tuple(Sample(tuple(numbers[:-1]), numbers[-1]) for numbers in each)
        owner.begin(Seen(tuple(grid), prefix, suffix, ids, why, apart), compiled=True, gradients=gradients)
    return latents.clone()


def _fake_begin(
    latents: torch.Tensor,
    ids: torch.Tensor | None,
    grid: list[int],
    prefix: int,
    suffix: int,
    samples: list[int],
    why: str,
    run: int,
    gradients: bool,
) -> torch.Tensor:
    return torch.empty_like(latents)


BEGIN_FORWARD = define("begin_forward", _begin_forward, _fake_begin)


class _Begin(torch.autograd.Function):
    """The operator with its gradient, which passes through."""

    @staticmethod
    def forward(latents: torch.Tensor, *rest: Any) -> torch.Tensor:
        return below(BEGIN_FORWARD, latents, *rest)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.rest = len(inputs) - 1

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[Any, ...]:
        return grad, *[None] * ctx.rest


above(BEGIN_FORWARD, _Begin.apply)
