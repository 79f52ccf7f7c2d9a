"""Agent attention as two dense attentions through the pooled queries."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch.nn import functional

from visattn.kernels.linear.features import widened
from visattn.kernels.second_order import by_autograd, with_formula
from visattn.kernels.triton.backend import on_gpu
from visattn.layout import Layout
from visattn.patterns import Agent


class Convolution(NamedTuple):
    """A depthwise convolution over the grid that adds detail to the output.

    Attributes:
        weight: [H * D, 1, side per axis], sides odd.
        bias: [H * D] or None.
    """

    weight: torch.Tensor
    bias: torch.Tensor | None = None


def agent_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    pattern: Agent,
    layout: Layout,
    *,
    scale: float | None = None,
    key_mask: torch.Tensor | None = None,
    gather_bias: torch.Tensor | None = None,
    read_bias: torch.Tensor | None = None,
    convolution: Convolution | None = None,
) -> torch.Tensor:
    """Agent attention (Han et al. 2024, equation 4) with what its backbones add to it (section 3.3).

    out = softmax(scale q A^T + read_bias) [softmax(scale A k^T + gather_bias) v] + convolution(v), where the
    agents A are the grid's queries after adaptive average pooling.

    Args:
        q: Queries [B, S, H, D].
        k: Keys [B, S, Hkv, D].
        v: Values [B, S, Hkv, D].
        pattern: Agents per axis.
        layout: Where the tokens sit.
        scale: Factor on both logits, D**-0.5 if None.
        key_mask: bool [B, S], True where a key may be attended.
        gather_bias: Added to the first logits, broadcastable to [B, H, agents, S].
        read_bias: Added to the second logits, broadcastable to [B, H, S, agents].
        convolution: Depthwise convolution of v's grid tokens, added to theirs; needs Hkv = H.

    Returns:
        [B, S, H, D]. A sample without any visible key gives zeros (and the convolution).
    """
    agents = pool_queries(q, pattern, layout)
    scale = float(q.shape[-1] ** -0.5 if scale is None else scale)
    # Torch's attention is as fast or faster, but for masked keys without gradients (docs/gpu-notes.md).
    pays = key_mask is not None and gather_bias is None and read_bias is None and not torch.is_grad_enabled()
    if pays and on_gpu(q).ok:
        from visattn.kernels.triton.agent.attention import agent_attention as fused_attention

        out = fused_attention(q, agents, k, v, key_mask, scale, through_agents)
    else:
        out = through_agents(q, agents, k, v, key_mask, scale, gather_bias, read_bias)
    if convolution is None:
        return out
    return out + _local(v, layout, convolution)


def through_agents(
    q: torch.Tensor,
    agents: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    key_mask: torch.Tensor | None,
    scale: float,
    gather_bias: torch.Tensor | None = None,
    read_bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """Two dense attentions: agents [B, n, H, D] gather from all keys, queries read from the agents."""
    heads_first = [t.transpose(1, 2) for t in (q, k, v, agents)]
    mask, alive = gather_bias, None
    if key_mask is not None:
        alive = key_mask.any(1)[:, None, None, None]
        # A sample without keys attends to all and is blanked: no row of the softmax is empty.
        mask = key_mask[:, None, None, :] | ~alive
        if gather_bias is not None:
            mask = gather_bias.masked_fill(~mask, float("-inf"))
    gathered = _attend(heads_first[3], heads_first[1], heads_first[2], mask, scale)
    if alive is not None:
        gathered = gathered.masked_fill(~alive, 0.0)
    return _attend(heads_first[0], heads_first[3], gathered, read_bias, scale).transpose(1, 2)


def pool_queries(q: torch.Tensor, pattern: Agent, layout: Layout) -> torch.Tensor:
    """The agents: adaptive averages of the grid's queries [B, S, H, D] -> [B, agents, H, D]."""
    pool = (functional.adaptive_avg_pool1d, functional.adaptive_avg_pool2d, functional.adaptive_avg_pool3d)
    inner = _channels_first(q, layout)
    # The 1-D form takes a number, the others one number per axis.
    shape = list(pattern.shape(layout.grid))
    agents = pool[layout.dims - 1](inner, shape if layout.dims > 1 else shape[0])  # type: ignore[arg-type]
    return agents.flatten(2).transpose(1, 2).unflatten(2, q.shape[2:])


def _channels_first(x: torch.Tensor, layout: Layout) -> torch.Tensor:
    """The grid tokens of [B, S, H, D] as a view [B, H * D, *grid]."""
    inner = x[:, layout.prefix : layout.prefix + layout.tokens].flatten(2)
    # All dimensions by number: the older ONNX exporter writes a negative one down as it is.
    return inner.unflatten(1, layout.grid).permute(0, layout.dims + 1, *range(1, layout.dims + 1))


def _attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None, scale: float) -> torch.Tensor:
    """Dense attention, heads before tokens, with a bool mask or a bias."""
    if mask is not None and mask.dtype != torch.bool:
        mask = mask.to(q.dtype)
    bias = () if mask is None or mask.dtype == torch.bool else (mask,)

    def fused(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *bias: torch.Tensor) -> tuple[torch.Tensor, None]:
        # While torch.jit.trace records, sizes are tensors.
        grouped = bool(q.shape[1] != k.shape[1])
        own = bias[0] if bias else mask
        return functional.scaled_dot_product_attention(q, k, v, attn_mask=own, scale=scale, enable_gqa=grouped), None

    def plain(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *bias: torch.Tensor) -> torch.Tensor:
        return _plain(q, k, v, bias[0] if bias else mask, scale)

    return with_formula(fused, (q, k, v, *bias), lambda: by_autograd(plain), of_operators=True)[0]


def _plain(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None, scale: float) -> torch.Tensor:
    """The same by operators that have derivatives of all orders."""
    group, dtype = q.shape[1] // k.shape[1], q.dtype
    q, k, v = (widened(t) for t in (q, k, v))
    k, v = (t.repeat_interleave(group, 1) if group > 1 else t for t in (k, v))
    scores = q @ k.transpose(-1, -2) * scale
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else scores + mask
    return (scores.softmax(-1) @ v).to(dtype)


def _local(v: torch.Tensor, layout: Layout, convolution: Convolution) -> torch.Tensor:
    """Depthwise convolution of the grid's values, zeros for dense tokens: [B, S, H, D]."""
    convolve = (functional.conv1d, functional.conv2d, functional.conv3d)[layout.dims - 1]
    weight, bias = convolution
    padding = [side // 2 for side in weight.shape[2:]]
    local = convolve(_channels_first(v, layout), weight, bias, padding=padding, groups=len(weight))
    local = local.flatten(2).transpose(1, 2).unflatten(2, v.shape[2:])
    return functional.pad(local, (0, 0, 0, 0, layout.prefix, layout.suffix))
