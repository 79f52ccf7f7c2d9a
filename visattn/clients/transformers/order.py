"""The order of tokens in towers that merge neighboring patches, by blocks and those by windows, or pool them."""

from __future__ import annotations

import torch

from visattn.clients.transformers.grids import Chunk, Sorted
from visattn.keep import kept


@kept
def row_major(chunk: Chunk | Sorted, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Index of the token at each place of the grid, row by row, and the way back."""
    order = _order(chunk)
    back = torch.empty_like(order)
    back[order] = torch.arange(len(order))
    return order.to(device), back.to(device)


def _order(chunk: Chunk | Sorted) -> torch.Tensor:
    """Where each token of the grid, row by row, is in the tower's sequence."""
    rows, columns = chunk.layout.grid
    places = torch.arange(rows * columns).reshape(rows, columns)
    if isinstance(chunk, Sorted):
        return _sorted(places[None], chunk).argsort()
    m = chunk.merge
    blocks = places.reshape(rows // m, m, columns // m, m).transpose(1, 2)
    if chunk.window:
        w = chunk.window
        bands = blocks.split(w)
        blocks = torch.cat([part.reshape(-1, m, m) for band in bands for part in band.split(w, 1)])
    return blocks.reshape(-1).argsort()


def _sorted(places: torch.Tensor, chunk: Sorted) -> torch.Tensor:
    """Places in the order of a sequence whose tokens that are pooled together lie a part of it apart."""
    down, across = chunk.stride
    for _ in range(chunk.times):
        groups, rows, columns = places.shape
        split = places.reshape(groups, rows // down, down, columns // across, across)
        places = split.permute(0, 2, 4, 1, 3).flatten(0, 2)
    return places.flatten()
