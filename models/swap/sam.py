"""Swapped attention of timm's SAM encoders: maps without prefix tokens, and a position logit that depends on the query.

SAM adds q . R[row distance] + q . C[column distance] to a logit. A query's two lists of such logits, by the place of
the key in the query's range of rows and of columns, become extra channels of q, and the places of a key extra
channels of k, so that any pattern computes them exactly.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
import torch
from timm.layers import apply_rot_embed_cat
from torch.nn import functional as F

from visattn.layout import Layout
from visattn.models.swap.maps import dropout_refusal
from visattn.models.swap.runtime import Swapped
from visattn.models.swap.tokens import project
from visattn.patterns import Halo, Neighborhood, Pattern


class SamBlock:
    """timm's `Block` of SAM: maps [B, H, W, dim], windows or the whole map.

    Where its window does not divide the map, its zero padding takes part in the softmax; a pattern sees no padding.
    """

    visattn_site: Swapped

    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        """As the module's own forward."""
        site: Swapped = self.visattn_site
        if site.keeps_stock(dropout_refusal(self.attn)):
            return super().forward(x)  # type: ignore[misc]
        grid = int(x.shape[1]), int(x.shape[2])
        heads = self.attn.num_heads, x.shape[3] // self.attn.num_heads
        if self.window_size == 0 and site.runs_own(Layout(grid), heads, x):
            return super().forward(x)  # type: ignore[misc]
        x = x + self.drop_path1(self.ls1(self._visattn_map(site, self.norm1(x), grid)))
        tokens = x.flatten(1, 2)  # as timm does, for a faster MLP
        tokens = tokens + self.drop_path2(self.ls2(self.mlp(self.norm2(tokens))))
        return tokens.unflatten(1, grid)

    def _visattn_map(self: Any, site: Swapped, x: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
        attn = self.attn
        q, k, v = project(attn, x.flatten(1, 2))
        q, k = attn.q_norm(q).to(v.dtype), attn.k_norm(k).to(v.dtype)
        if attn.use_rel_pos:
            tables = attn.rel_pos_h, attn.rel_pos_w
            if self.window_size == 0:
                tables = tuple(_resized(table, 2 * n - 1) for table, n in zip(tables, grid, strict=True))
            q, k, padded = with_positions(q, k, v, tables, site.pattern, grid, attn.scale)
            y = site.attend(q, k, padded, Layout(grid), attn.scale)[..., : v.shape[-1]]
        else:
            if attn.rope is not None:
                q, k = (apply_rot_embed_cat(t, attn.rope.get_embed()).type_as(v) for t in (q, k))
            y = site.attend(q, k, v, Layout(grid), attn.scale)
        return attn.proj_drop(attn.proj(y.transpose(1, 2).flatten(2))).unflatten(1, grid)


def _resized(table: torch.Tensor, length: int) -> torch.Tensor:
    """A table of distances [L, D] for a map of another size, as timm resizes it: linearly."""
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
        distance, place = _places(pattern, grid, axis, keys)
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


# What `torch.compiler.assume_constant_result` does: the tracer cannot follow numpy through a cache.
_places._dynamo_marked_constant = True  # type: ignore[attr-defined]


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
