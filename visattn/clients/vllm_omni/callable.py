"""One function in the form that is proposed for callables of vLLM-Omni's diffusion attention (SPARSE_ATTN)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from visattn.attend import attention
from visattn.layout import Layout

KNOWN = ("pattern", "grid", "prefix", "backend", "key_mask")


def sparse_attn(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    params: Mapping[str, Any],
    is_causal: bool = False,
    softmax_scale: float | None = None,
) -> torch.Tensor:
    """A pattern by parameters alone.

    Args:
        q: Queries [B, S, H, D].
        k: Keys [B, S, Hkv, D].
        v: Values [B, S, Hkv, D].
        params: `pattern` and `grid` (frames, rows, columns); optionally `prefix`, tokens before the grid (those after
            it are the rest), `key_mask`, valid keys, bool [B, S], and `backend`.
        is_causal: Has to be False.
        softmax_scale: Factor on the logits, None for D ** -0.5.

    Returns:
        Output [B, S, H, D].

    Raises:
        ValueError: If the parameters do not describe the call.
    """
    unknown = sorted(set(params) - set(KNOWN))
    if unknown or not {"pattern", "grid"} <= set(params):
        raise ValueError(f"params {sorted(params)} must have pattern and grid, and may have {', '.join(KNOWN[2:])}")
    if is_causal:
        raise ValueError("is_causal=True: patterns of a grid have no order of time; use causal parameters of na(...)")
    grid, prefix = tuple(params["grid"]), int(params.get("prefix", 0))
    suffix = q.shape[1] - prefix - Layout(grid).tokens
    if suffix < 0:
        raise ValueError(
            f"a sequence of {q.shape[1]} tokens is shorter than prefix {prefix} + grid {grid}: name its grid"
        )
    layout = Layout(grid, prefix, suffix)
    options = {"key_mask": params.get("key_mask"), "backend": params.get("backend", "auto")}
    return attention(q, k, v, params["pattern"], layout, scale=softmax_scale, **options)
