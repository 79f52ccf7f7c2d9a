"""The measured rule: what a set of problems costs, and which query tile is cheapest."""

from __future__ import annotations

import itertools
import math
from typing import NamedTuple

from visattn.kernels.tiles.boxes import AxisKinds, axis_kinds
from visattn.patterns.geometry import Spans

# In pairs of tokens that dense SDPA computes in the same time, per head (docs/cpu-engine.md has the measurement).
# A tile of T queries takes PAIR + PER_TILE / T for each of its T * L pairs, ...
PAIR, PER_TILE = 1.3, 13.0
# ... and moving one token costs KEY (key and value gathered) or QUERY (query gathered, output put back).
KEY, QUERY = 20.0, 5.0
# Problems of one shape in a batch are some operator calls, here in milliseconds: few where the batches were kept from
# an earlier call, a dozen where key masks or biases make them anew.
KEPT_MS, BATCH_MS = 0.04, 0.25
# What a call takes besides, in milliseconds, ...
CALL_MS = 0.15
# ... and one that chooses its lists.
ROUTE_MS = 1.0
# Keys of such lists move in whole tiles, most of which need no mask, ...
ROUTED_PAIR, KEY_OF_TILE = 1.1, 10.0
# ... unless rows of a tile see different keys of it, whose masks are made anew, in channels of a pair, ...
ROWS_PAIR = 110.0
# ... but choosing, and putting keys and values in the order of their tiles, takes this for each token, ...
TOKEN = 200.0
# ... and more where what is not listed is pooled.
POOLED_TOKEN = 150.0
# KEPT_MS as pairs per head for 4 heads of 64 channels, for choosing a tile before the heads are known.
CLASS_PAIRS = 3300.0
LARGEST_TILE = 1024


def problem_cost(queries: float, keys: float) -> float:
    """Pairs that one problem of so many queries and keys costs, per head."""
    return keys * (PAIR * queries + PER_TILE + KEY) + QUERY * queries


def routed_cost(queries: float, keys: float, rows: float = 0.0) -> float:
    """The same where whole key tiles of a list that q and k choose are moved; besides, tokens cost `token_cost`.

    Args:
        queries: Of the problem.
        keys: Of it.
        rows: What a pair costs more where rows of a tile see different keys of it.
    """
    return keys * ((ROUTED_PAIR + rows) * queries + PER_TILE + KEY_OF_TILE) + QUERY * queries


def token_cost(tokens: float, pools: bool) -> float:
    """Pairs that so many tokens of a call cost that chooses its lists, per head; `pools` what it does not list."""
    return tokens * (TOKEN + pools * POOLED_TOKEN)


def choose_axes(spans: list[Spans], dense: int) -> list[AxisKinds]:
    """The tiles of each axis for the cheapest query tile.

    Args:
        spans: The keys of each query, per axis.
        dense: Dense and pooled keys that every tile sees besides.
    """
    options = [[axis_kinds(axis, size) for size in _sizes(axis)] for axis in spans]
    sums = [[_Sums.of(kinds) for kinds in axis] for axis in options]
    picks = itertools.product(*(range(len(axis)) for axis in options))
    best = min(picks, key=lambda pick: _cost([sums[i][j] for i, j in enumerate(pick)], dense))
    return [options[i][j] for i, j in enumerate(best)]


def _sizes(axis: Spans) -> list[int]:
    """Sides to try: powers of two, and multiples of the number of queries that share a window."""
    members = -(-axis.length // axis.step)
    sizes = {2**i for i in range(6)} | {n * i for n in _strides(axis) for i in (1, 2)} | {min(members, 64)}
    return sorted(size for size in sizes if size <= min(members, 64))


def _strides(axis: Spans) -> set[int]:
    """Lengths of the runs of neighbouring queries (of one dilation group) that see the same keys."""
    start, stop = axis.start[:: axis.step], axis.stop[:: axis.step]
    change = ((start[1:] != start[:-1]) | (stop[1:] != stop[:-1])).nonzero()[0] + 1
    return {int(b - a) for a, b in itertools.pairwise(change) if b - a > 1}


class _Sums(NamedTuple):
    """Sums over the tiles of one axis; those of a grid are their products over the axes."""

    pairs: int
    keys: int
    queries: int
    tiles: int
    classes: int
    largest: int

    @classmethod
    def of(cls, kinds: AxisKinds) -> _Sums:
        """The sums of an axis cut like this."""
        tiles, queries, keys = kinds.tiles, kinds.queries, kinds.keys
        return cls(
            pairs=int((tiles * queries * keys).sum()),
            keys=int(tiles @ keys),
            queries=int(tiles @ queries),
            tiles=int(tiles.sum()),
            classes=len(tiles),
            largest=int(queries.max()),
        )


def _cost(axes: list[_Sums], dense: int) -> float:
    """Pairs that a grid whose axes are cut like this costs, per head: `problem_cost` summed over its tiles."""
    pairs, keys, queries, tiles, classes, largest = (math.prod(values) for values in zip(*axes, strict=True))
    if largest > LARGEST_TILE:
        return math.inf
    moved = (PER_TILE + KEY) * (keys + dense * tiles) + QUERY * queries
    return PAIR * (pairs + dense * queries) + moved + CLASS_PAIRS * classes
