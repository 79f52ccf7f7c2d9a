"""Lists of query tiles from the key blocks that their blocks list: whole tiles first, in whole steps of a kernel."""

# What a kernel takes and returns exists on the GPU only: Python types would say nothing.
# ruff: noqa: ANN001, ANN201

# The language of Triton kernels is not quite Python.
# pyright: reportArgumentType=false, reportGeneralTypeIssues=false, reportAttributeAccessIssue=false, reportCallIssue=false, reportIndexIssue=false, reportOptionalMemberAccess=false, reportAssignmentType=false, reportOperatorIssue=false
from __future__ import annotations

import triton
import triton.language as tl

from visattn.kernels.triton.routing.choose import copy_static


@triton.jit(do_not_specialize=["filler", "nothing", "everything"])
def write_lists(
    choice, counts, bounds, bases, mask_ids, fixed_bounds, fixed, fixed_masks, row_blocks, first, masks,
    blocks, number, per, dense_rows, grid_rows, skip, entries, filler, everything, nothing,
    COUNTED: tl.constexpr, ENTRIES: tl.constexpr, STEP: tl.constexpr, COPY: tl.constexpr,
):  # fmt: skip
    """The list of one row tile of one owner, and its bounds; a share of the lists that all owners have in common.

    All owners' lists lie in one array, behind `skip` common entries, `entries` for each grid row of each owner. A list
    has at least one step, so that none is empty.

    Args:
        choice: Key blocks that each query block lists: int32 [owners, blocks, number].
        counts: How many of them count: int32 [owners, blocks]; all without COUNTED.
        bounds: Where lists start, turn partial and stop, and their dense steps: int32 [owners, row tiles, 4].
        bases: First token of each entry.
        mask_ids: Mask of each entry.
        fixed_bounds: Bounds of one owner without its lists.
        fixed: First tokens of the common entries.
        fixed_masks: Masks of the common entries.
        row_blocks: Block of each grid row: int32 [grid rows].
        first: First token of each tile of each key block, -1 where it has fewer: int32 [key blocks, per].
        masks: Mask of each of these, -1 for tiles that need none.
        blocks: Query blocks.
        number: Key blocks of a list of the choice.
        per: Tiles of a key block.
        dense_rows: Row tiles in front of the grid's.
        grid_rows: Row tiles of the grid.
        skip: Common entries.
        entries: Entries that a list has room for.
        filler: First token of what fills up the last step.
        everything: Mask that hides nothing.
        nothing: Mask that hides everything.
        COUNTED: Whether lists have counts.
        ENTRIES: A power of two that is at least `entries`.
        STEP: Column tiles of one step of the kernel.
        COPY: Common entries that are copied at once.
    """
    row, owner = tl.program_id(0), tl.program_id(1).to(tl.int64)
    rows = dense_rows + grid_rows
    if owner == 0:
        copy_static(bases, mask_ids, fixed, fixed_masks, row, rows, skip, COPY)
    f = tl.arange(0, 4)
    fixed_bound = tl.load(fixed_bounds + row * 4 + f)
    if row < dense_rows:
        tl.store(bounds + (owner * rows + row) * 4 + f, fixed_bound)
    else:
        grid_row = row - dense_rows
        list_at = owner * blocks + tl.load(row_blocks + grid_row)
        count = tl.load(counts + list_at) if COUNTED else number
        i = tl.arange(0, ENTRIES)
        entry = i // per
        listed = entry < count
        tile = tl.load(choice + list_at * number + entry, mask=listed, other=0) * per + i % per
        base = tl.load(first + tile, mask=listed, other=-1)
        mask = tl.load(masks + tile, mask=listed, other=0)
        whole = (base >= 0) & (mask < 0)
        partial = (base >= 0) & (mask >= 0)
        wholes = tl.sum(whole.to(tl.int32), 0)
        total = wholes + tl.sum(partial.to(tl.int32), 0)
        place = tl.where(whole, tl.cumsum(whole.to(tl.int32), 0), wholes + tl.cumsum(partial.to(tl.int32), 0)) - 1
        start = skip + (owner * grid_rows + grid_row) * entries
        tl.store(bases + start + place, base, mask=whole | partial)
        # Whole tiles that fill no step go with the partial ones.
        tl.store(mask_ids + start + place, tl.where(whole, everything, mask), mask=whole | partial)
        stop = tl.maximum((total + STEP - 1) // STEP, 1) * STEP
        s = total + tl.arange(0, STEP)
        tl.store(bases + start + s, filler + tl.zeros_like(s), mask=s < stop)
        tl.store(mask_ids + start + s, nothing + tl.zeros_like(s), mask=s < stop)
        split = wholes - wholes % STEP
        bound = tl.where(f == 0, 0, tl.where(f == 1, split, stop)) + start.to(tl.int32)
        tl.store(bounds + (owner * rows + row) * 4 + f, tl.where(f < 3, bound, fixed_bound))
