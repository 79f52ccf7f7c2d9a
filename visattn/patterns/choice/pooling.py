"""Sums and bounds of the tokens of blocks."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import torch

from visattn.operands import wide_dtype
from visattn.patterns.choice.blocks import block_tokens, slot_places, within


def _cut(x: torch.Tensor, grid: tuple[int, ...], box: tuple[int, ...], fill: float = 0.0) -> torch.Tensor:
    """Tokens [B, tokens, H, D] as blocks [B, blocks per axis, sides of a block, H, D]; what lies behind is `fill`.

    Sides are those `within` the grid.
    """
    box = within(grid, box)
    x = _padded(x.unflatten(1, grid), grid, box, fill)
    dims = len(grid)
    for i, side in enumerate(box):
        x = x.unflatten(1 + 2 * i, (-1, side))
    order = [0, *range(1, 2 * dims, 2), *range(2, 2 * dims + 1, 2), 2 * dims + 1, 2 * dims + 2]
    return x.permute(order)


def _padded(x: torch.Tensor, grid: tuple[int, ...], box: tuple[int, ...], fill: float = 0.0) -> torch.Tensor:
    """Tokens [B, *grid, H, D] with `fill` behind each axis that blocks do not divide."""
    behind = [-n % side for n, side in zip(grid, box, strict=True)]
    if not any(behind):
        return x
    pads = [0, 0, 0, 0]
    for each in reversed(behind):
        pads += [0, each]
    return torch.nn.functional.pad(x, pads, value=fill)


def sums(x: torch.Tensor, grid: tuple[int, ...], box: tuple[int, ...], parts: int = 1) -> torch.Tensor:
    """Sums of the tokens of each part of each block, in float32 at least.

    Args:
        x: Tokens [B, tokens, H, D].
        grid: Tokens per axis.
        box: Sides of a block.
        parts: Parts of equal length that a block's tokens, in row-major order, are cut in.

    Returns:
        [B, blocks, parts, H, D].
    """
    wide, dims = wide_dtype(x), len(grid)
    inside = within(grid, box)
    if parts == 1:
        # Axis by axis, the last one first: each sum reads rows of neighbouring channels, which one sum of all does not.
        own = _padded(x.unflatten(1, grid), grid, inside)
        for i in range(dims, 0, -1):
            own = own.unflatten(i, (-1, inside[i - 1])).sum(i + 1, dtype=wide)
        return own.flatten(1, dims)[:, :, None]
    cut = tokens_of_blocks(x, grid, box)
    if inside != box:
        ends = part_ends(grid, box, parts)
        return torch.stack([cut[:, :, a:b].sum(2, dtype=wide) for a, b in pairwise((0, *ends))], 2)
    return cut.unflatten(2, (parts, math.prod(box) // parts)).sum(3, dtype=wide)


def part_ends(grid: tuple[int, ...], box: tuple[int, ...], parts: int) -> tuple[int, ...]:
    """Behind which slot of a block `within` the grid each of the equal parts of the whole block ends."""
    length = math.prod(box) // parts
    return tuple(int(n) for n in np.searchsorted(slot_places(grid, box), length * np.arange(1, parts + 1)))


def tokens_of_blocks(x: torch.Tensor, grid: tuple[int, ...], box: tuple[int, ...]) -> torch.Tensor:
    """Tokens [B, tokens, H, D] block by block, in row-major order inside; zeros behind: [B, blocks, slots, H, D].

    Slots are those `within` the grid.
    """
    dims = len(grid)
    return _cut(x, grid, box).flatten(1 + dims, 2 * dims).flatten(1, dims)


def counts(
    x: torch.Tensor, grid: tuple[int, ...], box: tuple[int, ...], parts: int, valid: torch.Tensor | None
) -> torch.Tensor:
    """Valid tokens of each part: [1 or B, blocks, parts]."""
    wide = wide_dtype(x)
    if valid is None and parts == 1:
        return block_tokens(grid, box, x.device).to(wide)[None, :, None]
    ones = torch.ones(1, x.shape[1], dtype=wide, device=x.device) if valid is None else valid.to(wide)
    return sums(ones[..., None, None], grid, box, parts)[..., 0, 0]


def means(
    x: torch.Tensor, grid: tuple[int, ...], box: tuple[int, ...], parts: int, valid: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Means over the valid tokens of each part [B, blocks, parts, H, D], zero where there are none; their counts."""
    x = x if valid is None else x.masked_fill(~valid[..., None, None], 0)
    count = counts(x, grid, box, parts, valid)
    return sums(x, grid, box, parts) / count.clamp(min=1)[..., None, None], count


def bounds(
    x: torch.Tensor, grid: tuple[int, ...], box: tuple[int, ...], valid: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """The least and the greatest value of each channel among the valid tokens of each block: [B, blocks, H, D]."""
    found, dims = [], len(grid)
    for sign in (1.0, -1.0):
        infinite = sign * math.inf
        own = x if valid is None else x.masked_fill(~valid[..., None, None], infinite)
        cut = _cut(own, grid, box, infinite)
        axes = list(range(1 + dims, 1 + 2 * dims))
        found.append((cut.amin(axes) if sign > 0 else cut.amax(axes)).flatten(1, dims))
    wide = wide_dtype(x)
    # A block without valid tokens has no bounds; nobody lists it.
    low, high = (t.to(wide).nan_to_num(posinf=0.0, neginf=0.0) for t in found)
    return low, high
