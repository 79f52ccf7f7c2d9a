"""What a kernel reads of a tile plan: lists in launch order, packed masks, box offsets, on one device."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from visattn.keep import kept
from visattn.kernels.triton.config import LEAST_SLOTS
from visattn.kernels.triton.lists.halves import (
    ALONE,
    FIRST_FULL,
    MASKED,
    SECOND_FULL,
    SOME,
    Visits,
    halved,
    halves_of,
    slot_order,
)
from visattn.patterns.geometry import Bools
from visattn.plans import TileLists, TilePlan
from visattn.tiling import Ints, Tiling

# A mask word has 32 columns.
WORD = 32
# No bias index comes near: tokens without a place in the grid get no bias.
NOWHERE = -(2**29)


@dataclass(frozen=True, eq=False)
class Program:
    """A plan from the side of its row tiles (queries, or keys in the dK/dV kernel).

    Row tiles are in launch order: dense tokens first, then the grid's, longest list first. `rows` and `columns`
    are powers of two, so tiles of other sizes leave some slots empty.

    Attributes:
        rows: Slots of a row tile.
        columns: Slots of the column tiles of one step.
        tiles: Column tiles of one step.
        tokens: Token of each slot of a row tile, -1 if empty: int32 [row tiles, rows].
        bounds: Where the list of a row tile starts, turns partial and stops, and how many tiles of dense columns
            it visits: int32 [row tiles, 4].
        bases: First token of each listed column tile: int32 [entries].
        mask_ids: Mask of each listed column tile (0 where it needs none): int32 [entries].
        offsets: Token of each slot of a column box, minus the token of slot 0: int32 [columns].
        masks: Visible columns of each row slot, a bit each: int32 [masks, rows, words].
        dense_rows: Row tiles of dense tokens.
        dense_columns: Prefix and suffix column tiles.
        extra: Column tokens behind the layout's.
        full: Whether there is any list entry without mask.
        partial: Whether there is any list entry with mask.
        column_tiling: How the columns are cut.
        reach: Tokens between the first and the last slot of a whole box.
        bounds_batch: Distance of the bounds of two owners, 0 where all share one list.
        list_batch: Distance of the lists of two owners.
        groups: Groups of heads of a sample that have lists of their own, the owners.
        halves: Where visits need a mask for the second half of the rows only (from split to the first of these), are
            of one half only, in turns (from the second to the third), and need one for the first half only (from
            there to the end): int32 [row tiles, 4]; None where lists are not made for halves.
        words: Which query blocks of a query tile see each entry, a bit each: int64, like `bases`; None where all do.
        bits: With `words`, the bit of each slot of a query tile: int32.
    """

    rows: int
    columns: int
    tiles: int
    tokens: torch.Tensor
    bounds: torch.Tensor
    bases: torch.Tensor
    mask_ids: torch.Tensor
    offsets: torch.Tensor
    masks: torch.Tensor
    dense_rows: int
    dense_columns: tuple[int, int]
    extra: int
    full: bool
    partial: bool
    column_tiling: Tiling
    reach: int
    bounds_batch: int = 0
    list_batch: int = 0
    groups: int = 1
    halves: torch.Tensor | None = None
    words: torch.Tensor | None = None
    bits: torch.Tensor | None = None

    @property
    def row_tiles(self) -> int:
        """Number of row tiles."""
        return len(self.tokens)

    @property
    def own_lists(self) -> tuple[torch.Tensor, ...]:
        """The tensors that differ from call to call where q and k choose."""
        return self.bounds, self.bases, self.mask_ids, *(() if self.words is None else (self.words,))

    @property
    def has_dense(self) -> bool:
        """Whether any row visits dense columns."""
        return sum(self.dense_columns) + self.extra > 0

    @property
    def ragged(self) -> bool:
        """Whether a run of dense columns ends inside a step, so that what lies behind it has to be hidden."""
        layout = self.column_tiling.layout
        return any(length % self.columns for length in (layout.prefix, layout.suffix, self.extra))


@kept
def program(plan: TilePlan, by_keys: bool, per_step: int, device: torch.device, by_halves: bool = False) -> Program:
    """Prepare a plan for the kernels, once per plan, side and device.

    Args:
        plan: The plan.
        by_keys: Whether key tiles are the rows (dK/dV kernel) instead of query tiles.
        per_step: Column tiles that the kernel takes at once; full and partial lists are multiples of it.
        device: Where the tensors go.
        by_halves: Whether lists say what each half of a row tile has to do (see `halves`), where that saves anything.
    """
    if by_keys:
        rows, columns, lists, masks = plan.keys, plan.queries, plan.transposed, plan.masks.transpose(0, 2, 1)
    else:
        rows, columns, lists, masks = plan.queries, plan.keys, plan.lists, plan.masks
    row_slots, column_slots = _slots(rows.capacity), _slots(columns.capacity, per_step)
    visits, filled = _entries(rows, columns, lists, masks, column_slots)
    cut = _by_halves(rows, row_slots, visits, filled, per_step) if by_halves else None
    if cut is not None:
        slots, (row, column, mask_id, distinct), steps = cut
        counts, split = per_step * steps.sum(1), per_step * steps[:, 0]
    else:
        slots, (row, column, mask_id, distinct) = np.arange(row_slots), visits
        if per_step > 1:
            row, column, mask_id, distinct = _whole_steps(row, column, mask_id, distinct, per_step)
        order = np.lexsort((column, mask_id >= 0, row))
        row, column, mask_id = row[order], column[order], mask_id[order]
        counts, split = (np.bincount(r, minlength=rows.tiles) for r in (row, row[mask_id < 0]))
    partial = mask_id >= 0
    start = np.cumsum(counts) - counts
    bounds = np.stack(
        [start, start + split, start + counts, _dense_visits(rows, columns, per_step, plan.pattern.dense_pairs)], 1
    )
    launch = _launch_order(rows, counts)
    tokens = np.full((rows.tiles, row_slots), -1)
    tokens[:, : rows.capacity] = rows.tokens[launch]
    return Program(
        rows=row_slots,
        columns=per_step * column_slots,
        tiles=per_step,
        tokens=int32_table(tokens[:, slots], device),
        bounds=int32_table(bounds[launch], device),
        bases=int32_table(first_tokens(columns)[column] if len(column) else np.zeros(1), device),
        mask_ids=int32_table(np.maximum(mask_id, 0) if len(mask_id) else np.zeros(1), device),
        offsets=int32_table(box_offsets(columns), device),
        masks=int32_table(pack(distinct, row_slots, column_slots), device),
        dense_rows=rows.tiles - rows.runs[1],
        dense_columns=_dense_steps(columns, per_step)[:2],
        extra=columns.extra,
        full=bool((~partial).any()),
        partial=bool(partial.any()),
        column_tiling=columns,
        reach=int(box_offsets(columns).max()),
        halves=None if cut is None else int32_table(_ends(start, per_step * cut[2])[launch], device),
    )


def _by_halves(
    rows: Tiling, slots: int, visits: Visits, filled: Bools, per_step: int
) -> tuple[Ints, Visits, Ints] | None:
    """Order of row slots, visits in the order of lists and steps of each kind; None where halves save nothing."""
    seen = np.zeros((len(filled), slots, visits.masks.shape[2]), bool)
    seen[:, : rows.capacity] = visits.masks
    there = np.zeros((len(filled), slots), bool)
    there[:, : rows.capacity] = filled
    order = slot_order(rows, slots, seen, there, np.bincount(visits.mask[visits.mask >= 0], minlength=len(filled)))
    seen, there = seen[:, order], there[:, order]
    kinds = halves_of(seen, there)
    if not (kinds != SOME).any():
        return None
    found, steps = halved(visits._replace(masks=seen), kinds, rows.tiles, per_step)
    return (order, found, steps) if steps[:, [FIRST_FULL, ALONE, SECOND_FULL]].any() else None


def _ends(start: Ints, entries: Ints) -> Ints:
    """Where the kinds of visits of `halves` end, but for the first and the last: [row tiles, 4]."""
    ends = start[:, None] + np.cumsum(entries, 1)
    return np.stack([ends[:, FIRST_FULL], ends[:, MASKED], ends[:, ALONE], ends[:, SECOND_FULL]], 1)


def _slots(capacity: int, per_step: int = 1) -> int:
    """Slots of a tile in a kernel, of which so many are a step: a power of two.

    A step has at least 16, the smallest side of a matrix product.
    """
    return max(16 if per_step == 1 else LEAST_SLOTS, 1 << (capacity - 1).bit_length())


def int32_table(array: np.ndarray, device: torch.device) -> torch.Tensor:
    """An array of whole numbers on a device as kernels read it: int32, contiguous."""
    return torch.from_numpy(np.ascontiguousarray(array, np.int32)).to(device)


def _entries(rows: Tiling, columns: Tiling, lists: TileLists, masks: Bools, column_tile: int) -> tuple[Visits, Bools]:
    """The visits of grid columns, and which row slots hold tokens under each of their masks: [masks, row slots].

    A column tile has `column_tile` slots.

    Dense columns are left out: the kernels walk them without a list. A mask is False in empty column slots and
    does not care about empty row slots, whose results are never stored.
    """
    row, column, mask = lists.rows, lists.tile, lists.mask
    grid = (column >= columns.grid_tiles.start) & (column < columns.grid_tiles.stop)
    row, column, mask = row[grid], column[grid], mask[grid]
    row_kind, row_slots = fill_kinds(rows)
    column_kind, column_slots = fill_kinds(columns)
    code = ((mask + 1) * len(row_slots) + row_kind[row]) * len(column_slots) + column_kind[column]
    kinds, which = np.unique(code, return_inverse=True)
    rest, of_column = np.divmod(kinds, len(column_slots))
    of_mask, of_row = np.divmod(rest, len(row_slots))
    everything = np.ones((1, rows.capacity, columns.capacity), bool)
    seen = np.concatenate([everything, masks])[of_mask] & column_slots[of_column][:, None, :]
    padded = columns.capacity != column_tile
    is_full = (seen | ~row_slots[of_row][:, :, None]).all((1, 2)) & (not padded)
    index = np.where(is_full, -1, np.cumsum(~is_full) - 1)
    return Visits(row, column, index[which.ravel()], seen[~is_full]), row_slots[of_row][~is_full]


def fill_kinds(tiling: Tiling) -> tuple[Ints, Bools]:
    """Which slots hold tokens: a kind per tile, and the slots of each kind."""
    filled, kind = np.unique(tiling.tokens >= 0, axis=0, return_inverse=True)
    return kind.ravel(), filled


def _whole_steps(row: Ints, column: Ints, mask: Ints, masks: Bools, per_step: int) -> Visits:
    """Lists in which the full and the partial visits of each row are multiples of `per_step`.

    What is left over of the full visits becomes partial, with a mask that shows everything; the partial visits
    are filled up with repeated ones under a mask that shows nothing.
    """
    everything, nothing = np.ones((1, *masks.shape[1:]), bool), np.zeros((1, *masks.shape[1:]), bool)
    order = np.lexsort((column, mask >= 0, row))
    row, column, mask = row[order], column[order], mask[order]
    number = int(row.max(initial=-1)) + 1
    counts, full = np.bincount(row, minlength=number), np.bincount(row[mask < 0], minlength=number)
    place = np.arange(len(row)) - np.repeat(np.cumsum(counts) - counts, counts)
    whole = full - full % per_step
    mask = np.where((mask < 0) & (place >= whole[row]), len(masks), mask)
    missing = -(counts - whole) % per_step
    filler = np.repeat(np.arange(number), missing)
    last = np.cumsum(counts) - 1
    return Visits(
        np.concatenate([row, filler]),
        np.concatenate([column, column[last[filler]]]),
        np.concatenate([mask, np.full(len(filler), len(masks) + 1)]),
        np.concatenate([masks, everything, nothing]),
    )


def _dense_steps(columns: Tiling, per_step: int) -> tuple[int, int, int]:
    """Steps over the prefix, suffix and extra columns; a run of dense tokens has no box, so a step is one run."""
    slots = per_step * _slots(columns.capacity, per_step)
    prefix, suffix, extra = (-(-n // slots) for n in (columns.layout.prefix, columns.layout.suffix, columns.extra))
    return prefix, suffix, extra


def _dense_visits(rows: Tiling, columns: Tiling, per_step: int, joined: bool) -> Ints:
    """Dense steps of each row tile: prefix and suffix; extra ones too if the row tile is of the grid.

    Without `joined` dense rows have none.
    """
    prefix, suffix, extra = _dense_steps(columns, per_step)
    visits = np.full(rows.tiles, prefix + suffix if joined else 0)
    visits[rows.grid_tiles] = prefix + suffix
    visits[rows.grid_tiles] += extra
    # Extra keys (as rows) are seen by the grid only.
    visits[rows.tiles - rows.runs[3] :] = 0
    return visits


def _launch_order(rows: Tiling, counts: Ints) -> Ints:
    """Dense row tiles first; a stable sort keeps neighbours together among rows of equal length."""
    grid = np.arange(rows.grid_tiles.start, rows.grid_tiles.stop)
    dense = np.setdiff1d(np.arange(rows.tiles), grid)
    return np.concatenate([dense, grid[np.argsort(-counts[grid], kind="stable")]])


def slot_sums(tiling: Tiling, weights: tuple[int, ...]) -> Ints:
    """Weighted sum of the slot coordinates of a box: [slots], 0 in slots that pad it to a power of two."""
    total = np.zeros(1, np.int64)
    for size, weight in zip(tiling.shape, weights, strict=True):
        total = (total[:, None] + np.arange(size) * weight).ravel()
    return np.concatenate([total, np.zeros(_slots(tiling.capacity) - tiling.capacity, np.int64)])


def first_tokens(tiling: Tiling) -> Ints:
    """First token of each tile; of a tile without any, token 0, which its mask hides."""
    return np.maximum(tiling.tokens[:, 0], 0)


def box_offsets(tiling: Tiling) -> Ints:
    """Token of each slot of a whole box, relative to its first token."""
    grid = tiling.layout.grid
    strides = [int(np.prod(grid[i + 1 :])) for i in range(len(grid))]
    return slot_sums(tiling, tuple(s * step for s, step in zip(strides, tiling.step, strict=True)))


def pack(masks: Bools, rows: int, columns: int) -> NDArray[np.int32]:
    """Masks as bits: int32 [max(1, masks), rows, words]; bit j of word w is column 32 * w + j."""
    words = -(-columns // WORD)
    padded = np.zeros((max(1, len(masks)), rows, words * WORD), bool)
    padded[: len(masks), : masks.shape[1], : masks.shape[2]] = masks
    return np.packbits(padded, axis=-1, bitorder="little").view("<i4")
