"""Position logits that depend on the query, decomposed by axes, as further channels of queries and keys.

SAM and MViT v2 add q . R[row distance] + q . C[column distance] to a logit. A query's two lists of such logits, by the
place of the key in the query's range of rows and of columns, become extra channels of q, and the places of a key extra
channels of k, so that any pattern computes them exactly.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

from visattn.patterns import Agent, Halo, Neighborhood, Pattern, SharingPattern
from visattn.patterns.kinds import reads_products
from visattn.patterns.traced import constant


def check_positions(pattern: Pattern, name: str) -> None:
    """Raise a ValueError for a pattern whose weights are not a function of one logit for each pair of tokens.

    Agents are means of queries: with further channels a query would meet them by products of position logits, and
    those belong to pairs of a query and a key.
    """
    within: Any = pattern.of if isinstance(pattern, SharingPattern) else pattern
    if not reads_products(within) or isinstance(within, Agent):
        raise ValueError(
            f"{pattern} has no logits of pairs of tokens to which the position logits of {name} could be added: use a "
            "pattern that has, like na(window=...), or 'dense'"
        )


def resized(table: torch.Tensor, length: int) -> torch.Tensor:
    """A table of distances [L, D] for a map of another size, as SAM resizes it: linearly."""
    if len(table) == length:
        return table
    return F.interpolate(table.T[None], size=length, mode="linear")[0].T


def with_positions(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    tables: tuple[torch.Tensor, ...],
    pattern: Pattern,
    grid: tuple[int, int],
    scale: float,
    keys: tuple[int, ...] | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Queries and keys with extra channels for the decomposed position logits, and values padded to their width.

    Args:
        q: Queries [B, heads, rows * columns, D].
        k: Keys of the same shape, or on the grid `keys`.
        v: Values like the keys.
        tables: Embeddings [2 * n - 1, D] of the distances query minus key + n - 1 of rows and of columns; distances
            beyond a table get its outermost entry.
        pattern: The pattern, which decides how many places an axis needs.
        grid: Rows and columns.
        scale: Factor on the logits, without which the position logits are added.
        keys: Rows and columns of keys on another grid; distances are then as MViT v2 counts them.
    """
    keys = grid if keys is None else keys
    q_map = q.unflatten(2, grid)
    queries, places = [q], [k]
    for axis, (table, product) in enumerate(zip(tables, ("bhyxd,ypd->bhyxp", "bhyxd,xpd->bhyxp"), strict=True)):
        distance, place = constant(_places, pattern, grid, axis, keys)
        middle = len(table) // 2
        row = torch.tensor(distance, device=q.device).clamp(-middle, middle) + middle
        logits = torch.einsum(product, q_map, table[row].to(q.dtype)) / scale
        queries.append(logits.flatten(2, 3))
        one_hot = F.one_hot(torch.tensor(place, device=q.device), len(distance[0])).to(k.dtype)
        one_hot = one_hot.unsqueeze(1 - axis).expand(*keys, -1).flatten(0, 1)
        places.append(one_hot.expand(*k.shape[:2], -1, -1))
    q, k = torch.cat(queries, dim=-1), torch.cat(places, dim=-1)
    return q, k, F.pad(v, (0, q.shape[-1] - v.shape[-1]))


Places = tuple[tuple[tuple[int, ...], ...], tuple[int, ...]]


def _places(pattern: Pattern, grid: tuple[int, int], axis: int, keys: tuple[int, ...]) -> Places:
    """Along one axis, query minus key for each query and each place of a key, and the place of each key."""
    return _cached_places(pattern, grid, axis, keys)


@lru_cache(maxsize=128)
def _cached_places(pattern: Pattern, grid: tuple[int, int], axis: int, keys: tuple[int, ...]) -> Places:
    index = np.arange(grid[axis])
    if keys != grid:
        # In steps of the finer of both axes, the last key at 0: the middle of a table is that of the larger axis.
        own, other = max(keys[axis] / len(index), 1.0), max(len(index) / keys[axis], 1.0)
        place = np.arange(keys[axis])
        row = index[:, None] * own - place * other + (len(place) - 1) * other
        return _nested(row.astype(int) - max(len(index), len(place)) + 1), tuple(place.tolist())
    if not isinstance(pattern, Neighborhood | Halo) or pattern.spans(grid)[axis].circular:
        return _nested(index[:, None] - index), tuple(index.tolist())
    # The keys of a query are neighbours in their dilation group: as many places as they are at most tell them apart.
    spans = pattern.spans(grid)[axis]
    places = int((spans.stop - spans.start).max())
    first = spans.start[:, None]
    key = index[:, None] % spans.step + spans.step * (first + (np.arange(places) - first) % places)
    return _nested(index[:, None] - key), tuple((index // spans.step % places).tolist())


def _nested(values: np.ndarray) -> tuple[tuple[int, ...], ...]:
    return tuple(tuple(row) for row in values.tolist())
