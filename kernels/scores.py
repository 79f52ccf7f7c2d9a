"""The log-sum-exp of visible logits in plain torch, for kernels that do not give it."""

from __future__ import annotations

import torch
from torch.utils.checkpoint import checkpoint

from visattn.operands import wide_dtype

# Entries of a block of scores that the log-sum-exp is taken over at a time.
SCORES = 2**22


def log_sum_exp(
    q: torch.Tensor, k: torch.Tensor, mask: torch.Tensor | None, scale: float, causal: bool = False
) -> torch.Tensor:
    """Log-sum-exp of the visible logits, a few queries at a time so that no S x S scores exist.

    Args:
        q: Queries [B, H, S, D].
        k: Keys [B, Hkv, N, D].
        mask: Visibility [1 or B, 1, S or 1, N], or None.
        scale: Factor on the logits.
        causal: Whether query i sees keys 0 to i alone, in the place of a mask.

    Returns:
        [B, H, S] in float32, or float64 for float64 inputs.
    """
    batch, heads, length, _ = q.shape
    step = max(1, SCORES // (batch * heads * k.shape[2]))
    parts = []
    for start in range(0, length, step):
        rows = slice(start, start + step)
        part, keys = mask if mask is None or mask.shape[2] == 1 else mask[:, :, rows], k
        if causal:
            keys = k[:, :, : start + step]
            at = torch.arange(start, min(start + step, length), device=q.device)
            part = (torch.arange(keys.shape[2], device=q.device) <= at[:, None])[None, None]
        # Recomputed in the backward, which would else keep every block of scores.
        parts.append(checkpoint(_block_lse, q[:, :, rows], keys, part, scale, use_reentrant=False))
    return torch.cat(parts, dim=2)


def _block_lse(q: torch.Tensor, k: torch.Tensor, mask: torch.Tensor | None, scale: float) -> torch.Tensor:
    wide = wide_dtype(q)
    batch, heads, rows, head_dim = q.shape
    # The heads that share a key head are rows of one product: no copy of the keys per head.
    grouped = q.reshape(batch, k.shape[1], -1, head_dim).to(wide) * scale
    scores = (grouped @ k.to(wide).transpose(-1, -2)).view(batch, heads, rows, -1)
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    return scores.logsumexp(-1)
