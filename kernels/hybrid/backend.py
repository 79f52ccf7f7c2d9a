"""Runs hybrid patterns: the backends for lists run the softmax branch, and the second branch is joined to it."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from typing import Any, ClassVar

import torch

from visattn.autocast import switched_off
from visattn.dispatch import Backend, choose, overhead
from visattn.kernels.fused import fused
from visattn.kernels.triton.backend import on_gpu, pairs_fit
from visattn.patterns.choice.blocks import inner
from visattn.patterns.choice.listening import choosing
from visattn.patterns.hybrid.base import HybridPattern
from visattn.patterns.hybrid.parts import valid_of
from visattn.patterns.hybrid.sla import SLA
from visattn.patterns.hybrid.sla2 import SLA2
from visattn.patterns.hybrid.vsa import VSA
from visattn.patterns.tailed import holding
from visattn.prepare import run_like
from visattn.problem import PRECISIONS, Call, OtherKind, Problem, Support

# Time over that of dense attention's products, by operation count: sums over tokens are memory-bound.
RATE = 4.0


class HybridBackend(Backend):
    """Runs sla, sla2 and vsa, and nothing else; their softmax branch goes to the cheapest other backend."""

    name: ClassVar[str] = "hybrid"
    # Of the softmax branch, which is asked in turn; the other stays in the dtype of q.
    precisions: ClassVar[tuple[str, ...]] = PRECISIONS

    def available(self) -> Support:
        """Always: other backends do the work."""
        return Support(True)

    def supports(self, problem: Problem) -> Support:
        """Hybrid patterns without log-sum-exp."""
        if not isinstance(problem.pattern, HybridPattern):
            return OtherKind(False, f"it runs sla, sla2 and vsa only, not {problem.pattern.name}")
        if problem.precision and isinstance(problem.pattern, SLA2) and problem.pattern.soft:
            return Support(False, f"soft lists are for training, not for {problem.precision}")
        if problem.lse:
            return Support(False, "a sum of two branches has no log-sum-exp")
        return Support(True)

    def cost(self, problem: Problem) -> float:
        """The softmax branch, and products of every token with a state, or of all pairs of blocks with states."""
        pattern, layout = problem.pattern, problem.layout
        assert isinstance(pattern, HybridPattern)
        if isinstance(pattern, SLA2) and pattern.soft:
            return 2 * RATE * problem.dense_pairs
        own = replace(problem, pattern=pattern.front)
        blocks, linear = pattern.blocks(layout.grid), float(layout.length * problem.head_dim)
        if pattern.needs_choice:
            linear += blocks.rows * blocks.columns * problem.head_dim / 2
        added = RATE * problem.batch * problem.heads * linear
        return choose(own).cost(own) + added + overhead(problem, cpu_ms=0.5, cuda_us=200)

    def run(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, call: Call
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """See `Backend.run`."""
        pattern, layout = call.pattern, call.layout
        assert isinstance(pattern, HybridPattern)
        if isinstance(pattern, SLA2) and pattern.soft:
            with switched_off(q.device):
                return _soft(q, k, v, call, pattern), None
        learns = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v, *call.parameters.values()))
        fused = _kernels(pattern, q) if not learns else None
        choice, routed = None, None
        asks = fused is not None and _lists_itself(pattern, call)
        if pattern.needs_choice or asks:
            with choosing():
                routed = _routed(pattern, q, k, v, call) if asks else None
                if routed is not None:
                    choice = routed.choice
                elif pattern.needs_choice:
                    choice = pattern.choose(q, k, layout, call.key_mask, call.scale, call.parameters)
        with nullcontext() if choice is None else holding(pattern.front, choice):
            out, _ = run_like(q, k, v, replace(call, pattern=pattern.front, parameters={}), "auto")
        if fused is not None and out.stride(3) == 1:
            fused.join(pattern, out, q, k, v, layout, call.key_mask, call.scale, choice, call.parameters, routed)
            return out, None
        at = inner(layout)
        with switched_off(q.device):
            if learns and isinstance(pattern, SLA) and choice is None and _sums(q):
                return _placed(_learning(pattern, out[:, at], q, k, v, call), out, at), None
            whole = pattern.join(out[:, at], q, k, v, layout, call.key_mask, call.scale, choice, call.parameters)
        return _placed(whole.to(out.dtype), out, at), None


def _sums(q: torch.Tensor) -> bool:
    """Whether kernels sum over all keys, forward and backward."""
    return on_gpu(q).ok and q.shape[3] <= 256


def _learning(
    pattern: SLA, soft: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, call: Call
) -> torch.Tensor:
    """`SLA.join` by the kernels of linear attention, in the dtype of q and with their gradients.

    They add nothing to a denominator, which `LEAST` does to keep it above 0: no more than rounding.
    """
    from visattn.kernels.triton.linear.attention import linear_attention

    at, feature = inner(call.layout), pattern.feature
    q, k, v = (x[:, at] for x in (q, k, v))
    if feature == "softmax":
        # Torch sums in float32 whatever it is given.
        q, k, feature = q.softmax(-1), k.softmax(-1), "given"
    found = linear_attention(q, k, v, valid_of(call.key_mask, call.layout), feature)
    own = pattern.own(call.parameters, q, call.layout.grid)
    return soft + found @ own["weight"].T.to(q.dtype) + own["bias"].to(q.dtype)


def _kernels(pattern: HybridPattern, q: torch.Tensor) -> Any:
    """The kernels of the second branch, None where torch's operators run it."""
    if not on_gpu(q).ok or not pairs_fit(q.shape[0], q.shape[2]):
        return None
    # Only here, so that listing backends does not import triton.
    from visattn.kernels.triton.hybrid import run

    return run if run.runs(pattern, q.dtype, q.shape[3]) else None


