"""Agent attention as two dense attentions through the pooled queries."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch.nn import functional

from visattn.kernels.fused import fused
from visattn.kernels.second_order import by_autograd, with_formula
from visattn.kernels.triton.backend import on_gpu
from visattn.layout import Layout
from visattn.operands import repeated, wide_dtype, widened
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
    agents A are the grid's queries after adaptive average pooling. Tokens that `key_mask` hides are in no average, and
    an agent of whose cell it hides every token is not there.

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
        [B, S, H, D]. A sample without any visible token in the grid has no agents and gives zeros (and the
        convolution).
    """
    agents, agent_mask = pool_queries(q, pattern, layout, key_mask)
    scale = float(q.shape[-1] ** -0.5 if scale is None else scale)
    # Torch's attention is as fast or faster, but for masked keys without gradients (docs/gpu-notes.md).
    pays = key_mask is not None and gather_bias is None and read_bias is None and not torch.is_grad_enabled()
    if pays and on_gpu(q).ok:
        from visattn.kernels.triton.agent.attention import agent_attention as fused_attention

        out = fused_attention(q, agents, k, v, key_mask, agent_mask, scale, through_agents)
    else:
        out = through_agents(q, agents, k, v, key_mask, agent_mask, scale, gather_bias, read_bias)
    if convolution is None:
        return out
    return out + _local(v, layout, convolution)


def through_agents(
    q: torch.Tensor,
    agents: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    key_mask: torch.Tensor | None,
    agent_mask: torch.Tensor | None,
    scale: float,
    gather_bias: torch.Tensor | None = None,
    read_bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """Two dense attentions: agents [B, n, H, D] gather from the keys, queries read from the agents.

    The masks, bool [B, S] and [B, n], say which keys and which agents there are; None means all.
    """
    q, agents, k, v = (t.transpose(1, 2) for t in (q, agents, k, v))
    gather, alive = _mask(key_mask, gather_bias)
    read, some = _mask(agent_mask, read_bias)
    gathered = attend(agents, k, v, gather, scale)
    for there in (alive, some):
        gathered = gathered if there is None else gathered.masked_fill(~there, 0.0)
    return attend(q, agents, gathered, read, scale).transpose(1, 2)


def _mask(shown: torch.Tensor | None, bias: torch.Tensor | None) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """A mask of keys [B, n] and a bias as one, and which samples [B, 1, 1, 1] have a key at all.

    A sample without keys attends to all and is to be blanked: no row of the softmax is empty.
    """
    if shown is None:
        return bias, None
    alive = shown.any(1)[:, None, None, None]
    mask = shown[:, None, None, :] | ~alive
    return mask if bias is None else bias.masked_fill(~mask, float("-inf")), alive


def pool_queries(
    q: torch.Tensor, pattern: Agent, layout: Layout, key_mask: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The agents: adaptive averages of the grid's queries.

    Args:
        q: Queries [B, S, H, D].
        pattern: Agents per axis.
        layout: Where the tokens sit.
        key_mask: bool [B, S], False for tokens that are in no average; None means that all are.

    Returns:
        [B, agents, H, D], and which of them average any token: bool [B, agents], None without a key mask.
    """
    shape = pattern.shape(layout.grid)
    if key_mask is None:
        return _pooled(q, layout, shape).unflatten(2, q.shape[2:]), None
    shown = key_mask[:, :, None, None]
    agents = _pooled(q.masked_fill(~shown, 0.0), layout, shape)
    # In float32 at least: the share of a few tokens among many is small.
    share = _pooled(shown.to(wide_dtype(q)), layout, shape)
    there = share > 0
    agents = (agents / share.masked_fill(~there, 1.0)).to(q.dtype)
    return agents.unflatten(2, q.shape[2:]), there[:, :, 0]


def _pooled(x: torch.Tensor, layout: Layout, shape: tuple[int, ...]) -> torch.Tensor:
    """Adaptive averages of the grid's tokens: [B, S, H, D] -> [B, agents, H * D].

    The channels of an agent are neighbors in memory, whatever order the pooling of torch left: its fused attention
    takes nothing else and would make all weights instead.
    """
    grid = _channels_first(x, layout)
    if x.is_cuda and layout.dims == 3 and not any(n % cells for n, cells in zip(layout.grid, shape, strict=True)):
        return _equal_cells(grid, shape).flatten(2).transpose(1, 2).contiguous()
    pool = (functional.adaptive_avg_pool1d, functional.adaptive_avg_pool2d, functional.adaptive_avg_pool3d)
    # The 1-D form takes a number, the others one number per axis.
    sides = shape[0] if len(shape) == 1 else list(shape)
    return pool[len(shape) - 1](grid, sides).flatten(2).transpose(1, 2).contiguous()  # type: ignore[arg-type]


def _equal_cells(grid: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    """Averages [B, C, *shape] of equal cells; torch's pooling of three axes is slow on tokens in this order."""
    for axis, cells in enumerate(shape):
        grid = grid.unflatten(2 + 2 * axis, (cells, -1))
    return grid.mean(tuple(range(3, 3 + 2 * len(shape), 2)))


def _channels_first(x: torch.Tensor, layout: Layout) -> torch.Tensor:
    """The grid tokens of [B, S, H, D] as a view [B, H * D, *grid]."""
    inner = x[:, layout.prefix : layout.prefix + layout.tokens].flatten(2)
    # All dimensions by number: the older ONNX exporter writes a negative one down as it is.
    return inner.unflatten(1, layout.grid).permute(0, layout.dims + 1, *range(1, layout.dims + 1))


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None, scale: float) -> torch.Tensor:
    """Dense attention, heads before tokens, with a bool mask or a bias."""
    if mask is not None and mask.dtype != torch.bool:
        mask = mask.to(q.dtype)
    bias = () if mask is None or mask.dtype == torch.bool else (mask,)

    def at_once(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *bias: torch.Tensor) -> tuple[torch.Tensor, None]:
        return fused(q, k, v, bias[0] if bias else mask, scale=scale), None

    def plain(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *bias: torch.Tensor) -> torch.Tensor:
        return _plain(q, k, v, bias[0] if bias else mask, scale)

    return with_formula(at_once, (q, k, v, *bias), lambda: by_autograd(plain), of_operators=True)[0]


def _plain(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None, scale: float) -> torch.Tensor:
    """The same by operators that have derivatives of all orders."""
    dtype = q.dtype
    q, k, v = (widened(t) for t in (q, k, v))
    k, v = (repeated(t, q.shape[1], 1) for t in (k, v))
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
