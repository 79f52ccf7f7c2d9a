"""Which key tiles a query tile visits, for patterns that are one interval of keys per axis."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from visattn.memory import check_room
from visattn.tiling import AxisTiles, Ints, Tiling

Bools = NDArray[np.bool_]

# What planning holds of a pair of tiles at once: its two tiles, its mask, and copies of them in other orders.
PAIR_BYTES = 64


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
        start: First visible position: [queries]. On a circular axis it may lie before the first key.
        stop: One past the last visible position: [queries]. On a circular axis it may lie behind the last key; then
            positions wrap around, and stop - start is at most the number of positions.
        step: Distance of neighbouring positions (the dilation); query i is in group i mod step. Queries and keys are
            the same tokens where it is above 1, and on a circular axis a divisor of their number.
        keys: Keys of the axis, as many as queries if None.
        circular: Whether the last key is next to the first.
    """

    start: Ints
    stop: Ints
    step: int = 1
    keys: int | None = None
    circular: bool = False

    @property
    def length(self) -> int:
        """Queries of the axis."""
        return len(self.start)

    @property
    def key_length(self) -> int:
        """Keys of the axis."""
        return len(self.start) if self.keys is None else self.keys

    @property
    def visible(self) -> int:
        """Visible (query, key) pairs of the axis."""
        return int(np.maximum(self.stop - self.start, 0).sum())

    @property
    def whole(self) -> bool:
        """Whether every query sees every key."""
        return self.step == 1 and bool((self.stop - self.start >= self.key_length).all())

    @property
    def triangular(self) -> bool:
        """Whether every query sees itself and all keys before it, and nothing else."""
        if self.step != 1 or self.circular or self.key_length != self.length:
            return False
        return not self.start.any() and bool((self.stop == np.arange(self.length) + 1).all())

    def sees(self, query: Ints, position: Ints) -> Bools:
        """Whether queries see keys at positions of their dilation groups; both arrays broadcast."""
        ahead = position - self.start[query]
        if self.circular:
            ahead = ahead % (self.key_length // self.step)
        return (ahead >= 0) & (ahead < (self.stop - self.start)[query])

    def mask(self) -> Bools:
        """Visibility of key j to query i: [queries, keys]."""
        query, key = np.arange(self.length)[:, None], np.arange(self.key_length)
        return (query % self.step == key % self.step) & self.sees(query, key // self.step)


def check_pairs(pairs: int, *axes: AxisTiles) -> None:
    """Raise a ValueError if the lists of so many pairs of tiles of these axes are more than this machine holds."""
    what = f"listing {pairs:.3g} pairs of tiles on {'x'.join(str(axis.length) for axis in axes)} tokens"
    check_room(PAIR_BYTES * pairs, what, "take a smaller grid, a narrower pattern or larger tiles")


def nearest(query: Ints, queries: int, keys: int, window: int) -> Ints:
    """First of the `window` keys that are nearest to each query, of equally near ones the first; may leave the axis.

    Both split the same extent: the query's centre is at (query + 0.5) * keys / queries - 0.5 keys.
    """
    return -(-((2 * query + 1) * keys - (1 + window) * queries) // (2 * queries))


def product_mask(spans: list[Spans]) -> Bools:
    """Token mask of grids whose axes have these spans: [queries, keys]."""
    mask = np.ones((1, 1), bool)
    for axis in spans:
        mask = np.kron(mask, axis.mask())
    return mask


def ranked(codes: Ints, most: int) -> tuple[Ints, Ints]:
    """The distinct numbers among many below `most`, ascending, and which of them each is.

    Without sorting where a table of all numbers below `most` is no longer than they are many.
    """
    if most > max(len(codes), 2**16):
        found, which = np.unique(codes, return_inverse=True)
        return found, which.ravel()
    there = np.zeros(most, bool)
    there[codes] = True
    place = np.cumsum(there) - 1
    return np.flatnonzero(there), place[codes]


def product_pairs(spans: list[Spans], queries: Tiling, keys: Tiling) -> TilePairs:
    """Visited tile pairs of a pattern whose mask is the AND of one interval per axis."""
    query = key = code = np.zeros(1, np.int64)
    axis_masks, visible = [], 1
    for axis, q_axis, k_axis in zip(spans, queries.axes, keys.axes, strict=True):
        pairs_of = _ring_pairs if axis.circular else _axis_pairs
        q, k, mask, masks = pairs_of(axis, q_axis, k_axis)
        check_pairs(len(query) * len(q), *queries.axes)
        query = (query[:, None] * q_axis.tiles + q).ravel()
        key = (key[:, None] * k_axis.tiles + k).ravel()
        # Code 0 of an axis is its all-visible mask, so a pair that is full on every axis has code 0.
        code = (code[:, None] * (len(masks) + 1) + mask + 1).ravel()
        full = np.ones((1, q_axis.size, k_axis.size), bool)
        axis_masks.append(np.concatenate([full, masks]))
        visible *= axis.visible
    codes, mask = ranked(code, math.prod(len(masks) for masks in axis_masks))
    if len(codes) and codes[0] == 0:
        codes, mask = codes[1:], mask - 1
    return TilePairs(query, key, mask, _combine(codes, axis_masks, queries, keys), visible)


def _axis_pairs(spans: Spans, q: AxisTiles, k: AxisTiles) -> tuple[Ints, Ints, Ints, Bools]:
    """Visited tile pairs of one axis: query tiles, key tiles, mask ids (-1 full), masks [m, q.size, k.size]."""
    rows = q.tokens
    valid = rows >= 0
    far = spans.key_length + 1
    start = np.where(valid, spans.start[rows], far)
    stop = np.where(valid, spans.stop[rows], -far)
    low, high = start.min(1), stop.max(1)
    # The key tiles of a group are consecutive, so each query tile visits one range of them.
    first = k.group_start[q.group] + low // k.size
    number = np.where(high > low, (high - 1) // k.size - low // k.size + 1, 0)
    check_pairs(int(number.sum()), q)
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


def _ring_pairs(spans: Spans, q: AxisTiles, k: AxisTiles) -> tuple[Ints, Ints, Ints, Bools]:
    """The same of a circular axis, where a window may be in two parts, and even a key tile see both of its ends."""
    rows, members = q.tokens, spans.key_length // spans.step
    valid = rows >= 0
    found = []
    for shift in (-members, 0, members):
        # What of the windows lies on the axis once it is moved by whole turns.
        start = np.maximum(spans.start[rows] + shift, 0)
        stop = np.minimum(spans.stop[rows] + shift, members)
        there = valid & (stop > start)
        low, high = np.where(there, start, members).min(1), np.where(there, stop, 0).max(1)
        number = np.where(there.any(1), (high - 1) // k.size - low // k.size + 1, 0)
        check_pairs(int(number.sum()), q)
        query = np.repeat(np.arange(q.tiles), number)
        first = k.group_start[q.group] + low // k.size
        found.append(
            np.stack([query, first[query] + np.arange(len(query)) - np.repeat(np.cumsum(number) - number, number)])
        )
    query, key = np.unique(np.concatenate(found, 1), axis=1)
    slot = np.arange(k.size)
    position = k.first[key][:, None, None] + slot
    inside = slot < k.count[key][:, None, None]
    seen = spans.sees(np.maximum(rows, 0)[query][:, :, None], position) & inside
    kept = (seen & valid[query][:, :, None]).any((1, 2))
    query, key, seen, inside = query[kept], key[kept], seen[kept], inside[kept]
    # Rows of empty query slots are like their neighbours': as few masks as possible.
    seen = np.where(valid[query][:, :, None], seen, seen[:, :1])
    masks, mask = np.unique(seen.reshape(len(seen), -1), axis=0, return_inverse=True)
    masks, mask = masks.reshape(-1, q.size, k.size), mask.ravel()
    full = masks.all((1, 2))
    number = np.where(full, -1, np.cumsum(~full) - 1)
    return query, key, number[mask], masks[~full]


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
