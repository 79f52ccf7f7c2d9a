"""Which boxes of the grid are the query and key tiles of a kernel."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from functools import lru_cache

import numpy as np

from visattn.keep import kept
from visattn.layout import Layout
from visattn.patterns import ListedPattern, Pattern, SpannedPattern
from visattn.patterns.geometry import Spans, product_pairs
from visattn.plans import TilePlan, plan
from visattn.tiling import Tiling, box_shape

# Time of a visit with mask over one without (NATTEN's published figures imply 1.5 to 2 on an H100).
PARTIAL = 1.4
# Time of a visit that one half of the rows leaves out, over that of the half: whole steps of such visits come seldom.
LEFT_OUT = 0.3
# Which tiles a kernel cuts in halves that leave visits out on their own.
QUERY_HALVES, KEY_HALVES = "query", "key"

Box = tuple[int, ...]


@kept
def tiled(pattern: Pattern, layout: Layout, query_slots: int, key_slots: int, halves: str | None = None) -> TilePlan:
    """The plan of a pattern with tiles of at most these sizes.

    For patterns that are one interval of keys per axis, the boxes with the least work; for others the pattern's
    own choice. Query and key boxes may differ. `halves` says which tiles the kernel cuts in halves.
    """
    assert isinstance(pattern, ListedPattern)
    if isinstance(pattern, SpannedPattern):
        return plan(pattern, layout, best_boxes(pattern.spans(*layout.grids), query_slots, key_slots, halves))
    grid, key_grid = (pattern.tiled_layout(side).grid for side in (layout.queries, layout.keys))
    boxes = _own_box(pattern, grid, query_slots, False), _own_box(pattern, key_grid, key_slots, True)
    return plan(pattern, layout, boxes)


def _own_box(pattern: ListedPattern, grid: Box, slots: int, keys: bool) -> Box:
    """The pattern's choice where it has at most `slots` tokens, else a cube-like box."""
    for volume in (slots, slots // 2):
        box = pattern.side_tile(grid, volume, keys)
        if math.prod(box) <= slots:
            return box
    return box_shape(grid, slots)


def best_boxes(spans: list[Spans], query_slots: int, key_slots: int, halves: str | None = None) -> tuple[Box, Box]:
    """The query and key boxes of these volumes that make the least work on the grids of these spans."""
    best, found = math.inf, None
    for query in _boxes(tuple(axis.length for axis in spans), query_slots):
        for key in _boxes(tuple(axis.key_length for axis in spans), key_slots):
            work = _work(spans, query, key) if halves is None else _halved_work(spans, query, key, halves)
            # Of equal work take the squarest boxes: their keys are nearest in memory and cache.
            work *= 1 + 1e-6 * (max(query) + max(key))
            if work < best:
                best, found = work, (query, key)
    assert found is not None
    return found


def _work(spans: list[Spans], query: Box, key: Box) -> float:
    visits, full = _visits(spans, query, key)
    return full + PARTIAL * (visits - full)


def _halved_work(spans: list[Spans], query: Box, key: Box, halves: str) -> float:
    """The work where tiles of one side are cut in halves along the best axis, in visits of whole tiles."""
    whole, _ = _visits(spans, query, key)
    least = _work(spans, query, key)
    cut = query if halves == QUERY_HALVES else key
    for axis, side in enumerate(cut):
        if side % 2 == 0:
            half = (*cut[:axis], side // 2, *cut[axis + 1 :])
            boxes = (half, key) if halves == QUERY_HALVES else (query, half)
            visits, _ = _visits(spans, *boxes)
            least = min(least, (_work(spans, *boxes) + LEFT_OUT * max(0, 2 * whole - visits)) / 2)
    return least


def _visits(spans: list[Spans], query: Box, key: Box) -> tuple[int, int]:
    """Visits with these boxes, and how many of them need no mask."""
    visits = full = 1
    for axis, q_side, k_side in zip(spans, query, key, strict=True):
        visits_here, full_here = _axis_visits(axis, q_side, k_side)
        visits, full = visits * visits_here, full * full_here
    return visits, full


def _boxes(grid: Box, volume: int) -> Iterator[Box]:
    """Boxes of `volume` slots whose sides are powers of two, at most the next one of the axis.

    The last axis takes what does not fit, so that there is always a box.
    """
    sides = [[1 << e for e in range((n - 1).bit_length() + 1) if 1 << e <= volume] for n in grid]
    found = [box for box in itertools.product(*sides) if math.prod(box) == volume]
    if found:
        yield from found
        return
    longest = [s[-1] for s in sides[:-1]]
    yield *longest, volume // math.prod(longest)


def _axis_visits(spans: Spans, query_side: int, key_side: int) -> tuple[int, int]:
    """Visits of one axis cut in tiles, and how many of them need no mask."""
    key = (spans.start.tobytes(), spans.stop.tobytes(), spans.step, spans.key_length, spans.circular)
    return _counted(*key, query_side, key_side)


@lru_cache(maxsize=4096)
def _counted(
    start: bytes, stop: bytes, step: int, keys: int, circular: bool, query_side: int, key_side: int
) -> tuple[int, int]:
    spans = Spans(np.frombuffer(start, np.int64), np.frombuffer(stop, np.int64), step, keys, circular)
    sides = ((spans.length, query_side), (keys, key_side))
    pairs = product_pairs([spans], *(Tiling(Layout(n), (side,), (step,)) for n, side in sides))
    return len(pairs.mask), int((pairs.mask < 0).sum())
