"""Position biases of models with windows as the `rpb` of a neighborhood."""

from __future__ import annotations

import math
from typing import Any

import torch

from visattn.patterns import Neighborhood


def offsets_of(table: torch.Tensor, window: tuple[int, ...], pattern: Any, grid: tuple[int, ...]) -> torch.Tensor:
    """A relative position bias table as the `rpb` of a neighborhood pattern.

    Args:
        table: [(2 * window - 1 per axis), heads], by query position minus key position plus window - 1.
        window: Of the table.
        pattern: The neighborhood pattern.
        grid: Rows and columns.

    Returns:
        [heads, 2 * K - 1 per axis] for the pattern's window K, by key position minus query position. Distances
        beyond the table get its nearest entry; none occur where K is at most the table's window.
    """
    assert isinstance(pattern, Neighborhood)
    sides = pattern.rpb_shape(grid)
    dilations = pattern.step(grid)
    bias = table.reshape(*(2 * w - 1 for w in window), -1).permute(2, 0, 1)
    for axis, (side, dilation, w) in enumerate(zip(sides, dilations, window, strict=True)):
        distance = dilation * (torch.arange(side, device=table.device) - side // 2)
        bias = bias.index_select(axis + 1, (w - 1 - distance).clamp(0, 2 * w - 2))
    return bias


def log_distances(
    pattern: Neighborhood, grid: tuple[int, ...], known: tuple[int, ...] | None, like: torch.Tensor
) -> torch.Tensor:
    """Coordinates of query minus key at each place of an `rpb`, on a logarithmic scale: [rows, columns, 2].

    Args:
        pattern: The neighborhood pattern.
        grid: Rows and columns.
        known: Window in which distances are measured ("Swin Transformer V2", section 3.3), None for plain ones.
        like: Tensor with dtype and device of the result.
    """
    axes = []
    for axis, (side, dilation) in enumerate(zip(pattern.rpb_shape(grid), pattern.step(grid), strict=True)):
        distance = -dilation * (torch.arange(side, device=like.device) - side // 2).float()
        axes.append(distance if known is None else distance * 8 / max(known[axis] - 1, 1))
    coordinates = torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1)
    log = torch.log(coordinates.abs() + 1) if known is None else torch.log2(coordinates.abs() + 1) / math.log2(8)
    return (coordinates.sign() * log).to(like.dtype)
