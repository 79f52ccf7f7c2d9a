"""The attention calls of the backbones, as functions that torch.fx and TorchScript treat as one step."""

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from timm.models import register_notrace_function
from torch.nn import functional as F

from visattn.attend import attention
from visattn.kernels.agent.attention import Convolution, agent_attention
from visattn.kernels.linear.flow import flow_attention
from visattn.kernels.linear.mala import mala_attention, mala_features
from visattn.layout import Layout
from visattn.models.sizes import check_fixed
from visattn.patterns import Agent

Function = TypeVar("Function", bound=Callable[..., Any])


def unscripted(function: Function) -> Function:
    """`torch.jit.ignore` with a type: TorchScript calls the function in Python."""
    return torch.jit.ignore(function)  # type: ignore[return-value]


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
@unscripted
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
    check_fixed((height, width))
    # Under autocast the projections are narrower than the parameter.
    bias = rpb.to(q.dtype)
    # As text: torch.compile follows no pattern that is made in the code it traces.
    pattern = f"na(window={window}, dilation={dilation})"
    return attention(q, k, v, pattern, Layout((height, width)), scale=scale, rpb=bias)


@register_notrace_function
@unscripted
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
    check_fixed((height, width))
    pattern = f"routing(regions={regions}, topk={topk})"  # as text, like that of `neighborhood`
    return attention(q, k, v, pattern, Layout((height, width)), scale=scale)


