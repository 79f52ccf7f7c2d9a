"""Lists for kernels whose two groups of warps hold half of a row tile each: what each half has to do with a visit.

Of a visit that has a mask, one half may see everything, so that it needs no mask, or nothing, so that it can leave the
visit out. Row tiles are cut in halves along the axis of their box for which that saves most.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from visattn.kernels.triton.boxes import PARTIAL
from visattn.patterns.geometry import Bools
from visattn.tiling import Ints, Tiling

# What a half sees of a visited column tile.
NOTHING, SOME, ALL = 0, 1, 2
# Kinds of visits in the order of a list: no half needs a mask; the first half needs none; both need one; one half sees
# nothing (these are steps of the first half and of the second in turns); the second half needs none.
FULL, FIRST_FULL, MASKED, ALONE, SECOND_FULL = range(5)
KINDS = 5


class Visits(NamedTuple):
    """Visits of grid columns: row, column and mask of each (-1 for none), and the distinct masks."""

    row: Ints
    column: Ints
    mask: Ints
    masks: Bools


class Halved(NamedTuple):
    """Visits in the order of lists, and the steps of each kind in the list of each row: [rows, KINDS]."""

    visits: Visits
    steps: Ints


def slot_order(rows: Tiling, slots: int, seen: Bools, filled: Bools, counts: Ints) -> Ints:
    """The order of the slots of a row tile in which its halves have the least work: [slots].

    Args:
        rows: How rows are cut.
        slots: Slots of a row tile in a kernel.
        seen: What masks show: bool [masks, row slots, column slots].
        filled: Which row slots hold tokens: bool [masks, row slots].
        counts: How often each mask occurs: [masks].
    """
    best = np.arange(slots)
    if rows.capacity != slots or not len(seen):
        return best
    least = _work(seen, filled, counts, best)
    for side, position in zip(rows.shape, np.indices(rows.shape).reshape(len(rows.shape), -1), strict=True):
        order = np.argsort(position >= side // 2, kind="stable")
        if side % 2 == 0 and (work := _work(seen, filled, counts, order)) < least:
            best, least = order, work
    return best


def _work(seen: Bools, filled: Bools, counts: Ints, order: Ints) -> float:
    """Work of the halves in units of a visit without mask."""
    kinds = halves_of(seen[:, order], filled[:, order])
    return float((np.array([0, PARTIAL, 1])[kinds] * counts[:, None]).sum())


def halves_of(seen: Bools, filled: Bools) -> Ints:
    """What each half of the rows sees under each mask, `NOTHING`, `SOME` or `ALL`: [masks, 2].

    Rows without a token see what one likes.
    """
    number, slots, columns = seen.shape
    seen, filled = seen.reshape(number, 2, slots // 2, columns), filled.reshape(number, 2, slots // 2, 1)
    everything, nothing = (seen | ~filled).all((2, 3)), ~(seen & filled).any((2, 3))
    return np.where(nothing, NOTHING, np.where(everything, ALL, SOME))


def halved(visits: Visits, kinds: Ints, number: int, per_step: int) -> Halved:
    """Order visits by their kind, in whole steps.

    What is left over of a kind is masked for both halves. Steps of one half come in pairs, one of each half, and never
    first in a list: so no half leaves out two steps in a row, nor the first one.

    Args:
        visits: The visits.
        kinds: What each half sees under each mask: [masks, 2].
        number: Row tiles.
        per_step: Column tiles of a step.
    """
    row, column, mask, masks = visits
    first, second = np.concatenate([kinds, [[ALL, ALL]]])[mask].T
    kind = np.full(len(row), MASKED)
    kind[(first == ALL) & (second == SOME)] = FIRST_FULL
    kind[(first == SOME) & (second == ALL)] = SECOND_FULL
    kind[mask < 0] = FULL
    # Those of the second half apart from those of the first, for now.
    kind[(first != NOTHING) & (second == NOTHING)] = ALONE
    kind[(first == NOTHING) & (second != NOTHING)] = KINDS
    steps = np.zeros((number, KINDS + 1), np.int64)
    np.add.at(steps, (row, kind), 1)
    total = steps.sum(1)
    steps //= per_step
    steps[:, ALONE] = steps[:, KINDS] = np.minimum(steps[:, ALONE], steps[:, KINDS])
    before = steps[:, FULL] + steps[:, FIRST_FULL] + steps[:, MASKED]
    steps[:, [ALONE, KINDS]] -= ((before == 0) & (steps[:, ALONE] > 0))[:, None]

    order = np.lexsort((column, kind, row))
    row, column, mask, kind = row[order], column[order], mask[order], kind[order]
    group = row * (KINDS + 1) + kind
    place = np.arange(len(row)) - np.searchsorted(group, group)
    steps[:, MASKED] = 0
    left = place >= steps[row, kind] * per_step
    mask = np.where(left & (mask < 0), len(masks), mask)
    kind = np.where(left, MASKED, kind)
    rest = total - per_step * steps.sum(1)
    steps[:, MASKED] = -(-rest // per_step)
    # Steps of both kinds that one half sees, in turns.
    turn = np.where(kind == ALONE, 2 * (place // per_step), np.where(kind == KINDS, 2 * (place // per_step) + 1, 0))
    kind = np.where(kind == KINDS, ALONE, kind)
    # Filled up under a mask that shows nothing.
    filler = np.repeat(np.arange(number), per_step * steps[:, MASKED] - rest)
    last = np.zeros(number, np.int64)
    last[row] = column
    row, column = np.concatenate([row, filler]), np.concatenate([column, last[filler]])
    mask = np.concatenate([mask, np.full(len(filler), len(masks) + 1)])
    kind, turn = np.concatenate([kind, np.full(len(filler), MASKED)]), np.concatenate([turn, np.zeros_like(filler)])
    order = np.lexsort((column, turn, kind, row))
    shape = (1, *masks.shape[1:])
    more = np.concatenate([masks, np.ones(shape, bool), np.zeros(shape, bool)])
    steps[:, ALONE] += steps[:, KINDS]
    return Halved(Visits(row[order], column[order], mask[order], more), steps[:, :KINDS])
