"""Runs patterns that differ from head to head: the heads of each pattern as a call of their own."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import ClassVar

import torch

from visattn.dispatch import Backend, cheapest, overhead
from visattn.kernels.heard import hearing
from visattn.kernels.rows import attention_rows
from visattn.operands import repeated, widened
from visattn.patterns import Best, HeadsPattern, ListedPattern, PerHead, Routes
from visattn.patterns.choice.blocks import inner
from visattn.patterns.choice.listening import choosing, hears, tell_shares
from visattn.patterns.choice.memory import Means, beside, kept_for
from visattn.patterns.choice.scores import block_means
from visattn.patterns.choice.stratified import sampled_rows
from visattn.prepare import run_call
from visattn.problem import Call, OtherKind, Problem, Support

# Tokens that are pooled to see whether queries and keys have drifted.
RUN = 64
# What a pair of a row costs that is measured, masks of all patterns included, in pairs of dense attention.
ROW = {"cpu": 6.0}


class Heads(Backend):
    """Runs `perhead` and `best`, by the backends that run their parts."""

    name: ClassVar[str] = "heads"

    def available(self) -> Support:
        """Always: other backends do the work."""
        return Support(True)

    def supports(self, problem: Problem) -> Support:
        """Patterns of heads; each part must have a backend."""
        if not isinstance(problem.pattern, HeadsPattern):
            return OtherKind(False, f"it runs patterns that differ from head to head, not {problem.pattern.name}")
        return Support(True)

    def cost(self, problem: Problem) -> float:
        """That of the parts, as if heads were shared evenly among them; measuring costs some rows of dense ones."""
        pattern = problem.pattern
        assert isinstance(pattern, HeadsPattern)
        if isinstance(pattern, PerHead):
            parts: Sequence[ListedPattern] = pattern.of_heads(problem.heads)
        else:
            parts = pattern.patterns
        found = 0.0
        for each in dict.fromkeys(parts):
            own = replace(problem, pattern=each)
            found += cheapest(own, _others()).cost(own) * parts.count(each) / len(parts)
        rows = pattern.rows * len(pattern.patterns) if isinstance(pattern, Best) else 0
        rows *= ROW.get(problem.device, 1.0)
        return found + problem.dense_pairs * rows / problem.layout.length + overhead(problem, 0.5, 200)

    def run(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, call: Call
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """See `Backend.run`."""
        pattern, (batch, _, heads, _) = call.pattern, q.shape
        if isinstance(pattern, PerHead):
            chosen = [pattern.patterns.index(each) for each in pattern.of_heads(heads)]
            return _by_pattern(q, k, v, call, [chosen] * batch)
        assert isinstance(pattern, Best)
        # The host waits: which heads go together is not known before.
        return _by_pattern(q, k, v, call, best_patterns(q, k, v, call).tolist())


def _others() -> Iterator[Backend]:
    from visattn.dispatch import BACKENDS

    return (backend for backend in BACKENDS.usable().values() if backend.name != Heads.name)


def best_patterns(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, call: Call) -> torch.Tensor:
    """Index of the pattern that each head of each sample has by measurement: int64 [B, H]."""
    pattern, at = call.pattern, inner(call.layout)
    assert isinstance(pattern, Best)

    def choose() -> Routes:
        return Routes(row_errors(q, k, v, call).argmin(0)[..., None, None])

    with torch.no_grad(), choosing():
        if pattern.every == 1:
            return choose().tiles[..., 0, 0]
        valid = None if call.key_mask is None else call.key_mask[:, at]
        grid = (call.layout.tokens,)
        own = pattern, call.layout, q.shape, k.shape, q.device, call.scale, valid is None
        found = kept_for(
            pattern.every,
            pattern.drift,
            own,
            len(pattern.of),
            q.dtype,
            lambda: Means(*(block_means(x[:, at], grid, (RUN,), valid) for x in (q, k))),
            choose,
        )
        return found.tiles[..., 0, 0]


def row_errors(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, call: Call) -> torch.Tensor:
    """Mean square error of each pattern's output on some valid queries, against dense attention: [patterns, B, H]."""
    pattern, layout = call.pattern, call.layout
    assert isinstance(pattern, Best)
    rows = sampled_rows(layout, pattern.rows, q.device)
    values = repeated(widened(v), q.shape[2])
    part = None if call.key_mask is None else call.key_mask[:, rows]

    def output(each: ListedPattern | str) -> torch.Tensor:
        # What one of the patterns keeps from step to step is not what its heads keep in the end.
        with beside(("rows", str(each))):
            weights = attention_rows(q, k, each, layout, rows, scale=call.scale, key_mask=call.key_mask)
        return torch.einsum("bhrs,bshd->bhrd", weights, values)

    dense, found = output("dense"), []
    for each in pattern.patterns:
        off = (output(each) - dense).square().mean(-1)
        if part is not None:
            off = off.masked_fill(~part[:, None], 0)
        found.append(off.mean(-1))
    return torch.stack(found)


