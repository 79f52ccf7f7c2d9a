"""Which key tiles a query tile visits, for masks that depend only on the offset of key and query."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from visattn.patterns.geometry import Bools, TilePairs
from visattn.tiling import AxisTiles, Ints, Tiling

CHUNK = 256


@dataclass(frozen=True, eq=False)
class _AxisPairs:
    """Pairs of tiles of one axis: their tiles, least and largest cost of their offsets, and their kind.

    Pairs of one kind have the same distance and the same number of keys; `kinds` lists those two: [kinds, 2].
    """

    query: Ints
    key: Ints
    least: Ints
    largest: Ints
    kind: Ints
    kinds: Ints


def offset_pairs(costs: list[Ints], limit: int, queries: Tiling, keys: Tiling) -> TilePairs:
    """Visited tile pairs of a pattern whose mask is: sum over axes of cost[|offset|] < limit.

    The mask of a pair of tiles depends only on their distance and sizes, so each distinct one is evaluated once.

    Args:
        costs: Per axis the cost of an offset's absolute value, rising from 0: [axis length].
        limit: Where visibility ends.
        queries: The query side cut in tiles, without dilation.
        keys: The key side cut in tiles, without dilation.
    """
    query = key = least = largest = code = np.zeros(1, np.int64)
    whole = np.ones(1, bool)
    axes = []
    for cost, q_axis, k_axis in zip(costs, queries.axes, keys.axes, strict=True):
        axis = _axis_pairs(cost, limit, q_axis, k_axis)
        axes.append(axis.kinds)
        pick, other = np.nonzero(least[:, None] + axis.least < limit)
        query = query[pick] * q_axis.tiles + axis.query[other]
        key = key[pick] * k_axis.tiles + axis.key[other]
        least, largest = least[pick] + axis.least[other], largest[pick] + axis.largest[other]
        code = code[pick] * len(axis.kinds) + axis.kind[other]
        whole = whole[pick] & (axis.kinds[axis.kind[other], 1] == k_axis.size)
    partial = np.flatnonzero((largest >= limit) | ~whole)
    codes, index = np.unique(code[partial], return_inverse=True)
    mask = np.full(len(query), -1)
    mask[partial] = index.ravel()
    chunks = [_masks(codes[i : i + CHUNK], axes, costs, limit, queries, keys) for i in range(0, len(codes), CHUNK)]
    masks = np.concatenate([np.empty((0, queries.capacity, keys.capacity), bool), *chunks])
    return TilePairs(query, key, mask, masks, _visible(costs, limit))


def offset_mask(costs: list[Ints], limit: int) -> Bools:
    """Token mask of a grid whose axes have these costs: [tokens, tokens]."""
    total = np.zeros((1, 1), np.int64)
    for cost in costs:
        index = np.arange(len(cost))
        axis = cost[abs(index[:, None] - index)]
        side = len(total) * len(cost)
        total = (total[:, None, :, None] + axis[None, :, None, :]).reshape(side, side)
    return total < limit


def _axis_pairs(cost: Ints, limit: int, q: AxisTiles, k: AxisTiles) -> _AxisPairs:
    """Pairs of tiles of one axis that are near enough on that axis."""
    assert q.step == k.step == 1, "offset patterns are not dilated"
    reach = int(np.searchsorted(cost, limit))
    q_last = q.first + q.count - 1
    first = np.maximum(q.first - reach + 1, 0) // k.size
    last = np.minimum(q_last + reach - 1, len(cost) - 1) // k.size
    number = last - first + 1
    query = np.repeat(np.arange(q.tiles), number)
    key = first[query] + np.arange(len(query)) - np.repeat(np.cumsum(number) - number, number)
    ahead = k.first[key] - q_last[query]
    behind = q.first[query] - (k.first + k.count - 1)[key]
    least = cost[np.maximum(np.maximum(ahead, behind), 0)]
    largest = cost[np.maximum(-ahead, -behind)]
    distance = k.first[key] - q.first[query]
    kinds, kind = np.unique(np.stack([distance, k.count[key]], 1), axis=0, return_inverse=True)
    return _AxisPairs(query, key, least, largest, kind.ravel(), kinds)


def _masks(codes: Ints, axes: list[Ints], costs: list[Ints], limit: int, queries: Tiling, keys: Tiling) -> Bools:
    """The masks that the codes (one kind per axis) name: [codes, query slots, key slots]."""
    dims = len(axes)
    total = np.zeros((len(codes), *(1,) * 2 * dims), np.int64)
    rest = codes
    for i in reversed(range(dims)):
        rest, kind = np.divmod(rest, len(axes[i]))
        distance, count = axes[i][kind].T
        q_slot, k_slot = np.arange(queries.shape[i]), np.arange(keys.shape[i])
        offset = abs(distance[:, None, None] + k_slot - q_slot[:, None])
        # Offsets beyond the axis belong to empty slots.
        cost = np.append(costs[i], limit)[np.minimum(offset, len(costs[i]))]
        cost = np.where(k_slot < count[:, None, None], cost, limit)
        view = [len(codes)] + [1] * 2 * dims
        view[1 + i], view[1 + dims + i] = cost.shape[1:]
        total = total + cost.reshape(view)
    return (total < limit).reshape(len(codes), queries.capacity, keys.capacity)


def _visible(costs: list[Ints], limit: int) -> int:
    """Visible pairs of tokens: how often each offset occurs on the grid, over the visible offsets."""
    total, often = np.zeros(1, np.int64), np.ones(1, np.int64)
    for cost in costs:
        near = cost[: int(np.searchsorted(cost, limit))]
        pairs = (len(cost) - np.arange(len(near))) * np.where(np.arange(len(near)) > 0, 2, 1)
        total = (total[:, None] + near).ravel()
        often = (often[:, None] * pairs).ravel()[total < limit]
        total = total[total < limit]
    return int(often.sum())


def squared(grid: tuple[int, ...]) -> list[Ints]:
    """Costs whose sum is the squared Euclidean distance."""
    return [np.arange(n, dtype=np.int64) ** 2 for n in grid]