@register_notrace_function
@unscripted
def to_groups(x: torch.Tensor, side: int) -> torch.Tensor:
    """A map [B, H, W, C] as squares of `side` x `side` tokens: [B * squares, side**2, C], row by row.

    Raises:
        ValueError: If the squares do not divide the map.
    """
    batch, height, width, channels = x.shape
    check_fixed((height, width))
    if height % side or width % side:
        raise ValueError(f"a map of {height} x {width} tokens has no whole groups of {side} x {side}: resize the image")
    x = x.reshape(batch, height // side, side, width // side, side, channels).permute(0, 1, 3, 2, 4, 5)
    return x.reshape(-1, side * side, channels)


@register_notrace_function
def from_groups(x: torch.Tensor, side: int, height: int, width: int) -> torch.Tensor:
    """The inverse of `to_groups`, as tokens [B, H * W, C]."""
    x = x.reshape(-1, height // side, width // side, side, side, x.shape[2]).permute(0, 1, 3, 2, 4, 5)
    return x.reshape(x.shape[0], height * width, x.shape[5])


@register_notrace_function
def fold_views(x: torch.Tensor) -> tuple[torch.Tensor, int]:
    """Images [B, C, H, W] as they are, views [B, V, C, H, W] as B * V images; the number of views."""
    if x.ndim == 5:
        return x.flatten(0, 1), x.shape[1]
    return x, 1


@register_notrace_function
def unfold_views(x: torch.Tensor, images: torch.Tensor) -> torch.Tensor:
    """Tokens [B * V, S, dim] of what `fold_views` made of images, as [B, V, S, dim] where there are views."""
    if images.ndim == 5:
        return x.reshape(images.shape[0], images.shape[1], x.shape[1], x.shape[2])
    return x


@register_notrace_function
def mean_token(x: torch.Tensor) -> torch.Tensor:
    """The mean of tokens [B, S, dim], or of those of all views [B, V, S, dim]."""
    return x.flatten(1, -2).mean(dim=1)


@register_notrace_function
@unscripted
def grouped(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, views: int, height: int, width: int, groups: int, scale: float
) -> torch.Tensor:
    """Attention of q, k, v [B, views * height * width, heads, head_dim] in groups that are spread over all views."""
    if q.is_meta:
        return torch.empty_like(q)
    check_fixed((height, width))
    pattern = f"groups(count=1x{groups}x{groups})"  # as text, like that of `neighborhood`
    return attention(q, k, v, pattern, Layout((views, height, width)), scale=scale)


@register_notrace_function
@unscripted
def through_agents(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    height: int,
    width: int,
    prefix: int,
    side: int,
    gather_bias: torch.Tensor,
    read_bias: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
) -> torch.Tensor:
    """Agent attention of q, k, v [B, prefix + height * width, heads, head_dim] with side * side agents.

    Biases are those of `agent_attention`; weight and bias are its depthwise convolution.
    """
    check_fixed((height, width))
    pattern, layout, local = Agent((side, side)), Layout((height, width), prefix=prefix), Convolution(weight, bias)
    return agent_attention(q, k, v, pattern, layout, gather_bias=gather_bias, read_bias=read_bias, convolution=local)


@register_notrace_function
@unscripted
def flow(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Flow-Attention of q, k, v [B, tokens, heads, head_dim]."""
    return flow_attention(q, k, v)


@register_notrace_function
def rotary_table(angle: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """Sines and cosines of a 2-D rotary position embedding, in float32.

    Args:
        angle: [D / 2], the frequencies of a row's pairs of channels, each twice, and equally of a column's.
        height: Of the map.
        width: Of the map.

    Returns:
        [2, height * width, 1, D / 2], one for each pair of channels: first the row's, then the column's.
    """
    rows = torch.outer(torch.arange(height, device=angle.device).float(), angle[::2].float())
    columns = torch.outer(torch.arange(width, device=angle.device).float(), angle[::2].float())
    turns = torch.cat([rows[:, None].expand(-1, width, -1), columns[None].expand(height, -1, -1)], dim=2)
    turns = turns.reshape(height * width, 1, -1)
    return torch.stack([turns.sin(), turns.cos()])


def rotate(x: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """Tokens [B, S, H, D] with neighbouring pairs of channels turned by a `rotary_table`, in x's dtype."""
    even, odd, sin, cos = x[..., 0::2], x[..., 1::2], table[0], table[1]
    turned = torch.stack([even * cos - odd * sin, odd * cos + even * sin], dim=-1)
    return turned.flatten(-2).to(x.dtype)


@register_notrace_function
@unscripted
def magnitude_aware(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """Magnitude-aware linear attention of q, k, v [B, tokens, heads, head_dim], turned by a `rotary_table`."""
    q, k = mala_features(q), mala_features(k)
    return mala_attention(q, k, v, rotated=(rotate(q, table), rotate(k, table)))


@register_notrace_function
def resize(x: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """Maps [N, C, H0, W0] resampled bilinearly to [N, C, height, width]; x itself if it has that size."""
    if x.shape[2] == height and x.shape[3] == width:
        return x
    return F.interpolate(x, size=(height, width), mode="bilinear", align_corners=False)


@register_notrace_function
@unscripted
def shift_mask(like: torch.Tensor, height: int, width: int, window: int, shift: int) -> torch.Tensor:
    """The mask of Swin's shifted windows: 0 inside a region of the unshifted map, -100 across regions.

    Args:
        like: Tensor whose dtype and device the mask gets.
        height: Of the map, a multiple of the window.
        width: Of the map, a multiple of the window.
        window: Side of a window.
        shift: Tokens that the map was rolled by.

    Returns:
        [windows, window**2, window**2].
    """
    rows, columns = (torch.arange(n, device=like.device) for n in (height, width))
    bands = [(t >= n - window).int() + (t >= n - shift).int() for t, n in ((rows, height), (columns, width))]
    region = 3 * bands[0][:, None] + bands[1][None, :]
    region = region.view(height // window, window, width // window, window).permute(0, 2, 1, 3).flatten(2).flatten(0, 1)
    return ((region[:, :, None] != region[:, None, :]) * -100.0).to(like.dtype)


@register_notrace_function
def window_mask(
    x: torch.Tensor, known: torch.Tensor, side: int, height: int, width: int, window: int, shift: int
) -> torch.Tensor:
    """The mask of a shifted map x [B, height, width, C]: `known` if x is side x side."""
    if height == side and width == side:
        return known
    return shift_mask(x, height, width, window, shift)
