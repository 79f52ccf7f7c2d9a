"""Clipped softmax over a tile plan."""

from __future__ import annotations

from typing import ClassVar

import torch

from visattn.kernels.weights import WeightsBackend
from visattn.patterns import Clipped
from visattn.problem import Call


class ClippedBackend(WeightsBackend):
    """Runs clipped patterns, and nothing else: a row's normaliser is known before any of its weights is clipped."""

    name: ClassVar[str] = "clipped"
    kind = Clipped
    without_lse = "clipped weights do not sum to 1, so they have no log-sum-exp"

    def weights(self, logits: torch.Tensor, seen: torch.Tensor, call: Call) -> torch.Tensor:
        """The maths of `visattn.patterns.Clipped`."""
        assert isinstance(call.pattern, Clipped)
        empty = ~seen.any(-1, keepdim=True)
        shares = logits.masked_fill(~seen, float("-inf")).masked_fill(empty, 0).softmax(-1)
        return clipped(shares, seen, call.pattern).masked_fill(~seen, 0)


def clipped(shares: torch.Tensor, seen: torch.Tensor, pattern: Clipped) -> torch.Tensor:
    """Shares of the softmax [..., keys], stretched and clipped; seen is bool of what broadcasts to them."""
    gamma = pattern.gamma
    if gamma is None:
        assert pattern.alpha is not None
        gamma = -pattern.alpha / seen.sum(-1, keepdim=True).clamp(min=1).to(shares.dtype)
    return ((pattern.zeta - gamma) * shares + gamma).clamp(0, 1)


backend = ClippedBackend()