def _by_pattern(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, call: Call, chosen: Sequence[Sequence[int]]
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Run each pattern on its heads.

    Args:
        q: Queries [B, S, H, D].
        k: Keys [B, S, Hkv, D].
        v: Values, alike.
        call: The call.
        chosen: Index of the pattern of each head of each sample.
    """
    pattern, batch, heads = call.pattern, q.shape[0], q.shape[2]
    assert isinstance(pattern, HeadsPattern)
    alike = all(list(each) == list(chosen[0]) for each in chosen)
    flat = [index for each in (chosen[:1] if alike else chosen) for index in each]
    order, outs, lses, shares = [], [], [], []
    for number, each in enumerate(pattern.patterns):
        which = [i for i, index in enumerate(flat) if index == number]
        if not which:
            continue
        order += which
        own = _heads_of(q, k, v, call.key_mask, which, alike)
        given = replace(call, pattern=each, key_mask=own[3])
        with beside(tuple(which)), hearing(each, call.layout, own[0]) as heard:
            out, lse = run_call(own[0], own[1], own[2], given)
        outs.append(out)
        lses.append(lse)
        shares.append(heard)
    back = torch.tensor(order, device=q.device).argsort()

    def joined(parts: list[torch.Tensor]) -> torch.Tensor:
        if alike:
            return torch.cat(parts, 2)[:, :, back]
        whole = torch.cat(parts)[back].unflatten(0, (batch, heads))
        return whole.transpose(1, 2).flatten(2, 3) if whole.ndim == 4 else whole[:, :, :, 0].transpose(1, 2)

    if hears():
        dim_of = 1 if alike else 0
        told = torch.cat([each() for each in shares], dim_of)
        tell_shares(told[:, back] if alike else told[back].view(batch, heads))
    return joined(outs), joined([t for t in lses if t is not None]) if call.lse else None


def _heads_of(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, key_mask: torch.Tensor | None, which: list[int], alike: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Some heads of all samples, or some of all heads as samples with one head each, and the key mask of each."""
    heads, group = q.shape[2], q.shape[2] // k.shape[2]
    index = torch.tensor(which, device=q.device)
    if alike:
        shared = list(dict.fromkeys(i // group for i in which))
        # Whole groups keep sharing their key head.
        whole = which == [head for i in shared for head in range(i * group, (i + 1) * group)]
        kv = torch.tensor(shared if whole else [i // group for i in which], device=q.device)
        return q[:, :, index], k[:, :, kv], v[:, :, kv], key_mask
    each = [q.transpose(1, 2).flatten(0, 1)[index][:, :, None]]
    kv = index // heads * k.shape[2] + index % heads // group
    each += [t.transpose(1, 2).flatten(0, 1)[kv][:, :, None] for t in (k, v)]
    return each[0], each[1], each[2], None if key_mask is None else key_mask[index // heads]


backend = Heads()
