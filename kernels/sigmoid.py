"""Sigmoid attention over a tile plan."""

from __future__ import annotations

from typing import ClassVar

import torch

from visattn.kernels.weights import WeightsBackend
from visattn.patterns import Sigmoid
from visattn.problem import Call


class SigmoidBackend(WeightsBackend):
    """Runs sigmoid patterns, and nothing else; all others leave them to it."""

    name: ClassVar[str] = "sigmoid"
    kind = Sigmoid
    without_lse = "weights without a normaliser have no log-sum-exp"

    def weights(self, logits: torch.Tensor, seen: torch.Tensor, call: Call) -> torch.Tensor:
        """The maths of `visattn.patterns.Sigmoid`."""
        pattern, offset = call.pattern, call.parameters.get("bias")
        assert isinstance(pattern, Sigmoid)
        level = pattern.bias
        if level is None:
            level = -seen.sum(-1, keepdim=True).clamp(min=1).to(logits.dtype).log()
        if offset is not None:
            logits = logits + offset.to(logits.dtype).view(logits.shape[1], -1, 1, 1, 1)
        return (logits + level).sigmoid().masked_fill(~seen, 0)


backend = SigmoidBackend()
