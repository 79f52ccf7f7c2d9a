"""Sigmoid attention over a tile plan, a few query tiles at a time."""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar

import torch

from visattn.dispatch import Backend, overhead
from visattn.kernels.linear.features import widened
from visattn.kernels.plan_chunks import Chunk, plan_tables, run_chunks, tiled
from visattn.patterns import Sigmoid
from visattn.patterns.kinds import with_pooled_keys
from visattn.plans import plan
from visattn.problem import Call, Problem, Support

# Time of a visited pair over one of dense SDPA: products in float32, gathered keys, no fused kernel.
RATE = 3.0


class SigmoidBackend(Backend):
    """Runs sigmoid patterns, and nothing else; all others leave them to it."""

    name: ClassVar[str] = "sigmoid"
    portable: ClassVar[bool] = True

    def available(self) -> Support:
        """Always: it is made of torch operators."""
        return Support(True)

    def supports(self, problem: Problem) -> Support:
        """Sigmoid patterns without log-sum-exp."""
        if not isinstance(problem.pattern, Sigmoid):
            return Support(False, f"it runs sigmoid patterns only, not {problem.pattern.name}")
        if problem.lse:
            return Support(False, "weights without a normaliser have no log-sum-exp")
        return Support(True)

    def cost(self, problem: Problem) -> float:
        """The pairs of the visited tiles."""
        assert isinstance(problem.pattern, Sigmoid)
        made = plan(problem.pattern.sparse, problem.layout)
        return RATE * problem.dense_pairs / made.tile_bound + overhead(problem, cpu_ms=1.0, cuda_us=500)

    def run(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, call: Call
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """See `Backend.run`."""
        assert isinstance(call.pattern, Sigmoid)
        weight = call.parameters.get("pool_weight")
        k, v, key_mask = with_pooled_keys(call.pattern.sparse, k, v, call.key_mask, call.layout, weight)
        return sigmoid_attention(q, k, v, replace(call, key_mask=key_mask)), None


def sigmoid_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, call: Call) -> torch.Tensor:
    """The maths of `visattn.patterns.Sigmoid`; k, v and the key mask with pooled keys, [B, S, H, D] in q's dtype."""
    pattern = call.pattern
    assert isinstance(pattern, Sigmoid)
    made = plan(pattern.sparse, call.layout)
    tables = plan_tables(made, q.device)
    wide = [widened(t) for t in (q, k, v)]
    heads, kv_heads = q.shape[2], k.shape[2]
    offset = call.parameters.get("bias")
    offset = q.new_zeros(heads, dtype=wide[0].dtype) if offset is None else offset.to(wide[0].dtype)

    def compute(chunk: Chunk) -> torch.Tensor:
        seen = chunk.shown(chunk.seen, call.key_mask)
        queries = tiled(wide[0], chunk.queries).unflatten(1, (kv_heads, -1))
        keys, values = (tiled(t, chunk.keys)[:, :, None] for t in wide[1:])
        level = pattern.bias
        if level is None:
            level = -seen.sum(-1, keepdim=True).clamp(min=1).to(queries.dtype).log()[:, None, None]
        logits = queries @ keys.transpose(-1, -2) * call.scale + offset.view(kv_heads, -1, 1, 1, 1) + level
        weights = logits.sigmoid().masked_fill(~seen[:, None, None], 0)
        # [B, Hkv, H / Hkv, c, T, D]
        return (weights @ values).flatten(1, 2).permute(0, 2, 3, 1, 4)

    grad = torch.is_grad_enabled() and any(t.requires_grad for t in (q, k, v, offset))
    return run_chunks(made, tables, q.shape[0] * heads, compute, grad).to(q.dtype)


backend = SigmoidBackend()
