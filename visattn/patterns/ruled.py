"""Patterns that are a rule for pairs of positions: the shortest way to a pattern of one's own."""

from __future__ import annotations

import math
from abc import abstractmethod

import numpy as np

from visattn.patterns.geometry import Bools, TilePairs
from visattn.patterns.kinds import StaticPattern
from visattn.tiling import Ints, Tiling

Coordinates = tuple[Ints, ...]


class RuledPattern(StaticPattern):
    """A static pattern that `sees` says all of: mask and tiles follow from it.

    Planning evaluates the rule once for every pair of tokens, tile by tile. A pattern for large grids that finds its
    tiles from their borders derives from `StaticPattern` or `SpannedPattern`.
    """

    @abstractmethod
    def sees(self, query: Coordinates, key: Coordinates) -> Bools:
        """Whether queries see keys.

        Args:
            query: Positions of queries, one array per axis.
            key: Positions of keys, one array per axis; they broadcast with those of the queries.
        """

    def grid_mask(self, grid: tuple[int, ...]) -> Bools:
        """The rule for all pairs."""
        at = np.indices(grid).reshape(len(grid), -1)
        tokens = math.prod(grid)
        seen = self._seen(tuple(axis[:, None] for axis in at), tuple(axis[None] for axis in at), (tokens, tokens))
        return np.array(seen)

    def _seen(self, query: Coordinates, key: Coordinates, shape: tuple[int, ...]) -> Bools:
        """The rule as bools of a shape.

        Raises:
            ValueError: If `sees` gives anything else.
        """
        seen = np.asarray(self.sees(query, key))
        try:
            whole = np.broadcast_to(seen, shape)
        except ValueError:
            whole = None
        if whole is None or seen.dtype != bool:
            raise ValueError(
                f"sees of {type(self).__name__} gave {seen.dtype} {list(seen.shape)} but must give bools that "
                f"broadcast to {list(shape)}, like abs(query[0] - key[0]) < 3"
            )
        return whole

    def tile_pairs(self, grid: tuple[int, ...], queries: Tiling, keys: Tiling) -> TilePairs:
        """Pairs of tiles in which the rule holds somewhere."""
        rows, columns = (_grid_slots(tiling) for tiling in (queries, keys))
        key_at = tuple(axis[None] for axis in np.unravel_index(np.maximum(columns, 0), grid))
        found: dict[bytes, int] = {}
        query, key, mask, visible = [], [], [], 0
        for tile, row in enumerate(rows):
            at = tuple(axis[:, None, None] for axis in np.unravel_index(np.maximum(row, 0), grid))
            # [query slots, key tiles, key slots]
            seen: Bools = np.asarray(self._seen(at, key_at, (len(row), *columns.shape)) & (columns >= 0))
            filled = seen[row >= 0]
            visible += int(filled.sum())
            visited = np.flatnonzero(filled.any((0, 2)))
            whole = np.atleast_1d(filled.all((0, 2)))
            packed = np.packbits(seen[:, visited].transpose(1, 0, 2).reshape(len(visited), -1), axis=1)
            query += [tile] * len(visited)
            key += visited.tolist()
            for bits, full in zip(packed, whole[visited], strict=True):
                mask.append(-1 if full else found.setdefault(bits.tobytes(), len(found)))
        query, key, mask = (np.array(numbers, np.int64) for numbers in (query, key, mask))
        return TilePairs(query, key, mask, _unpacked(found, queries, keys), visible)


def _grid_slots(tiling: Tiling) -> Ints:
    """The grid token of each slot, -1 where there is none: [grid tiles, slots]."""
    tokens = tiling.tokens[tiling.grid_tiles]
    return np.where(tokens >= 0, tokens - tiling.layout.prefix, -1)


def _unpacked(found: dict[bytes, int], queries: Tiling, keys: Tiling) -> Bools:
    """The distinct masks [masks, query slots, key slots] from their bits."""
    sides = queries.capacity, keys.capacity
    bits = np.frombuffer(b"".join(found), np.uint8).reshape(len(found), -(-math.prod(sides) // 8))
    return np.unpackbits(bits, axis=1, count=math.prod(sides)).astype(bool).reshape(len(found), *sides)
