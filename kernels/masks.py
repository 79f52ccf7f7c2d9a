"""Dense masks and biases of a call, for the backends that compute every pair of tokens."""

from __future__ import annotations

from typing import NamedTuple

import torch

from visattn.keep import kept
from visattn.layout import Layout
from visattn.operands import repeated, wide_dtype
from visattn.patterns import (
    DynamicPattern,
    Neighborhood,
    OrderedPattern,
    Pattern,
    RoutedPattern,
    dense_mask,
    routed_mask,
)
from visattn.patterns.choice.blocks import inner, token_blocks
from visattn.patterns.ordered import Clustered
from visattn.patterns.values import per_axis
from visattn.problem import Call


def visible(call: Call, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    """Which keys each query sees, the key mask included.

    Args:
        call: The call.
        q: Queries [B, S, H, D].
        k: Keys [B, N + extra, Hkv, D].

    Returns:
        bool [1 or B, 1 or H, S, N + extra].
    """
    if isinstance(call.pattern, RoutedPattern):
        mask = routed_mask(call.pattern, call.layout, q, k, call.key_mask, call.scale)
        mask = mask if mask.ndim == 4 else mask[:, None]
    else:
        mask = _mask(call.pattern, call.layout, q.device)[None, None]
    return mask if call.key_mask is None else mask & call.key_mask[:, None, None, :]


class Rest(NamedTuple):
    """A call with one pooled key for each block of the grid.

    Attributes:
        k: Keys [B, S + blocks, Hkv, D].
        v: Values, alike.
        seen: Which keys each query sees, the key mask included: bool [B, H, S, S + blocks].
        bias: Added to the scores: [1 or B, 1, 1, S + blocks].
        copied: The token whose output each query has: int64 [B, H, S]; None for its own.
    """

    k: torch.Tensor
    v: torch.Tensor
    seen: torch.Tensor
    bias: torch.Tensor
    copied: torch.Tensor | None = None


def settled(x: torch.Tensor, key_mask: torch.Tensor | None) -> torch.Tensor:
    """Keys or values, with the mean of the others in the place of those that a mask hides: no scale follows these.

    Args:
        x: Keys or values [B, N, H, D].
        key_mask: bool [B, N], or None.

    Returns:
        Like x, and x itself without a mask.
    """
    if key_mask is None:
        return x
    shown = key_mask[:, :, None, None]
    total = x.masked_fill(~shown, 0).sum(1, keepdim=True, dtype=wide_dtype(x))
    return torch.where(shown, x, (total / shown.sum(1, keepdim=True).clamp(min=1)).to(x.dtype))


def rest_of(call: Call, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Rest | None:
    """The pooled keys of blocks that a dynamic pattern does not list, or what groups of tokens see; None for neither.

    Dense queries see no pooled key: they see all tokens.
    """
    pattern, layout = call.pattern, call.layout
    if isinstance(pattern, OrderedPattern):
        return ordered_rest(call, q, k, v, pattern.cluster(q, k, layout, call.key_mask, call.scale))
    if not isinstance(pattern, DynamicPattern) or not pattern.pools_rest:
        return None
    blocks = pattern.blocks(layout.grid)
    choice = pattern.choose(q, k, layout, call.key_mask, call.scale)
    pooled = pattern.pooled(k, v, layout, call.key_mask)
    listed = choice.mask(0, blocks.columns)
    rows, columns = (token_blocks(blocks.grid, box, q.device) for box in (blocks.queries, blocks.keys))
    own = torch.ones(*listed.shape[:2], layout.length, layout.length, dtype=torch.bool, device=q.device)
    at = inner(layout)
    own[:, :, at, at] = listed[:, :, rows][..., columns]
    if call.key_mask is not None:
        own &= call.key_mask[:, None, None]
    rest = torch.zeros(*listed.shape[:2], layout.length, blocks.columns, dtype=torch.bool, device=q.device)
    rest[:, :, at] = ~listed[:, :, rows] & pooled.weight.isfinite()[:, None, None]
    weight = pooled.weight.masked_fill(pooled.weight.isinf(), 0)
    bias = torch.nn.functional.pad(weight, (layout.length, 0))[:, None, None]
    return Rest(pooled.k, pooled.v, torch.cat([own, rest], 3), bias)


def ordered_rest(call: Call, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, groups: Clustered) -> Rest:
    """What queries see where tokens are grouped, with the extra keys that all grid queries of a head see."""
    pattern, layout, heads = call.pattern, call.layout, q.shape[2]
    assert isinstance(pattern, OrderedPattern)
    seen = pattern.token_mask(groups, layout)
    if call.key_mask is not None:
        seen = seen & call.key_mask[:, None, None]
    k, v = (repeated(t, heads) for t in (k, v))
    at, copied = inner(layout), None
    if groups.copied is not None:
        copied = torch.arange(layout.length, device=q.device).repeat(*groups.copied.shape[:2], 1)
        copied[:, :, at] = groups.copied + at.start
    if groups.extra is None or groups.weight is None:
        return Rest(k, v, seen, torch.zeros(1, 1, 1, seen.shape[3], device=q.device), copied)
    index = groups.extra.transpose(1, 2)[..., None].expand(-1, -1, -1, q.shape[3])
    k, v = (torch.cat([t, t[:, at].gather(1, index)], 1) for t in (k, v))
    more = torch.zeros(*seen.shape[:3], index.shape[1], dtype=torch.bool, device=q.device)
    more[:, :, at] = groups.weight.isfinite()[:, :, None]
    bias = torch.nn.functional.pad(groups.weight.nan_to_num(neginf=0.0), (layout.length, 0))[:, :, None]
    return Rest(k, v, torch.cat([seen, more], 3), bias, copied)


@kept
def _mask(pattern: Pattern, layout: Layout, device: torch.device) -> torch.Tensor:
    return dense_mask(pattern, layout).to(device)


def position_bias(call: Call) -> torch.Tensor:
    """The relative position bias of every pair of tokens, 0 where one of them is dense: [H, S, S]."""
    assert call.rpb is not None and isinstance(call.pattern, Neighborhood)
    layout, rpb = call.layout, call.rpb
    index = torch.zeros(1, 1, dtype=torch.int64, device=rpb.device)
    dilations = per_axis(call.pattern.dilation, layout.dims, "dilation")
    for n, side, dilation in zip(layout.grid, rpb.shape[1:], dilations, strict=True):
        position = torch.arange(n, device=rpb.device) // dilation
        # Distances beyond the window belong to pairs that the mask hides: any entry will do.
        offset = (position - position[:, None] + side // 2).clamp(0, side - 1)
        index = (index[:, None, :, None] * side + offset[None, :, None, :]).reshape(
            index.shape[0] * n, index.shape[1] * n
        )
    inner = rpb.flatten(1)[:, index]
    before, after = layout.prefix, layout.suffix
    return torch.nn.functional.pad(inner, (before, after, before, after))
