"""torch's fused attention for any number of samples."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention

# Kernels for GPUs have samples on an axis of their launch that ends here: more fail in the backward (cuDNN) or at once.
MOST = 65535


def fused(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, attn_mask: torch.Tensor | None = None, **options: Any
) -> torch.Tensor:
    """`scaled_dot_product_attention` with grouped heads, in parts where a GPU's kernels have no room for all samples.

    Args:
        q: Queries [B, H, S, D].
        k: Keys [B or 1, Hkv, keys, D].
        v: Values, alike.
        attn_mask: As there; of every sample or one for all.
        options: Further ones of that function.

    Returns:
        [B, H, S, D of the values].
    """
    # While torch.jit.trace records, sizes are tensors.
    options["enable_gqa"] = bool(q.shape[1] != k.shape[1])
    if not q.is_cuda or bool(q.shape[0] <= MOST):
        return scaled_dot_product_attention(q, k, v, attn_mask=attn_mask, **options)
    samples = q.shape[0]

    def part(x: torch.Tensor | None, first: int) -> torch.Tensor | None:
        return x if x is None or x.dim() < q.dim() or x.shape[0] != samples else x[first : first + MOST]

    parts = []
    for first in range(0, samples, MOST):
        own: Any = [part(x, first) for x in (q, k, v)]
        parts.append(scaled_dot_product_attention(*own, attn_mask=part(attn_mask, first), **options))
    return torch.cat(parts)
