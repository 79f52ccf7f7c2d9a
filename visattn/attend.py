"""`attention()`: check the call, choose a backend, run it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal, overload

import torch

from visattn import ops, prepare, transforms
from visattn.autocast import as_sdpa_casts
from visattn.checks import (
    check_asked,
    check_biased,
    check_call,
    check_fit,
    check_precision,
    check_steps,
    check_tensors,
    check_values,
    factor,
    merged,
    other_values,
)
from visattn.crossing import crossing, dense_cost
from visattn.dispatch import BACKENDS, Candidate, available, candidates, choose
from visattn.given import switch
from visattn.layout import Layout, check_layout
from visattn.patterns import ListedPattern, Pattern, SharingPattern, parse
from visattn.plans import plan
from visattn.problem import Call, Problem, Support


@overload
def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    pattern: Pattern | str,
    layout: Layout,
    *,
    key_layout: Layout | None = None,
    scale: float | None = None,
    key_mask: torch.Tensor | None = None,
    rpb: torch.Tensor | None = None,
    pool_weight: torch.Tensor | None = None,
    parameters: Mapping[str, torch.Tensor] | None = None,
    backend: str = "auto",
    precision: str | None = None,
    return_lse: Literal[False] = False,
) -> torch.Tensor: ...


@overload
def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    pattern: Pattern | str,
    layout: Layout,
    *,
    key_layout: Layout | None = None,
    scale: float | None = None,
    key_mask: torch.Tensor | None = None,
    rpb: torch.Tensor | None = None,
    pool_weight: torch.Tensor | None = None,
    parameters: Mapping[str, torch.Tensor] | None = None,
    backend: str = "auto",
    precision: str | None = None,
    return_lse: Literal[True],
) -> tuple[torch.Tensor, torch.Tensor]: ...


def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    pattern: Pattern | str,
    layout: Layout,
    *,
    key_layout: Layout | None = None,
    scale: float | None = None,
    key_mask: torch.Tensor | None = None,
    rpb: torch.Tensor | None = None,
    pool_weight: torch.Tensor | None = None,
    parameters: Mapping[str, torch.Tensor] | None = None,
    backend: str = "auto",
    precision: str | None = None,
    return_lse: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Attention in which each query sees the keys that the pattern shows it.

    The numbers are those of `torch.nn.functional.scaled_dot_product_attention` with the mask
    `dense_mask(pattern, layout)`, without ever building that mask on large grids. Composed patterns (agent, linear,
    flow, mala, wersa, sparselinear, sigmoid, clipped, gated, selective) change the softmax; each says how.

    Args:
        q: Queries [B, S, H, D] with S = layout.length.
        k: Keys [B, N, Hkv, D], H a multiple of Hkv; N = S unless keys have a layout of their own.
        v: Values [B, N, Hkv, Dv]. Where Dv is not D, the narrower of keys and values get channels of zeros: exact, in
            the time of a call with the wider of both.
        pattern: A pattern or its text, like "na(window=7x7)".
        layout: Where the tokens sit: prefix, grid, suffix.
        key_layout: Where keys and values sit if they are other tokens than the queries (pooled or strided keys, another
            image), N = key_layout.length; also an attribute of a layout. Both grids span the same extent, a window
            is so many keys around the query's centre, and dense tokens of either side see and are seen by all.
        scale: Factor on the logits, D**-0.5 if None. It gets no gradient: a learned one belongs into q.
        key_mask: bool [B, N], True where a key may be attended (padded prompts); None means all. What it hides takes
            no part in the choices of routed patterns and in the means of agents, linear forms and pooled keys either.
        rpb: Relative position bias of a neighborhood pattern: [H, 2 * window - 1 per axis], indexed by key
            position minus query position plus window - 1, in steps of the dilation.
        pool_weight: Weights of the tokens in a pooled key or value of a clear pattern with pool: [pool per axis],
            the same for keys, values and heads; None means their mean. Short for an entry of `parameters`.
        parameters: Learnable parameters of the pattern by name, in the shapes of `pattern.parameter_shapes`; missing
            ones have their initial values. They may have another floating-point dtype than q.
        backend: "auto" for the cheapest that supports the call, or a name of `backends()`.
        precision: None to compute in the dtype of q; "int8" for products of int8, "fp8" for int8 with queries and keys
            and e4m3 with values. Both are for inference, and for patterns that list key tiles; docs/precision.md says
            how they round. On a CPU they are simulated: their errors, not their speed.
        return_lse: Whether to return the natural log-sum-exp of each query's logits too.

    Inside torch.compile the call is one operator without graph breaks; pattern, layout and scale are constants of
    the compiled code, so each of their values is traced once (a change of k, v, key_mask, rpb or a parameter never is).
    Under torch.func, vmap runs its samples as one batch and grad, vjp and jacrev give first derivatives; forward-mode
    and second derivatives there raise a ValueError.

    Gradients can be differentiated again (`create_graph=True`) whatever the backend; torch refuses that for the
    backward of code that its compiler made.

    Returns:
        Output [B, S, H, Dv] in q's dtype, or under autocast in its dtype, to which q, k and v are cast as for torch's
        own scaled_dot_product_attention; with `return_lse` also the log-sum-exp [B, S, H] (float32, or float64 for
        float64 inputs). A query without any visible key gives zeros and -inf.

    Raises:
        ValueError: If the tensors, the layout and the pattern do not fit together, or the named backend cannot
            run the call.
        TypeError: If scale is a tensor that requires a gradient.
    """
    key = None
    if key_layout is not None:
        layout = _joined(layout, key_layout)
    if pool_weight is None and (parameters is None or (isinstance(parameters, dict) and not parameters)):
        key, prepared = prepare.find(q, k, v, pattern, layout, scale, key_mask, rpb, backend, return_lse, precision)
        if prepared is not None:
            out, lse = prepared(q, k, v, key_mask, rpb)
            return (out, lse) if return_lse else out  # pyright: ignore[reportReturnType]
    switch(return_lse, "return_lse")
    if other_values(q, k, v):
        rest = {"scale": scale, "key_mask": key_mask, "rpb": rpb, "pool_weight": pool_weight, "parameters": parameters}
        return _filled_up(q, k, v, pattern, layout, (backend, precision), return_lse, rest)
    check_tensors(q, k, v, layout)
    given = merged(parameters, pool_weight)
    check_precision(precision, (q, k, v, *given.values()))
    scale = factor(scale, q.shape[3])
    q, k, v = as_sdpa_casts(q, k, v)
    portable = ops.written_down()
    if not portable and ops.without_values(q):
        # Nothing there can be planned for: one operator, which checks the call and says what comes out.
        out, lse = ops.attend(q, k, v, pattern, layout, scale, key_mask, rpb, given, backend, return_lse, precision)
    else:
        pattern, given = parse(pattern), ops.constants(given) if portable else given
        check_fit(q, k, v, pattern, layout, key_mask, rpb, given)
        check_steps(pattern)
        call = Call(pattern, layout, scale, key_mask, rpb, return_lse, given, precision)
        if portable:
            out, lse = prepare.run_call(q, k, v, call, backend, portable)
        elif transforms.active():
            out, lse = transforms.attend(q, k, v, call, backend)
        else:
            out, lse = prepare.run(q, k, v, call, backend, key)
    if not return_lse:
        return out
    assert lse is not None
    return out, lse


