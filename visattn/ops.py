"""`attention()` as one operator of torch, so that torch.compile sees a single opaque node."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any, NamedTuple

import torch

from visattn.checks import check_call, check_precision, check_steps
from visattn.dispatch import choose
from visattn.keep import stands_in, untraced
from visattn.layout import Layout
from visattn.operands import wants_gradient, wide_dtype
from visattn.operator import above, below, define
from visattn.patterns import Pattern, parse
from visattn.patterns.traced import constant
from visattn.prepare import find, gradients_like, run_like
from visattn.problem import Call, Problem
from visattn.registry import REGISTRY
from visattn.rerun import recompute_gradients

# Between the parts of a text that an operator gets; no pattern, backend or name has it.
SEPARATOR = "|"


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
    precision: str | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The traceable form of `attention`; the log-sum-exp is empty unless `lse`."""
    where = [number for side in _sides(layout) for number in side]
    # In the order of their names: a compiled graph does not depend on who filled the mapping in which order.
    names = sorted(parameters)
    about = SEPARATOR.join([constant(_text, pattern), backend, ",".join(names), precision or ""])
    return ATTEND(q, k, v, key_mask, rpb, [parameters[n] for n in names], about, where, scale, lse)


def _text(pattern: Pattern) -> str:
    """The text by which the operator finds the pattern again."""
    text = str(pattern)
    if type(parse(text)) is not type(pattern):
        raise ValueError(f"{text!r} is another pattern than this {type(pattern).__qualname__}: register_pattern it")
    return text


class About(NamedTuple):
    """What the constants of an operator stand for.

    Attributes:
        pattern: The pattern.
        layout: Where the tokens sit.
        backend: What the user asked for.
        names: Names of the parameters.
        precision: What products are computed in, None for the dtype of q.
    """

    pattern: Pattern
    layout: Layout
    backend: str
    names: tuple[str, ...]
    precision: str | None

    def call(
        self,
        scale: float,
        lse: bool,
        key_mask: torch.Tensor | None,
        rpb: torch.Tensor | None,
        parameters: Sequence[torch.Tensor],
    ) -> Call:
        """A call with these constants."""
        named = dict(zip(self.names, parameters, strict=True))
        return Call(self.pattern, self.layout, scale, key_mask, rpb, lse, named, self.precision)


def _sides(layout: Layout) -> Iterator[tuple[int, ...]]:
    """A layout as numbers: prefix, suffix and grid of the queries, then of the keys if they have one of their own."""
    for side in (layout, layout.key_layout):
        if side is not None:
            yield side.prefix, side.suffix, *side.grid


def _layout(where: Sequence[int]) -> Layout:
    """The layout that an operator's numbers stand for, see `_sides`."""
    # Both sides have equally many axes, at most three, and two numbers besides.
    half = len(where) if len(where) <= 5 else len(where) // 2
    sides = [Layout(own[2:], own[0], own[1]) for own in (where[:half], where[half:]) if own]
    return sides[0].with_keys(sides[1] if len(sides) > 1 else None)


def _about(about: str, where: Sequence[int]) -> About:
    """From text and numbers: operators take no objects, and each argument of theirs costs time."""
    # Where the numbers are symbols they become constants of the traced code here.
    return _known(about, tuple(map(int, where)), REGISTRY.version)


# The version is part of the key: what the name of a pattern stands for may change.
@lru_cache(maxsize=1024)
def _known(about: str, where: tuple[int, ...], version: int) -> About:
    pattern, backend, names, precision = about.split(SEPARATOR)
    return About(parse(pattern), _layout(where), backend, tuple(names.split(",")) if names else (), precision or None)


def _attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    key_mask: torch.Tensor | None,
    rpb: torch.Tensor | None,
    parameters: list[torch.Tensor],
    about: str,
    where: list[int],
    scale: float,
    lse: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    known = _about(about, where)
    out, sums = run_like(q, k, v, known.call(scale, lse, key_mask, rpb, parameters), known.backend)
    if any(out.untyped_storage().data_ptr() == t.untyped_storage().data_ptr() for t in (q, k, v) if t.numel()):
        raise ValueError(f"backend {known.backend!r} gave back its input for {known.pattern}: give back a new tensor")
    return detached(out, sums, lse)


