"""Lines that are causal as a whole, by torch's kernels with `is_causal`: they compute what lies before the diagonal."""

from __future__ import annotations

import torch

from visattn.kernels.fused import fused
from visattn.kernels.scores import log_sum_exp
from visattn.layout import Layout

# Queries of one program of torch's kernels, which compute what their last query sees for all of them, and their time
# for a pair over that without a diagonal (measured on a CPU: scripts/bench/backends.py).
QUERIES, RATE = 256, 1.1


def triangular_part(layout: Layout) -> float:
    """Time of the causal kernel, and of a call for dense tokens, over that of dense attention."""
    causal = min(1.0, RATE * (1 + QUERIES / layout.length) / 2)
    return causal + (layout.length - layout.tokens) / layout.length


def attend_triangular(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layout: Layout, scale: float, lse: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Attention where `problem.is_triangular`.

    Args:
        q: Queries [B, H, S, D].
        k: Keys [B, Hkv, S, D].
        v: Values, alike.
        layout: The tokens.
        scale: Factor on the logits.
        lse: Whether the log-sum-exp is wanted.

    Returns:
        Output [B, H, S, D] and log-sum-exp [B, H, S], or None.
    """
    dense = layout.prefix + layout.suffix
    if layout.suffix:
        # To the front: every token of the grid sees them.
        q, k, v = (t.roll(layout.suffix, 2) for t in (q, k, v))
    out = fused(q, k, v, is_causal=True, scale=scale)
    sums = log_sum_exp(q, k, None, scale, causal=True) if lse else None
    if dense:
        first = q[:, :, :dense]
        own = fused(first, k, v, scale=scale)
        out = torch.cat([own, out[:, :, dense:]], 2)
        if sums is not None:
            sums = torch.cat([log_sum_exp(first, k, None, scale), sums[:, :, dense:]], 2)
    if layout.suffix:
        out = out.roll(-layout.suffix, 2)
        sums = None if sums is None else sums.roll(-layout.suffix, 2)
    return out, sums