def _filled_up(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    pattern: Pattern | str,
    layout: Layout,
    how: tuple[str, str | None],
    return_lse: bool,
    rest: dict[str, Any],
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """`attention` with values of other channels than the keys': the narrower of both get channels of zeros."""
    check_values(pattern, k.shape[3], v.shape[3])
    channels, scale = v.shape[3], factor(rest["scale"], q.shape[3])
    widest = max(k.shape[3], channels)
    filled = (t if t.shape[3] == widest else torch.nn.functional.pad(t, (0, widest - t.shape[3])) for t in (q, k, v))
    given = rest | {"scale": scale, "backend": how[0], "precision": how[1]}
    found: Any = attention(*filled, pattern, layout, **given, return_lse=return_lse)  # pyright: ignore[reportCallIssue]
    return (found[0][..., :channels], found[1]) if return_lse else found[..., :channels]


def _joined(layout: Layout, key_layout: Layout) -> Layout:
    """A layout with the keys in another, the same object for equal ones."""
    check_layout(layout)
    check_layout(key_layout, "key_layout")
    # The tracer looks into no cache.
    return layout.with_keys(key_layout) if torch.compiler.is_compiling() else _with_keys(layout, key_layout)


@lru_cache(maxsize=1024)
def _with_keys(layout: Layout, key_layout: Layout) -> Layout:
    return layout.with_keys(key_layout)


@dataclass(frozen=True)
class Explanation:
    """Who would run a call, and why not the others.

    Attributes:
        problem: The call without its tensors.
        choice: Name of the backend that "auto" takes.
        candidates: Every backend with its Support and cost, in order of preference.
    """

    problem: Problem
    choice: str
    candidates: tuple[Candidate, ...]

    @property
    def reason(self) -> str:
        """Why the choice is the cheapest, in words."""
        problem = self.problem
        cost = {c.backend.name: c.cost for c in self.candidates if c.support.ok}
        if problem.is_dense:
            return "the pattern shows every query all keys, so it is dense attention"
        if isinstance(problem.pattern, SharingPattern):
            part = f"an estimated {cost[self.choice] / dense_cost(problem):.2f} of dense SDPA's time"
            return f"{part} on average: one refresh in {problem.pattern.every} steps of a run"
        if not isinstance(problem.pattern, ListedPattern):
            return f"{problem.pattern.name} is a composition with an engine of its own"
        tiles = plan(problem.pattern, problem.layout)
        part = tiles.entries / (tiles.queries.tiles * tiles.keys.tiles)
        share = f"the plan visits {part:.0%} of all pairs of tiles"
        sparse = {name: time for name, time in cost.items() if name not in ("sdpa", "reference")}
        if self.choice in sparse:
            return f"{share}, an estimated {cost[self.choice] / dense_cost(problem):.2f} of dense SDPA's time"
        if not sparse:
            return f"{share}, but no sparse backend runs this call"
        best = min(sparse, key=sparse.__getitem__)
        times = sparse[best] / cost[self.choice]
        if self.choice == "sdpa" and problem.is_triangular and not problem.key_mask:
            return f"{share}, and torch's causal kernel is an estimated {times:.1f} times as fast as {best}"
        few = f" and {problem.layout.keys.length} tokens are few" if part < 0.5 else ""
        return (
            f"{share}{few}, so {best} would take an estimated {times:.1f} times as long as dense attention with a mask"
        )

    def __str__(self) -> str:
        problem = self.problem
        shape = f"batch {problem.batch}, {problem.heads} heads x {problem.head_dim}, {problem.dtype}, {problem.device}"
        lines = [f"{problem.pattern} on {problem.layout} ({shape}): {self.choice}", f"  {self.reason}"]
        modes = ("eager", "compiled", "captured") if problem.device == "cuda" else ("eager",)
        for mode in () if problem.is_dense else modes:
            found = crossing(dataclasses.replace(problem, mode=mode))
            if found is not None:
                lines.append(
                    f"  {found}" + found.dense_pays_inside * "; apply() leaves the model's own dense attention here"
                )
        dense = dense_cost(problem)
        for backend, support, cost in self.candidates:
            verdict = f"{cost / dense:.2f} of dense SDPA's time (estimate)" if support.ok else support.reason
            if not support.other:
                lines.append(f"  {backend.name:<10} {verdict}")
        others = [backend.name for backend, support, _ in self.candidates if support.other]
        lines += [f"  made for other patterns: {', '.join(others)}"] if others else []
        return "\n".join(lines)


def explain(
    pattern: Pattern | str,
    layout: Layout,
    q: torch.Tensor,
    *,
    key_layout: Layout | None = None,
    kv_heads: int | None = None,
    value_dim: int | None = None,
    key_mask: bool = False,
    rpb: bool = False,
    precision: str | None = None,
    return_lse: bool = False,
) -> Explanation:
    """Say which backend `attention` would choose for queries like `q`, and why.

    Args:
        pattern: A pattern or its text.
        layout: Where the tokens sit.
        q: Queries [B, S, H, D]; only shape, dtype, device and requires_grad are used.
        key_layout: Where keys and values sit if they are other tokens than the queries.
        kv_heads: Heads of k and v, H if None.
        value_dim: Channels of v per head, D if None.
        key_mask: Whether a key mask will be passed.
        rpb: Whether a relative position bias will be passed.
        precision: As in `attention`.
        return_lse: Whether the log-sum-exp will be asked for.

    Returns:
        The choice, its reason and every other backend's; print it.

    Raises:
        ValueError: If layout, pattern and q do not fit together.
    """
    pattern = parse(pattern)
    if key_layout is not None:
        layout = _joined(layout, key_layout)
    check_layout(layout)
    check_asked(kv_heads, value_dim, {"key_mask": key_mask, "rpb": rpb, "return_lse": return_lse})
    check_call(q, q, q, pattern, layout.queries, None, None)
    check_precision(precision, (q,))
    check_values(pattern, q.shape[3], value_dim or q.shape[3])
    if rpb:
        check_biased(pattern, layout)
    k = q if kv_heads is None else q[:, :, :1].expand(-1, -1, kv_heads, -1)
    if layout.key_layout is not None:
        k = k[:, :1].expand(-1, layout.key_layout.length, -1, -1)
    check_call(q, k, k, pattern, layout, None, None)
    problem = Problem.of(q, k, k, Call(pattern, layout, 1.0, lse=return_lse, precision=precision))
    dtype = as_sdpa_casts(q[:0])[0].dtype
    # The narrower of keys and values are filled up.
    widest = max(problem.head_dim, value_dim or 0)
    problem = dataclasses.replace(problem, dtype=dtype, key_mask=key_mask, rpb=rpb, head_dim=widest)
    return Explanation(problem, choose(problem).name, tuple(candidates(problem)))


def backends() -> dict[str, Support]:
    """Every backend, and whether this machine has what it needs.

    Returns:
        Support by name, in order of preference; its `reason` says what is missing.
    """
    return {name: available(backend) for name, backend in BACKENDS.usable().items()}
