"""Whose kernels choose what dynamic patterns list."""

from __future__ import annotations

import torch

from visattn.dispatch import load
from visattn.ops import without_values, written_down
from visattn.patterns.choice.quick import Chooser


def chooser(x: torch.Tensor) -> Chooser | None:
    """The GPU's backend, for tensors that have values; None where torch's operators choose."""
    if without_values(x) or written_down():
        return None
    backend = load("triton")
    return backend if isinstance(backend, Chooser) else None