def _lists_itself(pattern: HybridPattern, call: Call) -> bool:
    """Whether kernels may list with what the second branch needs besides: what stays from step to step is the front's.

    Without parameters there is no second branch but that of `sla2`.
    """
    return isinstance(pattern, SLA2) or (
        bool(call.parameters) and (pattern.needs_choice or isinstance(pattern, VSA)) and not pattern.needs_steps
    )


def _routed(pattern: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, call: Call) -> Any:
    """What the router finds by kernels, None where torch's operators choose."""
    from visattn.kernels.triton.hybrid.router import routed

    return routed(pattern, q, k, v, call.layout, call.key_mask, call.scale, call.parameters)


def _soft(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, call: Call, pattern: SLA2) -> torch.Tensor:
    """Soft lists: dense tokens see everything as they always do."""
    layout, at = call.layout, inner(call.layout)
    found = pattern.joint(q, k, v, layout, call.key_mask, call.scale, call.parameters).to(q.dtype)
    parts = [found]
    for first, stop in ((0, at.start), (at.stop, layout.length)):
        if stop > first:
            parts.append(_dense_rows(q[:, first:stop], k, v, call))
    if len(parts) == 1:
        return found
    before = parts[1:2] if layout.prefix else []
    return torch.cat([*before, found, *parts[1 + len(before) :]], 1)


def _dense_rows(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, call: Call) -> torch.Tensor:
    """Softmax over all tokens."""
    group = q.shape[2] // k.shape[2]
    keys, values = (x.repeat_interleave(group, 2).transpose(1, 2) for x in (k, v))
    mask = None if call.key_mask is None else call.key_mask[:, None, None]
    out = fused(q.transpose(1, 2), keys, values, mask, scale=call.scale)
    return out.transpose(1, 2)


def _placed(grid: torch.Tensor, out: torch.Tensor, at: slice) -> torch.Tensor:
    """The rows of the grid in an output that has dense tokens around them."""
    if grid.shape[1] == out.shape[1]:
        return grid
    return torch.cat([out[:, : at.start], grid, out[:, at.stop :]], 1)


backend = HybridBackend()
