"""Softmax attention over the visible keys and linear attention over the hidden ones, mixed per head."""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar

import torch

from visattn.dispatch import Backend, choose, overhead
from visattn.kernels.linear.hidden import hidden_attention
from visattn.patterns import SparseLinear
from visattn.patterns.linear import feature_channels
from visattn.plans import plan
from visattn.prepare import run_call
from visattn.problem import Call, OtherKind, Problem, Support

# Time over that of dense attention's products, by operation count.
RATE = 4.0


class SparseLinearBackend(Backend):
    """Runs sparselinear patterns, and nothing else; its softmax part goes to the cheapest other backend."""

    name: ClassVar[str] = "sparse_linear"

    def available(self) -> Support:
        """Always: it is made of torch operators."""
        return Support(True)

    def supports(self, problem: Problem) -> Support:
        """Sparselinear patterns without log-sum-exp."""
        if not isinstance(problem.pattern, SparseLinear):
            return OtherKind(False, f"it runs sparselinear patterns only, not {problem.pattern.name}")
        if problem.lse:
            return Support(False, "a mix of two attentions has no log-sum-exp")
        return Support(True)

    def cost(self, problem: Problem) -> float:
        """The sparse part, the states of tiles and their sums, and the pairs of partly visible tiles."""
        pattern = problem.pattern
        assert isinstance(pattern, SparseLinear)
        sparse = replace(problem, pattern=pattern.sparse)
        made = plan(pattern.sparse, problem.layout)
        channels = feature_channels(pattern.feature, problem.head_dim)
        partial = int((made.lists.mask >= 0).sum()) * made.queries.capacity * made.keys.capacity
        sums = made.queries.tiles * made.keys.tiles * channels / 2
        linear = problem.layout.length * channels + partial + sums
        own = RATE * problem.batch * problem.heads * linear + overhead(problem, cpu_ms=1.0, cuda_us=500)
        return choose(sparse).cost(sparse) + own

    def run(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, call: Call
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """See `Backend.run`."""
        pattern = call.pattern
        assert isinstance(pattern, SparseLinear)
        sparse, _ = run_call(q, k, v, replace(call, pattern=pattern.sparse))
        mix = call.parameters.get("mix")
        if mix is None:
            return sparse, None
        linear, there = hidden_attention(q, k, v, call)
        share = mix.to(linear.dtype)[:, None] * there[:, :, None, None].to(linear.dtype)
        return (sparse + share * (linear - sparse)).to(q.dtype), None


backend = SparseLinearBackend()