def detached(out: torch.Tensor, lse: torch.Tensor | None, wanted: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """What an operator may return: tensors that alias no input, with the strides of `empty_results`."""
    if wanted and lse is not None:
        # Engines have the log-sum-exp by head.
        return out.contiguous(), lse.transpose(1, 2).contiguous().transpose(1, 2)
    # `wide_dtype`, without a call of Python's: this runs at every call of compiled code.
    return out.contiguous(), out.new_empty(0, dtype=torch.promote_types(out.dtype, torch.float32))


def empty_results(q: torch.Tensor, lse: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Shapes of an operator's results, for tracing."""
    wide = wide_dtype(q)
    batch, length, heads = q.shape[:3]
    sums = q.new_empty((batch, heads, length), dtype=wide).transpose(1, 2) if lse else q.new_empty(0, dtype=wide)
    return q.new_empty(q.shape), sums


def _fake_attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    key_mask: torch.Tensor | None,
    rpb: torch.Tensor | None,
    parameters: list[torch.Tensor],
    about: str,
    where: list[int],
    scale: float,
    lse: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    known = _about(about, where)
    if torch.onnx.is_in_onnx_export():
        raise ValueError(
            f"ONNX has no operator visattn::attend, and {known.pattern} could not be written down without it"
        )
    named = dict(zip(known.names, parameters, strict=True))
    check_call(q, k, v, known.pattern, known.layout, key_mask, rpb, named)
    check_steps(known.pattern)
    return empty_results(q, lse)


def _attend_backward(
    grad_out: torch.Tensor | None,
    grad_lse: torch.Tensor | None,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    key_mask: torch.Tensor | None,
    rpb: torch.Tensor | None,
    parameters: list[torch.Tensor],
    kept: list[torch.Tensor],
    about: str,
    where: list[int],
    scale: float,
    lse: bool,
) -> list[torch.Tensor]:
    """Gradients of q, k, v, the bias (empty if there is none) and the parameters; `kept` are the forward's results."""
    known = _about(about, where)
    call = known.call(scale, lse, key_mask, rpb, parameters)
    if kept:
        found = gradients_like(
            q, k, v, replace(call, lse=True), known.backend, (kept[0], kept[1]), (grad_out, grad_lse)
        )
        if found is not None:
            return [*found, q.new_empty(0)]
    return recompute_gradients(grad_out, grad_lse, q, k, v, call, known.backend)


def _fake_backward(
    grad_out: torch.Tensor | None,
    grad_lse: torch.Tensor | None,
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


ATTEND = define("attend", _attend, _fake_attend)
ATTEND_BACKWARD = define("attend_backward", _attend_backward, _fake_backward)


class Rest(NamedTuple):
    """The arguments of an operator that are no tensors.

    Attributes:
        about: See `_attend`; likewise the others.
        where: Prefix, suffix and grid of the queries, then of keys with a grid of their own.
        scale: Factor on the logits.
        lse: Whether the log-sum-exp is wanted.
    """

    about: str
    where: list[int]
    scale: float
    lse: bool


class _Attend(torch.autograd.Function):
    """The operator with its gradient: of tensors q, k, v, key mask, bias and parameters."""

    @staticmethod
    def forward(rest: Rest, keeps: bool, *tensors: Any) -> Any:
        return below(ATTEND, *tensors[:5], list(tensors[5:]), *rest._replace(lse=rest.lse or keeps))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, torch.Tensor]) -> None:
        rest, keeps, *tensors = inputs
        ctx.rest, ctx.given = rest, len(tensors)
        ctx.set_materialize_grads(False)
        if not rest.lse:
            ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(*tensors, *(output if keeps else ()))

    @staticmethod
    def backward(ctx: Any, grad_out: torch.Tensor | None, grad_lse: torch.Tensor | None) -> tuple[Any, ...]:
        saved, rest = ctx.saved_tensors, ctx.rest
        tensors, kept = saved[: ctx.given], saved[ctx.given :]
        q, k, v, key_mask, rpb, *parameters = tensors
        grad_lse = grad_lse if rest.lse else None
        if torch.is_grad_enabled():
            # A graph of the gradients is asked for, and what an operator returns has none.
            known = _about(rest.about, rest.where)
            call = known.call(rest.scale, rest.lse, key_mask, rpb, parameters)
            found = recompute_gradients(grad_out, grad_lse, q, k, v, call, known.backend, graph=True)
        else:
            given = grad_out, grad_lse, q, k, v, key_mask, rpb, parameters, list(kept)
            found = ATTEND_BACKWARD(*given, *rest)
        return None, None, *found[:3], None, None if rpb is None else found[3], *found[4:]


def _above_attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    key_mask: torch.Tensor | None,
    rpb: torch.Tensor | None,
    parameters: list[torch.Tensor],
    about: str,
    where: list[int],
    scale: float,
    lse: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    known = _about(about, where)
    learns = wants_gradient(q, k, v, rpb, *parameters)
    if not learns:
        if not parameters:
            # What ran a call like this one runs it here, without a second way through the dispatcher.
            key_of = q, k, v, known.pattern, known.layout, scale, key_mask, rpb, known.backend, lse, known.precision
            prepared = find(*key_of)[1]
            if prepared is not None:
                return detached(*prepared(q, k, v, key_mask, rpb), lse)
        return below(ATTEND, q, k, v, key_mask, rpb, parameters, about, where, scale, lse)
    check_precision(known.precision, (q, k, v, *parameters))
    keeps = not parameters and rpb is None and _keeps(q, k, v, known.call(scale, lse, key_mask, rpb, ()), known.backend)
    out, sums = _Attend.apply(Rest(about, where, scale, lse), keeps, q, k, v, key_mask, rpb, *parameters)
    return out, sums if lse or not keeps else sums.new_empty(0)


def _keeps(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, call: Call, backend: str) -> bool:
    """Whether the backward of a call starts from its results; not where sizes are symbols, of which no choice knows."""
    if not all(type(n) is int for t in (q, k, v) for n in t.shape):
        return False
    problem = Problem.of(q, k, v, call)
    return choose(problem, backend).keeps_results(replace(problem, lse=True))


above(ATTEND, _above_attend)
