"""torch's scaled_dot_product_attention: plain where the pattern covers the grid, else with a dense mask."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch.nn.functional import scaled_dot_product_attention

from visattn.backends import Backend, Call, Problem, Support
from visattn.kernels.masks import visible

# A bool mask of this many entries is 256 MiB.
LARGEST_MASK = 2**28


class Sdpa(Backend):
    """Dense attention in torch's own kernels."""

    name: ClassVar[str] = "sdpa"

    def available(self) -> Support:
        """Always: it comes with torch."""
        return Support(True)

    def supports(self, problem: Problem) -> Support:
        """Anything without relative position bias or log-sum-exp whose mask fits in memory."""
        if problem.pattern.composed:
            return Support(False, f"{problem.pattern.name} is not attention under one mask")
        if problem.rpb:
            return Support(False, "it adds no relative position bias")
        if problem.lse:
            return Support(False, "it does not return the log-sum-exp")
        if not problem.pattern.covers(problem.layout.grid):
            per_sample = problem.key_mask or problem.pattern.routed
            entries = problem.layout.length**2 * (problem.batch if per_sample else 1)
            if entries > LARGEST_MASK:
                return Support(False, f"its dense mask of {entries:.3g} entries is over {LARGEST_MASK}")
        return Support(True)

    def cost(self, problem: Problem) -> float:
        """All pairs; a mask of its own costs about as much again."""
        masked = problem.key_mask or not problem.pattern.covers(problem.layout.grid)
        return problem.dense_pairs * (1.5 if masked else 1.0)

    def run(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, call: Call
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """See `Backend.run`."""
        mask = None if call.key_mask is None else call.key_mask[:, None, None, :]
        if not call.pattern.covers(call.layout.grid):
            mask = visible(call, q, k)
        heads_first = (t.transpose(1, 2) for t in (q, k, v))
        grouped = q.shape[2] != k.shape[2]
        out = scaled_dot_product_attention(*heads_first, attn_mask=mask, scale=call.scale, enable_gqa=grouped)
        return out.transpose(1, 2), None


backend = Sdpa()
