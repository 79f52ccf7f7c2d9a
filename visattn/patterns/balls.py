"""Which key tiles a query tile visits, for masks of all keys nearer than a radius."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from visattn.layout import Layout
from visattn.patterns.geometry import Bools, Spans, TilePairs, check_pairs, product_pairs, ranked
from visattn.tiling import AxisTiles, Ints, Tiling

CHUNK = 256
# Squares of distances stay exact below the square root of what an int64 holds, three axes together.
LARGEST = 2**30


@dataclass(frozen=True, eq=False)
class AxisDistance:
    """Squared distances along one axis, in a unit in which they are whole numbers.

    Attributes:
        centre: Where each query is: [queries].
        keys: Number of keys.
        unit: Distance of neighbouring keys: key j is at j * unit.
        reach: Distance from which no key is visible, whatever the other axes are.
        circular: Whether the last key is next to the first.
    """

    centre: Ints
    keys: int
    unit: int
    reach: int
    circular: bool

    @property
    def shifts(self) -> bool:
        """Whether a distance is that of the indices of query and key."""
        own = self.unit == 1 and not self.circular and len(self.centre) == self.keys
        return own and not self.centre[0]

    def squared(self, query: Ints, key: Ints) -> Ints:
        """Squared distance of queries and keys, both arrays broadcast; that of the reach for all beyond it."""
        distance = abs(key * self.unit - self.centre[query])
        if self.circular:
            around = self.keys * self.unit
            distance = distance % around
            distance = np.minimum(distance, around - distance)
        return np.minimum(distance, self.reach) ** 2

    @cached_property
    def largest(self) -> int:
        """The largest squared distance of a query and a key."""
        query = np.arange(len(self.centre))
        if self.circular:
            # The farthest key is one of those beside the opposite point.
            opposite = (self.centre + self.keys * self.unit // 2) // self.unit
            return int(max(self.squared(query, (opposite + i) % self.keys).max() for i in (-1, 0, 1)))
        return int(max(self.squared(query, np.full(1, j)).max() for j in (0, self.keys - 1)))

    def spans(self) -> Spans:
        """The keys that are near enough along this axis."""
        first = -(-(self.centre - self.reach + 1) // self.unit)
        stop = (self.centre + self.reach - 1) // self.unit + 1
        if self.circular:
            everything = stop - first >= self.keys
            first, stop = np.where(everything, 0, first), np.where(everything, self.keys, stop)
            return Spans(first, stop, 1, self.keys, True)
        return Spans(np.maximum(first, 0), np.minimum(stop, self.keys), 1, self.keys)


def distances(
    grid: tuple[int, ...], keys: tuple[int, ...], circular: tuple[bool, ...], radius: int
) -> tuple[list[AxisDistance], int]:
    """Distances along each axis in one unit for all, and the squared radius in it.

    Raises:
        ValueError: If the sides of the two grids share so little that no unit divides all distances.
    """
    ratios = [(m // math.gcd(n, m), n // math.gcd(n, m)) for n, m in zip(grid, keys, strict=True)]
    # A query is at ((2 i + 1) m - n) / (2 n) keys: halves cancel where both are odd.
    parts = [(1 if up % 2 and down % 2 else 2) * down for up, down in ratios]
    unit = math.lcm(*parts)
    if radius * unit > LARGEST:
        sides = " and ".join("x".join(map(str, side)) for side in (grid, keys))
        raise ValueError(
            f"radius {radius} on grids {sides}: their distances have no common unit above 1/{unit} of a key: use grids "
            "whose sides have a simple ratio, like 1:2 or 2:3"
        )
    found = []
    for n, m, (up, down), ring in zip(grid, keys, ratios, circular, strict=True):
        centre = ((2 * np.arange(n, dtype=np.int64) + 1) * up - down) * unit // (2 * down)
        found.append(AxisDistance(centre, m, unit, radius * unit, ring))
    return found, (radius * unit) ** 2


def ball_mask(axes: list[AxisDistance], limit: int) -> Bools:
    """Token mask of grids whose axes have these distances: sum over axes below `limit`, [queries, keys]."""
    total = np.zeros((1, 1), np.int64)
    for axis in axes:
        own = axis.squared(np.arange(len(axis.centre))[:, None], np.arange(axis.keys))
        total = (total[:, None, :, None] + own[None, :, None, :]).reshape(len(total) * len(own), -1)
    return total < limit


@dataclass(frozen=True, eq=False)
class _AxisPairs:
    """Pairs of tiles of one axis: their tiles, least and largest squared distance, and their kind.

    Pairs of one kind have equal squared distances `blocks` [kinds, query slots, key slots], that of the reach and more
    in empty key slots, and are `whole` [kinds] where no key slot is empty.
    """

    query: Ints
    key: Ints
    least: Ints
    largest: Ints
    kind: Ints
    blocks: Ints
    whole: Bools


def ball_pairs(axes: list[AxisDistance], limit: int, queries: Tiling, keys: Tiling) -> TilePairs:
    """Visited tile pairs of a pattern whose mask is: sum over axes of squared distances < limit.

    Pairs of tiles with equal distances have one mask, so each distinct one is evaluated once.

    Args:
        axes: Distances per axis.
        limit: Where visibility ends.
        queries: The query side cut in tiles, without dilation.
        keys: The key side cut in tiles, without dilation.
    """
    query = key = least = largest = code = np.zeros(1, np.int64)
    whole = np.ones(1, bool)
    found = []
    for axis, q_axis, k_axis in zip(axes, queries.axes, keys.axes, strict=True):
        own = _axis_pairs(axis, limit, q_axis, k_axis)
        found.append(own.blocks)
        # Which of all combinations are near enough is a byte each, and a sum of eight before that.
        check_pairs(len(query) * len(own.query) // 8, *queries.axes)
        pick, other = np.nonzero(least[:, None] + own.least < limit)
        query = query[pick] * q_axis.tiles + own.query[other]
        key = key[pick] * k_axis.tiles + own.key[other]
        least, largest = least[pick] + own.least[other], largest[pick] + own.largest[other]
        code = code[pick] * len(own.blocks) + own.kind[other]
        whole = whole[pick] & own.whole[own.kind[other]]
    partial = np.flatnonzero((largest >= limit) | ~whole)
    codes, index = ranked(code[partial], math.prod(map(len, found)))
    mask = np.full(len(query), -1)
    mask[partial] = index
    chunks = [_masks(codes[i : i + CHUNK], found, limit, queries, keys) for i in range(0, len(codes), CHUNK)]
    masks = np.concatenate([np.empty((0, queries.capacity, keys.capacity), bool), *chunks])
    return TilePairs(query, key, mask, masks, _visible(axes, limit))


def _axis_pairs(axis: AxisDistance, limit: int, q: AxisTiles, k: AxisTiles) -> _AxisPairs:
    """Pairs of tiles of one axis that are near enough on that axis."""
    assert q.step == k.step == 1, "circles are not dilated"
    # Which pairs: those that one interval per axis visits.
    side_q, side_k = (Tiling(Layout(tiles.length), (tiles.size,)) for tiles in (q, k))
    near = product_pairs([axis.spans()], side_q, side_k)
    if axis.shifts:
        # Distance and sizes say everything about a pair.
        what = np.stack([k.first[near.key] - q.first[near.query], k.count[near.key], q.count[near.query]], 1)
        _, first, kind = np.unique(what, axis=0, return_index=True, return_inverse=True)
        blocks, valid = _blocks(axis, limit, q, k, near.query[first], near.key[first])
    else:
        blocks, valid = _blocks(axis, limit, q, k, near.query, near.key)
        _, first, kind = np.unique(
            np.concatenate([blocks, valid], 2).reshape(len(blocks), -1), axis=0, return_index=True, return_inverse=True
        )
        blocks, valid = blocks[first], valid[first]
    kind = kind.ravel()
    # Empty query slots decide nothing.
    least = np.where(valid, blocks, limit).min((1, 2))
    largest = np.where(valid, blocks, 0).max((1, 2))
    whole = (k.count[near.key] == k.size)[first]
    return _AxisPairs(near.query, near.key, least[kind], largest[kind], kind, blocks, whole)


def _blocks(axis: AxisDistance, limit: int, q: AxisTiles, k: AxisTiles, query: Ints, key: Ints) -> tuple[Ints, Bools]:
    """Squared distances of pairs of tiles, `limit` in empty key slots, and which query slots exist: [pairs, q, 1]."""
    rows, columns = q.tokens[query][:, :, None], k.tokens[key][:, None, :]
    squared = axis.squared(np.maximum(rows, 0), np.maximum(columns, 0))
    return np.where(columns < 0, limit, squared), rows >= 0


def _masks(codes: Ints, blocks: list[Ints], limit: int, queries: Tiling, keys: Tiling) -> Bools:
    """The masks that the codes (one kind per axis) name: [codes, query slots, key slots]."""
    dims = len(blocks)
    total = np.zeros((len(codes), *(1,) * 2 * dims), np.int64)
    rest = codes
    for i in reversed(range(dims)):
        rest, kind = np.divmod(rest, len(blocks[i]))
        view = [len(codes)] + [1] * 2 * dims
        view[1 + i], view[1 + dims + i] = blocks[i].shape[1:]
        total = total + blocks[i][kind].reshape(view)
    return (total < limit).reshape(len(codes), queries.capacity, keys.capacity)


def _visible(axes: list[AxisDistance], limit: int) -> int:
    """Visible pairs of tokens: how often each squared distance occurs on the grid, over the visible ones."""
    total, often = np.zeros(1, np.int64), np.ones(1, np.int64)
    for axis in axes:
        near, pairs = _histogram(axis, limit)
        total = (total[:, None] + near).ravel()
        often = (often[:, None] * pairs).ravel()[total < limit]
        total = total[total < limit]
    return int(often.sum())


def _histogram(axis: AxisDistance, limit: int) -> tuple[Ints, Ints]:
    """The squared distances below `limit` of one axis, and how often each occurs."""
    if axis.shifts:
        near = np.arange(min(axis.keys, axis.reach))
        return near**2, (axis.keys - near) * np.where(near > 0, 2, 1)
    spans = axis.spans()
    values: Ints = np.empty(0, np.int64)
    counts: Ints = np.empty(0, np.int64)
    for start in range(0, spans.length, CHUNK):
        query = np.arange(start, min(start + CHUNK, spans.length))[:, None]
        key = spans.start[query] + np.arange(int((spans.stop - spans.start).max(initial=0)))
        squared = axis.squared(query, key % axis.keys)[key < spans.stop[query]]
        own, number = np.unique(squared, return_counts=True)
        values, which = np.unique(np.concatenate([values, own]), return_inverse=True)
        counts = np.bincount(which.ravel(), np.concatenate([counts, number])).astype(np.int64)
    return values[values < limit], counts[values < limit]
