"""The oracle: attention with the pattern's dense mask, in float64 if the inputs are."""

from __future__ import annotations

from typing import ClassVar

import torch

from visattn.dispatch import Backend
from visattn.kernels.masks import position_bias, rest_of, visible
from visattn.operands import repeated, wide_dtype
from visattn.patterns import ListedPattern, OrderedPattern
from visattn.problem import Call, Problem, Support

# A float32 score matrix of this many entries is 1 GiB.
LARGEST = 2**28


class Reference(Backend):
    """Scores, mask, softmax, values: every step as in the definition, O(S^2) memory."""

    name: ClassVar[str] = "reference"
    portable: ClassVar[bool] = True
    key_layouts: ClassVar[bool] = True

    def available(self) -> Support:
        """Always."""
        return Support(True)

    def supports(self, problem: Problem) -> Support:
        """Anything that is a mask and whose score matrix fits in memory."""
        if not isinstance(problem.pattern, ListedPattern | OrderedPattern):
            return Support(False, f"{problem.pattern.name} is not attention under one mask")
        if problem.dense_pairs > LARGEST:
            return Support(False, f"its score matrix of {problem.dense_pairs:.3g} entries is over {LARGEST}")
        return Support(True)

    def cost(self, problem: Problem) -> float:
        """Always the last choice."""
        return 1000 * problem.dense_pairs

    def run(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, call: Call
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """See `Backend.run`; softmax in float32 at least."""
        wide = wide_dtype(q)
        rest = rest_of(call, q, k, v)
        k, v = (k, v) if rest is None else (rest.k, rest.v)
        keys, values = (repeated(t.to(wide), q.shape[2]) for t in (k, v))
        scores = torch.einsum("bqhd,bkhd->bhqk", q.to(wide), keys) * call.scale
        if call.rpb is not None:
            scores = scores + position_bias(call).to(wide)
        seen = visible(call, q, k) if rest is None else rest.seen
        scores = scores if rest is None else scores + rest.bias
        # A row without visible keys: finite logits keep its gradient finite, and its weights become zero.
        empty = ~seen.any(-1, keepdim=True)
        scores = scores.masked_fill(~seen, float("-inf")).masked_fill(empty, 0.0)
        weights = scores.softmax(-1).masked_fill(empty, 0.0)
        lse = scores.logsumexp(-1).masked_fill(empty[..., 0], float("-inf"))
        if rest is not None and rest.copied is not None:
            weights = weights.gather(2, rest.copied[..., None].expand_as(weights))
            lse = lse.gather(2, rest.copied)
        out = torch.einsum("bhqk,bkhd->bqhd", weights, values)
        return out.to(q.dtype), lse.transpose(1, 2)


backend = Reference()
