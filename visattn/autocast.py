"""What autocast means for attention: SDPA's rule at the border, and no casts inside an engine."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch


def is_on(device: torch.device) -> bool:
    """Whether autocast is on for a device."""
    # The question below costs more than this whole function, and is asked at every call.
    known = device.type in ("cpu", "cuda") or torch.amp.is_autocast_available(device.type)
    return known and torch.is_autocast_enabled(device.type)


def as_sdpa_casts(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Queries, keys and values as scaled_dot_product_attention would see them: under autocast in its dtype.

    float64 stays what it is, as it does for torch's own operators.
    """
    device = tensors[0].device
    if not is_on(device):
        return tensors
    wanted = torch.get_autocast_dtype(device.type)
    return tuple(t.to(wanted) if t.is_floating_point() and t.dtype != torch.float64 else t for t in tensors)


def switched_off(device: torch.device) -> AbstractContextManager[Any]:
    """Autocast off: engines choose the dtypes of their sums and products themselves."""
    return torch.autocast(device.type, enabled=False) if is_on(device) else nullcontext()
