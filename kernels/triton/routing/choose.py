"""The regions that each region sees, and the lists of its query tiles."""

# What a kernel takes and returns exists on the GPU only: Python types would say nothing.
# ruff: noqa: ANN001, ANN202, ANN201

# The language of Triton kernels is not quite Python.
# pyright: reportArgumentType=false, reportGeneralTypeIssues=false, reportAttributeAccessIssue=false, reportCallIssue=false, reportIndexIssue=false, reportOptionalMemberAccess=false, reportAssignmentType=false, reportOperatorIssue=false
from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _entries(
    bases, mask_ids, lists, j, region, best, chosen, skip, per, rows,
    PER: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Write the tiles of the j-th chosen region into the list of each query tile of a region."""
    row_tiles, first, masks = lists
    t, u = tl.arange(0, PER), tl.arange(0, ROWS)
    row = tl.load(row_tiles + region * rows + u, mask=u < rows, other=0)
    base = tl.load(first + best * per + t, mask=t < per, other=0)
    mask = tl.load(masks + best * per + t, mask=t < per, other=0)
    place = skip + (row[:, None] * chosen + j) * per + t[None, :]
    here = (u < rows)[:, None] & (t < per)[None, :]
    tl.store(bases + place, base[None, :], mask=here)
    tl.store(mask_ids + place, mask[None, :], mask=here)


@triton.jit
def copy_static(bases, mask_ids, fixed, fixed_masks, region, regions, skip, COPY: tl.constexpr):
    """A share of the lists that do not depend on q and k, which every sample has in front of its own."""
    for start in range(region * COPY, skip, regions * COPY):
        i = start + tl.arange(0, COPY)
        tl.store(bases + i, tl.load(fixed + i, mask=i < skip, other=0), mask=i < skip)
        tl.store(mask_ids + i, tl.load(fixed_masks + i, mask=i < skip, other=0), mask=i < skip)


@triton.jit
def choose_regions(
    products, choice, bases, mask_ids, row_tiles, first, masks, fixed, fixed_masks,
    heads, regions, chosen, skip, per, rows, length,
    CHOOSE: tl.constexpr, HEADS: tl.constexpr, BLOCK_REGIONS: tl.constexpr, PER: tl.constexpr, ROWS: tl.constexpr,
    COPY: tl.constexpr,
):  # fmt: skip
    """The regions with the largest products for one region, best first, ties to the lower index; and its lists.

    `choice` is int32 [B, regions, chosen], read instead of written without CHOOSE; a sample's lists have `length`
    entries.
    """
    region, sample = tl.program_id(0), tl.program_id(1).to(tl.int64)
    choice += (sample * regions + region) * chosen
    bases += sample * length
    mask_ids += sample * length
    copy_static(bases, mask_ids, fixed, fixed_masks, region, regions, skip, COPY)
    lists = row_tiles, first, masks
    if CHOOSE:
        h, c = tl.arange(0, HEADS), tl.arange(0, BLOCK_REGIONS)
        place = products + ((sample * heads + h)[:, None] * regions + region) * regions + c[None, :]
        score = tl.sum(tl.load(place, mask=(h < heads)[:, None] & (c < regions)[None, :], other=0.0), 0)
        # Whatever the products are, every region can be chosen, and none twice.
        score = tl.where(score != score, float("inf"), tl.maximum(score, -3.0e38))
        score = tl.where(c < regions, score, float("-inf"))
        for j in range(chosen):
            best = tl.argmax(score, 0, tie_break_left=True)
            score = tl.where(c == best, float("-inf"), score)
            tl.store(choice + j, best)
            _entries(bases, mask_ids, lists, j, region, best, chosen, skip, per, rows, PER, ROWS)
    else:
        for j in range(chosen):
            best = tl.load(choice + j)
            _entries(bases, mask_ids, lists, j, region, best, chosen, skip, per, rows, PER, ROWS)
