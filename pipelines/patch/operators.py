"""Patched attention as operators of torch: torch.compile sees opaque nodes and traces no decision.

The step, the grid and the pattern are looked up when an operator runs, so that none of them is a constant of a
compiled graph.
"""

from __future__ import annotations

import functools
from typing import Any

import torch

from visattn.ops import autograd_inside_operator, gradient_leaf
from visattn.patterns import Dense
from visattn.patterns.choice.memory import Place, placed
from visattn.pipelines.families.base import Sample, Seen
from visattn.pipelines.patch.decision import DECISION_BYTES, Decision
from visattn.pipelines.patch.numbering import look_up, stock_of
from visattn.runtime.call import AttentionCall
from visattn.runtime.masks import key_validity
from visattn.runtime.sequences import Sequences


@torch.library.custom_op("visattn::patched_attention", mutates_args=())
def patched_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor | None,
    scale: float | None,
    grouped: bool,
    group: int,
    parameters: list[torch.Tensor],
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of q, k, v [B, S, H, D] at a module of a group; returns the output and the encoded decision."""
    owner = look_up(group)
    call = AttentionCall(q, k, v, mask, scale, grouped)
    if owner is None:
        # A processor that has outlived its patch.
        stock = stock_of(group)
        assert stock is not None, f"compiled code of group {group} outlives its processors"
        return stock(call).contiguous(), Decision((), Dense(), "auto", None, stock).encode()
    kind = owner.key(q, k, v, scale, False, "compiled") if mask is None and not parameters else None
    if kind is not None:
        stock = functools.partial(owner.stock.unmasked, q, k, v, scale, grouped)
        found = owner.attend_alike(kind, (q, k, v), scale, None, False, stock)
        if found is not None:
            return found[0].contiguous(), owner.encoded(found[1])
    given = {n: t.detach().to(q.device) for n, t in zip(owner.parameters, parameters, strict=True)}
    out, layouts = owner.attend(call, None, given, kind, "compiled")
    return out.contiguous(), owner.encoded(layouts)


@patched_attention.register_fake
def _(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor | None,
    scale: float | None,
    grouped: bool,
    group: int,
    parameters: list[torch.Tensor],
) -> tuple[torch.Tensor, torch.Tensor]:
    return q.new_empty((*q.shape[:3], v.shape[3])), torch.empty(DECISION_BYTES, dtype=torch.uint8)


@torch.library.custom_op("visattn::patched_attention_backward", mutates_args=())
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
            keys = key_validity(mask, q, made.mask_row)
            assert not isinstance(keys, str), keys
            given = {n: t.to(q.device) for n, t in zip(made.names, leaves[3:], strict=True)}
            with placed(Place(None)):
                out = Sequences.of(call, keys).attend(made.pattern, made.layouts, made.backend, given)
        else:
            out = made.stock(call)
        # The stock attention uses no parameters.
        found = torch.autograd.grad(out, leaves, grad, create_graph=graph, allow_unused=True, materialize_grads=True)
    return [g.contiguous() for g in found]


@_patched_attention_backward.register_fake
def _(grad: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *rest: Any) -> list[torch.Tensor]:
    return [t.new_empty(t.shape) for t in (q, k, v, *rest[-1])]


def _save_attention(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, torch.Tensor]) -> None:
    q, k, v, mask, scale, grouped, _, parameters = inputs
    ctx.save_for_backward(q, k, v, mask, output[1], *parameters)
    ctx.mark_non_differentiable(output[1])
    ctx.rest = scale, grouped


def _attention_gradients(ctx: Any, grad: torch.Tensor, _: Any) -> tuple[Any, ...]:
    saved = ctx.saved_tensors
    given: Any = (grad, *saved[:5], *ctx.rest, list(saved[5:]))
    # What an operator returns has no graph: where one is asked for, the same is done outside of it.
    gradients = _again(*given, graph=True) if torch.is_grad_enabled() else _patched_attention_backward(*given)
    return *gradients[:3], None, None, None, None, gradients[3:]


patched_attention.register_autograd(_attention_gradients, setup_context=_save_attention)


@torch.library.custom_op("visattn::begin_forward", mutates_args=())
def begin_forward(
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


@begin_forward.register_fake
def _(
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


begin_forward.register_autograd(lambda ctx, grad: (grad, *[None] * 8))
