"""The oracle: attention with the pattern's dense mask, in float64 if the inputs are."""

from __future__ import annotations

from typing import ClassVar

import torch

from visattn.backends import Backend, Call, Problem, Support
from visattn.patterns import dense_mask

# A float32 score matrix of this many entries is 1 GiB.
LARGEST = 2**28


class Reference(Backend):
    """Scores, mask, softmax, values: every step as in the definition, O(S^2) memory."""

    name: ClassVar[str] = "reference"

    def available(self) -> Support:
        """Always."""
        return Support(True)

    def supports(self, problem: Problem) -> Support:
        """Anything whose score matrix fits in memory."""
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
        wide = torch.promote_types(q.dtype, torch.float32)
        group = q.shape[2] // k.shape[2]
        keys, values = (t.to(wide).repeat_interleave(group, dim=2) for t in (k, v))
        scores = torch.einsum("bqhd,bkhd->bhqk", q.to(wide), keys) * call.scale
        scores = scores.masked_fill(~visible(call, q.device), float("-inf"))
        lse = scores.logsumexp(-1)
        # A row without visible keys has lse -inf: 0 instead keeps exp(-inf - 0) = 0 and its gradient finite.
        weights = torch.exp(scores - lse.masked_fill(lse == float("-inf"), 0)[..., None])
        out = torch.einsum("bhqk,bkhd->bqhd", weights, values)
        return out.to(q.dtype), lse.transpose(1, 2)


def visible(call: Call, device: torch.device) -> torch.Tensor:
    """Which keys each query sees, the key mask included: bool [1 or B, 1, S, S]."""
    mask = dense_mask(call.pattern, call.layout).to(device)[None, None]
    return mask if call.key_mask is None else mask & call.key_mask[:, None, None, :]


backend = Reference()
