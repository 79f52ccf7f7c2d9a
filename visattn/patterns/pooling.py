"""Pooled keys and values: one token for each cell of the grid."""

from __future__ import annotations

import math

import torch
from torch.nn.functional import pad

from visattn.layout import Layout
from visattn.operands import wide_dtype


def append_pooled(
    k: torch.Tensor,
    v: torch.Tensor,
    key_mask: torch.Tensor | None,
    layout: Layout,
    cell: tuple[int, ...],
    weight: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Put the pooled keys and values of a grid behind all tokens.

    Args:
        k: Keys [B, S, Hkv, D].
        v: Values [B, S, Hkv, D].
        key_mask: bool [B, S] or None. Masked tokens are left out of their cell; a cell without any is masked.
        layout: The tokens.
        cell: Tokens of a cell per axis.
        weight: Weight of each token of a cell, [*cell], the same for keys, values and heads; None for the mean.

    Returns:
        k and v [B, S + cells, Hkv, D], and the key mask [B, S + cells] or None.
    """
    inner = slice(layout.prefix, layout.prefix + layout.tokens)
    keep = None if key_mask is None else key_mask[:, inner]
    count = tokens_of_cells(layout.grid, cell, keep, k.device)
    if key_mask is not None:
        key_mask = torch.cat([key_mask, count > 0], 1)
    pooled = [pool(t[:, inner], layout.grid, cell, weight, keep, count) for t in (k, v)]
    return torch.cat([k, pooled[0]], 1), torch.cat([v, pooled[1]], 1), key_mask


def pool(
    x: torch.Tensor,
    grid: tuple[int, ...],
    cell: tuple[int, ...],
    weight: torch.Tensor | None,
    keep: torch.Tensor | None,
    count: torch.Tensor,
) -> torch.Tensor:
    """Weighted sum of each cell's tokens: [B, tokens, H, D] -> [B, cells, H, D].

    A cell of which only some tokens exist (at a border, or with tokens left out) has its weights scaled up by
    the number of slots over the number of tokens, so that the mean stays a mean.
    """
    slots = math.prod(cell)
    values = x if keep is None else x.masked_fill(~keep[:, :, None, None], 0)
    boxes = _boxes(values.flatten(2), grid, cell)
    wide = wide_dtype(x)
    weights = torch.full((slots,), 1 / slots, dtype=wide, device=x.device) if weight is None else weight.flatten()
    scale = slots / count.clamp(min=1).to(wide)
    out = torch.einsum("bnsc,s->bnc", boxes.to(wide), weights.to(wide)) * scale[..., None]
    return out.to(x.dtype).unflatten(2, x.shape[2:])


def tokens_of_cells(
    grid: tuple[int, ...], cell: tuple[int, ...], keep: torch.Tensor | None, device: torch.device
) -> torch.Tensor:
    """How many tokens each cell has: [1 or B, cells]."""
    there = torch.ones(1, math.prod(grid), dtype=torch.bool, device=device) if keep is None else keep
    return _boxes(there[..., None].to(torch.int32), grid, cell).sum((2, 3))


def _boxes(x: torch.Tensor, grid: tuple[int, ...], cell: tuple[int, ...]) -> torch.Tensor:
    """Cut [B, tokens, C] in cells, zeros where a border cell has no token: [B, cells, slots, C]."""
    dims = len(grid)
    x = x.unflatten(1, grid)
    missing = [-n % c for n, c in zip(grid, cell, strict=True)]
    x = pad(x, [0, 0, *(side for m in reversed(missing) for side in (0, m))])
    for i, c in enumerate(cell):
        x = x.unflatten(1 + 2 * i, (-1, c))
    outer, inner = [1 + 2 * i for i in range(dims)], [2 + 2 * i for i in range(dims)]
    return x.permute(0, *outer, *inner, 1 + 2 * dims).flatten(1, dims).flatten(2, 1 + dims)
