"""Choosing by kernels, where there are any for the device."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import torch

from visattn.patterns.choice.blocks import Blocks
from visattn.patterns.routes import Routes

if TYPE_CHECKING:
    from visattn.patterns.dynamic import DynamicPattern


def by_kernels(
    pattern: DynamicPattern,
    q: torch.Tensor,
    k: torch.Tensor,
    blocks: Blocks,
    valid: torch.Tensor | None,
    scale: float,
) -> Routes | None:
    """What `Backend.choose` of the GPU backend finds; None where torch's operators must choose."""
    interpreted = os.environ.get("TRITON_INTERPRET", "0") not in ("", "0")
    if not q.is_cuda and not interpreted:
        return None
    # Only here: both import the patterns.
    from visattn.dispatch import load
    from visattn.ops import without_values, written_down

    if without_values(q) or written_down():
        return None
    return load("triton").choose(pattern, q, k, blocks, valid, scale)
