"""What the kernels of second branches get of a call."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from visattn.kernels.triton.choosing.choose import mask_bytes
from visattn.layout import Layout
from visattn.operands import in_rows
from visattn.patterns.choice.blocks import inner


def grids(tensors: Iterable[torch.Tensor], layout: Layout) -> list[torch.Tensor]:
    """Grid tokens [B, tokens, heads, D] of tensors [B, S, heads, D], channels contiguous."""
    at = inner(layout)
    rows = (x if x.shape[1] == layout.tokens else x[:, at] for x in tensors)
    return [in_rows(x) for x in rows]


def grid_mask(key_mask: torch.Tensor | None, layout: Layout) -> list[torch.Tensor]:
    """Which grid tokens take part, uint8 [B, tokens], contiguous; nothing where all do."""
    return [] if key_mask is None else [mask_bytes(key_mask[:, inner(layout)])]


def narrow(dtype: torch.dtype) -> torch.dtype:
    """Of states of groups, for values of a dtype: float16 has not the range of sums."""
    return torch.bfloat16 if dtype == torch.bfloat16 else torch.float32
