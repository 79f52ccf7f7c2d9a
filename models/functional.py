"""The attention calls of the backbones, as functions that torch.fx and TorchScript treat as one step."""

from __future__ import annotations

import torch
from timm.models import register_notrace_function
from torch.nn import functional as F

from visattn.attend import attention
from visattn.layout import Layout
from visattn.patterns import Neighborhood, Routing


@register_notrace_function
def pad_grid(x: torch.Tensor, side: int) -> torch.Tensor:
    """Zeros at the bottom and right of a map [B, H, W, C] until both sides are at least `side`."""
    height, width = x.shape[1], x.shape[2]
    if height >= side and width >= side:
        return x
    return F.pad(x, (0, 0, 0, max(0, side - width), 0, max(0, side - height)))


@register_notrace_function
def pad_multiple(x: torch.Tensor, step: int) -> torch.Tensor:
    """Zeros at the bottom and right of a map [B, H, W, C] until both sides are multiples of `step`."""
    height, width = x.shape[1], x.shape[2]
    return F.pad(x, (0, 0, 0, -width % step, 0, -height % step))


@register_notrace_function
@torch.jit.ignore
def neighborhood(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    rpb: torch.Tensor,
    height: int,
    width: int,
    window: int,
    dilation: int,
    scale: float,
) -> torch.Tensor:
    """Neighborhood attention of q, k, v [B, height * width, heads, head_dim] with the bias rpb."""
    if q.is_meta:
        return torch.empty_like(q)
    # Under autocast the projections are narrower than the parameter.
    bias = rpb.to(q.dtype)
    return attention(q, k, v, Neighborhood(window, dilation=dilation), Layout((height, width)), scale=scale, rpb=bias)


@register_notrace_function
@torch.jit.ignore
def routed(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    height: int,
    width: int,
    regions: int,
    topk: int,
    scale: float,
) -> torch.Tensor:
    """Bi-level routing attention of q, k, v [B, height * width, heads, head_dim]."""
    if q.is_meta:
        return torch.empty_like(q)
    return attention(q, k, v, Routing(regions, topk), Layout((height, width)), scale=scale)
