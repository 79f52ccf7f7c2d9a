"""Which key tiles a query tile visits, for patterns that are one interval of keys per axis."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from visattn.tiling import AxisTiles, Ints, Tiling

Bools = NDArray[np.bool_]


@dataclass(frozen=True, eq=False)
class TilePairs:
    """The pairs of grid tiles a pattern visits.

    Attributes:
        query: Grid tile of the queries, 0-based: [pairs].
        key: Grid tile of the keys, 0-based: [pairs].
        mask: Index into `masks`, or -1 where every slot of the key tile is visible to every query: [pairs].
        masks: The distinct masks: [masks, query slots, key slots]. Rows of empty query slots are arbitrary,
            columns of empty key slots are False.
        visible: Number of visible (query, key) pairs of tokens.
    """

    query: Ints
    key: Ints
    mask: Ints
    masks: Bools
    visible: int


@dataclass(frozen=True, eq=False)
class Spans:
    """The keys of each query along one axis: positions [start, stop) of the query's dilation group.

    Attributes:
        start: First visible position: [axis length].
        stop: One past the last visible position: [axis length].
        step: Distance of neighbouring positions (the dilation); query i is in group i mod step.
    """

    start: Ints
    stop: Ints
    step: int = 1

    @property
    def length(self) -> int:
        """Tokens of the axis."""
        return len(self.start)

    @property
    def visible(self) -> int:
        """Visible (query, key) pairs of the axis."""
        return int(np.maximum(self.stop - self.start, 0).sum())

    def mask(self) -> Bools:
        """Visibility of key j to query i: [length, length]."""
        index = np.arange(self.length)
        group, position = index % self.step, index // self.step
        same = group[:, None] == group
        return same & (position >= self.start[:, None]) & (position < self.stop[:, None])


def product_mask(spans: list[Spans]) -> Bools:
    """Token mask of a grid whose axes have these spans: [tokens, tokens]."""
    mask = np.ones((1, 1), bool)
    for axis in spans:
        mask = np.kron(mask, axis.mask())
    return mask


def product_pairs(spans: list[Spans], queries: Tiling, keys: Tiling) -> TilePairs:
    """Visited tile pairs of a pattern whose mask is the AND of one interval per axis."""
    query = key = code = np.zeros(1, np.int64)
    axis_masks, visible = [], 1
    for axis, q_axis, k_axis in zip(spans, queries.axes, keys.axes, strict=True):
        q, k, mask, masks = _axis_pairs(axis, q_axis, k_axis)
        query = (query[:, None] * q_axis.tiles + q).ravel()
        key = (key[:, None] * k_axis.tiles + k).ravel()
        # Code 0 of an axis is its all-visible mask, so a pair that is full on every axis has code 0.
        code = (code[:, None] * (len(masks) + 1) + mask + 1).ravel()
        full = np.ones((1, q_axis.size, k_axis.size), bool)
        axis_masks.append(np.concatenate([full, masks]))
        visible *= axis.visible
    codes, mask = np.unique(code, return_inverse=True)
    mask = mask.ravel()
    if len(codes) and codes[0] == 0:
        codes, mask = codes[1:], mask - 1
    return TilePairs(query, key, mask, _combine(codes, axis_masks, queries, keys), visible)


def _axis_pairs(spans: Spans, q: AxisTiles, k: AxisTiles) -> tuple[Ints, Ints, Ints, Bools]:
    """Visited tile pairs of one axis: query tiles, key tiles, mask ids (-1 full), masks [m, q.size, k.size]."""
    rows = q.tokens
    valid = rows >= 0
    far = spans.length + 1
    start = np.where(valid, spans.start[rows], far)
    stop = np.where(valid, spans.stop[rows], -far)
    low, high = start.min(1), stop.max(1)
    # The key tiles of a group are consecutive, so each query tile visits one range of them.
    first = k.group_start[q.group] + low // k.size
    number = np.where(high > low, (high - 1) // k.size - low // k.size + 1, 0)
    query = np.repeat(np.arange(q.tiles), number)
    key = first[query] + np.arange(len(query)) - np.repeat(np.cumsum(number) - number, number)

    base, count = k.first[key], k.count[key]
    seen_by_all = (np.where(valid, start, 0).max(1)[query] <= base) & (
        np.where(valid, stop, far).min(1)[query] >= base + k.size
    )
    mask = np.where(seen_by_all & (count == k.size), -1, 0)
    rest = np.flatnonzero(mask == 0)
    low_slot = np.clip(start[query[rest]] - base[rest, None], 0, count[rest, None])
    high_slot = np.clip(stop[query[rest]] - base[rest, None], 0, count[rest, None])
    edges, index = np.unique(np.stack([low_slot, high_slot], 1), axis=0, return_inverse=True)
    mask[rest] = index.ravel()
    slot = np.arange(k.size)
    masks = (slot >= edges[:, 0, :, None]) & (slot < edges[:, 1, :, None])
    empty = np.zeros(len(mask), bool)
    nothing = np.all(edges[:, 0] >= edges[:, 1], axis=1)
    empty[rest] = nothing[mask[rest]]
    return query[~empty], key[~empty], mask[~empty], masks


def _combine(codes: Ints, axis_masks: list[Bools], queries: Tiling, keys: Tiling) -> Bools:
    """AND of the axis masks that each code names: [codes, query slots, key slots]."""
    dims = len(axis_masks)
    out = np.ones((len(codes), *(1,) * 2 * dims), bool)
    rest = codes
    for i in reversed(range(dims)):
        rest, which = np.divmod(rest, len(axis_masks[i]))
        view = [len(codes)] + [1] * 2 * dims
        view[1 + i], view[1 + dims + i] = axis_masks[i].shape[1:]
        out = out & axis_masks[i][which].reshape(view)
    return out.reshape(len(codes), queries.capacity, keys.capacity)
