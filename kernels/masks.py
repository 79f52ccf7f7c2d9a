"""Dense masks and biases of a call, for the backends that compute every pair of tokens."""

from __future__ import annotations

import torch

from visattn.dispatch import Call
from visattn.keep import kept
from visattn.layout import Layout
from visattn.patterns import Neighborhood, Pattern, RoutedPattern, dense_mask, routed_mask
from visattn.patterns.values import per_axis


def visible(call: Call, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    """Which keys each query sees, the key mask included.

    Args:
        call: The call.
        q: Queries [B, S, H, D].
        k: Keys [B, S + extra, Hkv, D].

    Returns:
        bool [1 or B, 1 or H, S, S + extra].
    """
    if isinstance(call.pattern, RoutedPattern):
        mask = routed_mask(call.pattern, call.layout, q, k, call.key_mask, call.scale)
        mask = mask if mask.ndim == 4 else mask[:, None]
    else:
        mask = _mask(call.pattern, call.layout, q.device)[None, None]
    return mask if call.key_mask is None else mask & call.key_mask[:, None, None, :]


@kept
def _mask(pattern: Pattern, layout: Layout, device: torch.device) -> torch.Tensor:
    return dense_mask(pattern, layout).to(device)


def position_bias(call: Call) -> torch.Tensor:
    """The relative position bias of every pair of tokens, 0 where one of them is dense: [H, S, S]."""
    assert call.rpb is not None and isinstance(call.pattern, Neighborhood)
    layout, rpb = call.layout, call.rpb
    index = torch.zeros(1, 1, dtype=torch.int64)
    dilations = per_axis(call.pattern.dilation, layout.dims, "dilation")
    for n, side, dilation in zip(layout.grid, rpb.shape[1:], dilations, strict=True):
        position = torch.arange(n) // dilation
        # Distances beyond the window belong to pairs that the mask hides: any entry will do.
        offset = (position - position[:, None] + side // 2).clamp(0, side - 1)
        index = (index[:, None, :, None] * side + offset[None, :, None, :]).reshape(
            index.shape[0] * n, index.shape[1] * n
        )
    inner = rpb.flatten(1)[:, index.to(rpb.device)]
    before, after = layout.prefix, layout.suffix
    return torch.nn.functional.pad(inner, (before, after, before, after))
