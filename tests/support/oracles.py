"""Slow, independent truths that the tests compare with: loops over tokens, straight from the papers' formulas."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence

import numpy as np
import torch

from visattn.layout import Layout
from visattn.plans import TilePlan

Sees = Callable[[tuple[int, ...], tuple[int, ...]], bool]


def grid_tokens(grid: Sequence[int]) -> list[tuple[int, ...]]:
    """Coordinates of a row-major grid's tokens."""
    return list(itertools.product(*(range(n) for n in grid)))


def mask_of(sees: Sees, layout: Layout) -> torch.Tensor:
    """The mask of a layout whose grid tokens see each other where `sees(query, key)` says so."""
    tokens = grid_tokens(layout.grid)
    mask = torch.ones(layout.length, layout.length, dtype=torch.bool)
    for (i, q), (j, k) in itertools.product(enumerate(tokens), enumerate(tokens)):
        mask[layout.prefix + i, layout.prefix + j] = sees(q, k)
    return mask


def neighborhood(i: int, j: int, n: int, window: int, stride: int, dilation: int, causal: bool) -> bool:
    """Whether query i sees key j on an axis of n tokens (the formula of NATTEN, one axis)."""
    if window == -1 or (dilation == 1 and window > n):
        window = n
    if i % dilation != j % dilation:
        return False
    group, p, t = i % dilation, i // dilation, j // dilation
    members = math.ceil((n - group) / dilation)
    if causal:
        lead = min((p // stride) * stride + stride - 1, members - 1)
        return max(0, lead - window + 1) <= t <= p
    lead = min((p // stride) * stride + stride // 2, members - 1)
    start = min(max(lead - window // 2, 0), members - window)
    return start <= t < start + window


def halo(i: int, j: int, n: int, block: int, halo: int) -> bool:
    """Whether query i sees key j: j lies in i's block or at most `halo` tokens beside it."""
    block = n if block == -1 else block
    first = i - i % block
    return first - halo <= j < first + block + halo


def visited(plan: TilePlan) -> torch.Tensor:
    """The pairs of tokens that a plan visits, bool [S, S + extra]; asserts that none is listed twice."""
    count = np.zeros((plan.queries.length, plan.keys.length), np.int64)
    for query, key, mask in zip(plan.lists.rows, plan.lists.tile, plan.lists.mask, strict=True):
        rows, columns = plan.queries.tokens[query], plan.keys.tokens[key]
        seen = np.ones((len(rows), len(columns)), bool) if mask < 0 else plan.masks[mask]
        assert not seen[:, columns < 0].any(), "an empty key slot is visible"
        seen = seen[np.ix_(rows >= 0, columns >= 0)]
        assert seen.any(), "a pair of tiles without a visible pair of tokens is listed"
        count[np.ix_(rows[rows >= 0], columns[columns >= 0])] += seen
    assert count.max() <= 1, "a pair of tokens is visited twice"
    return torch.from_numpy(count > 0)


def dense_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor,
    scale: float,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """Masked softmax attention in the dtype of q, one batch entry and head at a time: [B, S, H, Dv]."""
    group = q.shape[2] // k.shape[2]
    rows = []
    for b, h in itertools.product(range(q.shape[0]), range(q.shape[2])):
        logits = scale * q[b, :, h] @ k[b, :, h // group].T
        if bias is not None:
            logits = logits + bias[h]
        seen = mask[b, h] if mask.ndim == 4 else mask[b] if mask.ndim == 3 else mask
        empty = ~seen.any(1, keepdim=True)
        logits = logits.masked_fill(~seen, -math.inf).masked_fill(empty, 0.0)
        rows.append((logits.softmax(-1) * ~empty) @ v[b, :, h // group])
    return torch.stack(rows).view(q.shape[0], q.shape[2], q.shape[1], -1).transpose(1, 2)
