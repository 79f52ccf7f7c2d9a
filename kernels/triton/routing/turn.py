"""The lists of key tiles: which query tiles chose their region."""

# What a kernel takes and returns exists on the GPU only: Python types would say nothing.
# ruff: noqa: ANN001, ANN201

# The language of Triton kernels is not quite Python.
# pyright: reportArgumentType=false, reportGeneralTypeIssues=false, reportAttributeAccessIssue=false, reportCallIssue=false, reportIndexIssue=false, reportOptionalMemberAccess=false, reportAssignmentType=false, reportOperatorIssue=false
from __future__ import annotations

import triton
import triton.language as tl

from visattn.kernels.triton.routing.choose import copy_static


@triton.jit
def turn_lists(
    choice, bounds, bases, mask_ids, fixed_bounds, row_tiles, regions_of, first, masks, fixed, fixed_masks,
    regions, chosen, skip, per, queries, rows, dense_rows, all_rows, length,
    WHOLE: tl.constexpr, ENTRIES: tl.constexpr, QUERIES: tl.constexpr, ROWS: tl.constexpr, COPY: tl.constexpr,
):  # fmt: skip
    """Lists of the key tiles of one region: the query tiles whose region chose it, in their order.

    Args:
        choice: The regions that each region sees: int32 [B, regions, chosen].
        bounds: Gets where the list of each row tile lies: int32 [B, row tiles, 4].
        bases: Gets the first token of each entry: int32 [B, length].
        mask_ids: Gets its mask.
        fixed_bounds: The bounds of dense rows, which do not depend on q and k, and dense visits of the others.
        row_tiles: The key tiles of each region: int32 [regions, rows].
        regions_of: The region of each query tile: int32 [queries].
        first: The first token of each query tile.
        masks: The mask of each query tile.
        fixed: Entries of the dense rows.
        fixed_masks: Their masks.
        regions: Regions.
        chosen: Regions that each one sees.
        skip: Entries of the dense rows.
        per: Query tiles of a region.
        queries: Query tiles.
        rows: Key tiles of a region.
        dense_rows: Row tiles of dense tokens, which come first.
        all_rows: Row tiles.
        length: Entries of a sample.
        WHOLE: Whether no query tile needs a mask.
        ENTRIES: Choices that are counted at once.
        QUERIES: Query tiles that are looked at at once.
        ROWS: A power of two of at least `rows`.
        COPY: Fixed entries that are copied at once.
    """
    region, sample = tl.program_id(0), tl.program_id(1).to(tl.int64)
    choice += sample * regions * chosen
    bounds += sample * all_rows * 4
    bases += sample * length
    mask_ids += sample * length
    copy_static(bases, mask_ids, fixed, fixed_masks, region, regions, skip, COPY)
    for start in range(region * COPY, dense_rows * 4, regions * COPY):
        i = start + tl.arange(0, COPY)
        tl.store(bounds + i, tl.load(fixed_bounds + i, mask=i < dense_rows * 4, other=0), mask=i < dense_rows * 4)
    before, own = 0, 0
    for start in range(0, regions * chosen, ENTRIES):
        i = start + tl.arange(0, ENTRIES)
        which = tl.load(choice + i, mask=i < regions * chosen, other=2**30)
        before += tl.sum((which < region).to(tl.int32), 0)
        own += tl.sum((which == region).to(tl.int32), 0)
    # Lists of a region's key tiles lie one behind the other, each as long as the number of query tiles that chose it.
    long = own * per
    t = tl.arange(0, ROWS)
    begin = skip + before * per * rows + t * long
    row = dense_rows + tl.load(row_tiles + region * rows + t, mask=t < rows, other=0)
    tl.store(bounds + row * 4, begin, mask=t < rows)
    tl.store(bounds + row * 4 + 1, begin + long if WHOLE else begin, mask=t < rows)
    tl.store(bounds + row * 4 + 2, begin + long, mask=t < rows)
    tl.store(bounds + row * 4 + 3, tl.load(fixed_bounds + row * 4 + 3, mask=t < rows, other=0), mask=t < rows)
    done = 0
    for start in range(0, queries, QUERIES):
        i = start + tl.arange(0, QUERIES)
        of = tl.load(regions_of + i, mask=i < queries, other=0)
        here = tl.zeros([QUERIES], tl.int32)
        for j in range(chosen):
            here += (tl.load(choice + of * chosen + j) == region).to(tl.int32)
        here = tl.where(i < queries, here, 0)
        place = done + tl.cumsum(here, 0) - here
        base, mask = tl.load(first + i, mask=i < queries, other=0), tl.load(masks + i, mask=i < queries, other=0)
        stored = (here > 0)[None, :] & (t < rows)[:, None]
        tl.store(bases + begin[:, None] + place[None, :], base[None, :], mask=stored)
        tl.store(mask_ids + begin[:, None] + place[None, :], mask[None, :], mask=stored)
        done += tl.sum(here, 0)
