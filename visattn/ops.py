"""`attention()` as one operator of torch, so that torch.compile sees a single opaque node."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import lru_cache
from typing import Any

import torch

from visattn.checks import check_call, check_steps
from visattn.dispatch import Call
from visattn.keep import stands_in, untraced
from visattn.layout import Layout
from visattn.patterns import Pattern, parse
from visattn.prepare import run_like


def without_values(q: torch.Tensor) -> bool:
    """Whether a tensor only stands in for another: in traced code, under fake and functional modes, on no device."""
    if torch.compiler.is_compiling() or q.is_meta:
        return True
    # A fake tensor may have left its mode.
    return bool(torch._C._len_torch_dispatch_stack() and stands_in()) or hasattr(q, "fake_mode")


def written_down() -> bool:
    """Whether somebody records the operators of torch for programs that know no others: ONNX, torch.jit.trace."""
    return torch.jit.is_tracing() or (torch.compiler.is_compiling() and torch.onnx.is_in_onnx_export())


def constants(parameters: Mapping[str, torch.Tensor]) -> Mapping[str, torch.Tensor]:
    """Parameters of a pattern as a record holds them: they are no part of the model that is traced."""
    with untraced():
        return {name: t.detach() for name, t in parameters.items()}


def attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    pattern: Pattern | str,
    layout: Layout,
    scale: float,
    key_mask: torch.Tensor | None,
    rpb: torch.Tensor | None,
    parameters: Mapping[str, torch.Tensor],
    backend: str,
    lse: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The traceable form of `attention`; the log-sum-exp is empty unless `lse`."""
    where = _text(pattern), [number for side in _sides(layout) for number in side]
    # In the order of their names: a compiled graph does not depend on who filled the mapping in which order.
    names = sorted(parameters)
    return _attend(q, k, v, key_mask, rpb, [parameters[n] for n in names], ",".join(names), *where, scale, backend, lse)


def _text(pattern: Pattern | str) -> str:
    """The text by which the operator finds the pattern again."""
    text = str(parse(pattern))
    if isinstance(pattern, Pattern) and type(parse(text)) is not type(pattern):
        raise ValueError(f"{text!r} is another pattern than this {type(pattern).__qualname__}: register_pattern it")
    return text


def _sides(layout: Layout) -> Iterator[tuple[int, ...]]:
    """A layout as numbers: prefix, suffix and grid of the queries, then of the keys if they have one of their own."""
    for side in (layout, layout.key_layout):
        if side is not None:
            yield side.prefix, side.suffix, *side.grid


def _layout(tokens: Sequence[int]) -> Layout:
    """The layout that an operator's numbers stand for, see `_sides`."""
    # Both sides have equally many axes, at most three, and two numbers besides.
    half = len(tokens) if len(tokens) <= 5 else len(tokens) // 2
    sides = [Layout(own[2:], own[0], own[1]) for own in (tokens[:half], tokens[half:]) if own]
    return sides[0].with_keys(sides[1] if len(sides) > 1 else None)


_known_layout = lru_cache(maxsize=1024)(_layout)


def _named(names: str, parameters: Sequence[torch.Tensor]) -> dict[str, torch.Tensor]:
    """Parameters by name, from names with commas: operators take no lists of texts."""
    return dict(zip(names.split(","), parameters, strict=True)) if names else {}


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
    parameters: list[torch.Tensor],
    names: str,
    pattern: str,
    tokens: list[int],
    scale: float,
    backend: str,
    lse: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    where = parse(pattern), _known_layout(tuple(tokens))
    call = Call(*where, scale, key_mask, rpb, lse, _named(names, parameters))
    return detached(*run_like(q, k, v, call, backend), call)


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
    parameters: list[torch.Tensor],
    names: str,
    pattern: str,
    tokens: list[int],
    scale: float,
    backend: str,
    lse: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    if torch.onnx.is_in_onnx_export():
        raise ValueError(f"ONNX has no operator visattn::attend, and {pattern} could not be written down without it")
    check_call(q, k, v, parse(pattern), _layout(tokens), key_mask, rpb, _named(names, parameters))
    check_steps(parse(pattern))
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
    parameters: list[torch.Tensor],
    names: str,
    pattern: str,
    tokens: list[int],
    scale: float,
    backend: str,
    lse: bool,
) -> list[torch.Tensor]:
    where = parse(pattern), _known_layout(tuple(tokens))
    call = Call(*where, scale, key_mask, rpb, lse, _named(names, parameters))
    return recompute_gradients(grad_out, grad_lse, q, k, v, call, backend)


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
    grad_out: torch.Tensor,
    grad_lse: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    call: Call,
    backend: str,
    graph: bool = False,
) -> list[torch.Tensor]:
    """Run the call again with gradients; returns those of q, k, v, rpb (empty without one) and the parameters.

    With `graph` they can be differentiated again.
    """
    with autograd_inside_operator(), torch.enable_grad():
        leaves = [gradient_leaf(t, graph) for t in (q, k, v)]
        rpb = None if call.rpb is None else gradient_leaf(call.rpb, graph)
        parameters = {name: gradient_leaf(t, graph) for name, t in call.parameters.items()}
        own = replace(call, rpb=rpb, parameters=parameters)
        out, lse = run_like(leaves[0], leaves[1], leaves[2], own, backend)
        outputs, grads = [out], [grad_out]
        if call.lse and lse is not None:
            outputs.append(lse)
            grads.append(grad_lse)
        inputs = [*leaves, *([] if rpb is None else [rpb]), *parameters.values()]
        # A pattern that covers the grid may not use all of its parameters.
        again = {"create_graph": graph, "allow_unused": True, "materialize_grads": True}
        found = torch.autograd.grad(outputs, inputs, grads, **again)
        made = [g.contiguous() for g in found]
        return made if rpb is not None else [*made[:3], q.new_empty(0), *made[3:]]


@_attend_backward.register_fake
def _(
    grad_out: torch.Tensor,
    grad_lse: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    key_mask: torch.Tensor | None,
    rpb: torch.Tensor | None,
    parameters: list[torch.Tensor],
    *args: Any,
) -> list[torch.Tensor]:
    bias = q.new_empty(0) if rpb is None else rpb.new_empty(rpb.shape)
    return [*(t.new_empty(t.shape) for t in (q, k, v)), bias, *(t.new_empty(t.shape) for t in parameters)]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, torch.Tensor]) -> None:
    ctx.save_for_backward(*inputs[:5], *inputs[5])
    ctx.rest = inputs[6:]
    ctx.set_materialize_grads(True)


def _backward(ctx: Any, grad_out: torch.Tensor, grad_lse: torch.Tensor) -> tuple[Any, ...]:
    saved = ctx.saved_tensors
    if torch.is_grad_enabled():
        # A graph of the gradients is asked for, and what an operator returns has none.
        names, pattern, tokens, scale, backend, lse = ctx.rest
        where = parse(pattern), _layout(tokens)
        call = Call(*where, scale, saved[3], saved[4], lse, _named(names, saved[5:]))
        found = recompute_gradients(grad_out, grad_lse, saved[0], saved[1], saved[2], call, backend, graph=True)
    else:
        found = _attend_backward(grad_out, grad_lse, *saved[:5], list(saved[5:]), *ctx.rest)
    return *found[:3], None, None if saved[4] is None else found[3], found[4:], *(None for _ in ctx.rest)


_attend.register_autograd(_backward, setup_context=_setup_context)
