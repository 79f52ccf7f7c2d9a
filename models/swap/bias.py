"""The position biases of timm's modules as the `rpb` of a neighborhood."""

from __future__ import annotations

from typing import Any

import torch
from timm.layers import RelPosMlp

from visattn.offsets import log_distances, offsets_of
from visattn.patterns import Neighborhood


def symmetric(biases: torch.Tensor, side: tuple[int, ...]) -> torch.Tensor:
    """A table of biases by the distances of rows and columns as one by differences, as `offsets_of` takes it.

    Args:
        biases: [heads, rows * columns], by distance of rows, then of columns, as LeViT and its kin have them.
        side: Rows and columns.

    Returns:
        [(2 * rows - 1) * (2 * columns - 1), heads].
    """
    rows, columns = (torch.arange(1 - n, n, device=biases.device).abs() for n in side)
    return biases.unflatten(1, side)[:, rows][:, :, columns].flatten(1).T


def rpb_of(rel_pos: Any, pattern: Any, grid: tuple[int, ...]) -> torch.Tensor:
    """The `rpb` [heads, 2 * K - 1 per axis] of one of timm's modules of relative positions.

    Args:
        rel_pos: A `RelPosBias`, `RelPosBiasTf` or `RelPosMlp`; the last gives a bias at any distance, the others
            repeat their outermost entry beyond their window.
        pattern: The neighborhood pattern.
        grid: Rows and columns.
    """
    window = tuple(rel_pos.window_size)
    if isinstance(rel_pos, RelPosMlp):
        return _mlp_bias(rel_pos, pattern, grid)
    table = rel_pos.relative_position_bias_table
    if table.ndim == 3:  # RelPosBiasTf: [heads, rows, columns] by key minus query
        table = table.flip(1, 2).flatten(1).T
    entries = (2 * window[0] - 1) * (2 * window[1] - 1)
    return offsets_of(table[:entries], window, pattern, grid)


def _mlp_bias(rel_pos: RelPosMlp, pattern: Neighborhood, grid: tuple[int, ...]) -> torch.Tensor:
    swin = rel_pos.mode == "swin"
    known = rel_pos.pretrained_window_size if rel_pos.pretrained_window_size[0] > 0 else rel_pos.window_size
    weight = rel_pos.mlp.fc1.weight
    coordinates = log_distances(pattern, grid, tuple(known) if swin else None, weight)
    bias = rel_pos.bias_act(rel_pos.mlp(coordinates).permute(2, 0, 1))
    return bias if rel_pos.bias_gain is None else rel_pos.bias_gain * bias
