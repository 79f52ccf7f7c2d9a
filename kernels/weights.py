"""Attention whose weights are another function of a row's logits than the softmax, along a tile plan."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import replace
from typing import ClassVar

import torch

from visattn.dispatch import Backend, overhead
from visattn.kernels.plan_chunks import Chunk, plan_tables, run_chunks, tiled
from visattn.operands import wants_gradient, widened
from visattn.patterns.composition import Composition
from visattn.patterns.kinds import with_pooled_keys
from visattn.plans import plan
from visattn.problem import Call, OtherKind, Problem, Support

# Time of a visited pair over one of dense SDPA: products in float32, gathered keys, no fused kernel.
RATE = 3.0


class WeightsBackend(Backend):
    """Runs the compositions of one kind, a few query tiles at a time, and nothing else.

    Attributes:
        kind: Their class.
        without_lse: Why they have no log-sum-exp.
    """

    kind: ClassVar[type[Composition]]
    without_lse: ClassVar[str]
    portable: ClassVar[bool] = True

    @abstractmethod
    def weights(self, logits: torch.Tensor, seen: torch.Tensor, call: Call) -> torch.Tensor:
        """The weights of rows of logits, float32 at least.

        Args:
            logits: Scaled products [B, Hkv, H / Hkv, c, T, keys]; any number where a key is not seen.
            seen: Visible pairs, bool [1 or B, 1, 1, c, T, keys].
            call: The call, whose parameters have a row per head.

        Returns:
            As the logits, 0 where a key is not seen.
        """

    def available(self) -> Support:
        """Always: it is made of torch operators."""
        return Support(True)

    def supports(self, problem: Problem) -> Support:
        """Patterns of its kind without log-sum-exp."""
        if not isinstance(problem.pattern, self.kind):
            return OtherKind(False, f"it runs {self.kind.name} patterns only, not {problem.pattern.name}")
        return Support(False, self.without_lse) if problem.lse else Support(True)

    def cost(self, problem: Problem) -> float:
        """The pairs of the visited tiles."""
        assert isinstance(problem.pattern, Composition)
        made = plan(problem.pattern.sparse, problem.layout)
        return RATE * problem.dense_pairs / made.tile_bound + overhead(problem, cpu_ms=1.0, cuda_us=500)

    def run(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, call: Call
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """See `Backend.run`."""
        assert isinstance(call.pattern, Composition)
        weight = call.parameters.get("pool_weight")
        k, v, key_mask = with_pooled_keys(call.pattern.sparse, k, v, call.key_mask, call.layout, weight)
        return self._attend(q, k, v, replace(call, key_mask=key_mask)), None

    def _attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, call: Call) -> torch.Tensor:
        """k, v and the key mask with pooled keys -> [B, S, H, D] in q's dtype."""
        assert isinstance(call.pattern, Composition)
        made = plan(call.pattern.sparse, call.layout)
        tables = plan_tables(made, q.device)
        wide = [widened(t) for t in (q, k, v)]
        heads, kv_heads = q.shape[2], k.shape[2]

        def compute(chunk: Chunk) -> torch.Tensor:
            seen = chunk.shown(chunk.seen, call.key_mask)[:, None, None]
            queries = tiled(wide[0], chunk.queries).unflatten(1, (kv_heads, -1))
            keys, values = (tiled(t, chunk.keys)[:, :, None] for t in wide[1:])
            weights = self.weights(queries @ keys.transpose(-1, -2) * call.scale, seen, call)
            # [B, Hkv, H / Hkv, c, T, D]
            return (weights @ values).flatten(1, 2).permute(0, 2, 3, 1, 4)

        own = call.parameters.values()
        grad = wants_gradient(q, k, v, *own)
        read = (*wide, call.key_mask, *own) if grad else None
        return run_chunks(made, tables, q.shape[0] * heads, compute, read).to(q.dtype)
