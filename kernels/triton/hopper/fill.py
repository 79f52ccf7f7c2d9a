"""The warps that fill rings of the Hopper kernels with what is too small or too scattered for copies.

A column tile's slot gets the first values of its scores: 0 and -inf by the key mask where keys are the columns, the
softmax statistics of its queries where queries are. Products add to them, so that neither costs the groups of warps
that multiply any registers or instructions.
"""

# What a kernel takes and returns exists on the GPU only: Python types would say nothing.
# ruff: noqa: ANN001, ANN201, ANN202

# The language of Triton kernels is not quite Python.
# pyright: reportArgumentType=false, reportGeneralTypeIssues=false, reportAttributeAccessIssue=false, reportCallIssue=false, reportIndexIssue=false, reportOptionalMemberAccess=false, reportAssignmentType=false, reportOperatorIssue=false
from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from visattn.kernels.triton.hopper.jobs import finish_job, next_job
from visattn.kernels.triton.hopper.parts import dense_run, following


@gluon.jit
def _put_mask(key_mask, token, inside, visible, ready, free, slot, phase):
    """Fill a slot with what the scores of its keys begin with: 0, and -inf where a key is masked."""
    kept = gl.load(key_mask + token, mask=inside, other=0)
    mbarrier.wait(free.index(slot), phase)
    visible.index(slot).store(gl.where(kept != 0, 0.0, float("-inf")))
    mbarrier.arrive(ready.index(slot), count=1)


@gluon.jit
def put_masks(key_mask, bases, offsets, shared, jobs, runs, heads, key_length, SIZES: gl.constexpr):
    """The forward's warp for the key mask, idle without one."""
    KEY_MASK: gl.constexpr = SIZES[6]
    ring = (shared[7], shared[2], shared[3])
    if KEY_MASK:
        number = 0
        slot = 0
        phase = 1
        where = next_job(jobs, number, 1)
        while where[0] >= 0:
            finish_job(jobs, number)
            own = key_mask + (where[1] // heads).to(gl.int64) * key_length
            slot, phase = put_tile_masks(
                own, bases, offsets, ring, (where[2], where[4], where[5]), runs, key_length, slot, phase,
                SIZES[2], SIZES[3], SIZES[4],
            )  # fmt: skip
            number += 1
            where = next_job(jobs, number, 1)


@gluon.jit
def put_tile_masks(
    key_mask, bases, offsets, ring, where, runs, key_length, slot, phase,
    COLUMNS: gl.constexpr, TILES: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """The mask of the listed column tiles, then of the runs of dense tokens; the slot and phase that follow."""
    visible, ready, free = ring
    start, stop, dense = where
    prefix_tiles, suffix_tiles, prefix, suffix_start, suffix, extra = runs
    layout: gl.constexpr = gl.BlockedLayout([COLUMNS // 32], [32], [1], [0])
    slots = gl.arange(0, COLUMNS, layout)
    offset = gl.load(offsets + slots % (COLUMNS // TILES))
    for i in range(start, stop, TILES):
        token = gl.load(bases + i + slots // (COLUMNS // TILES)) + offset
        _put_mask(key_mask, token, token < key_length, visible, ready, free, slot, phase)
        slot, phase = following(slot, phase, STAGES)
    for i in range(0, dense):
        first, end = dense_run(i, prefix_tiles, suffix_tiles, prefix, suffix_start, suffix, extra, COLUMNS)
        _put_mask(key_mask, first + slots, first + slots < end, visible, ready, free, slot, phase)
        slot, phase = following(slot, phase, STAGES)
    return slot, phase


@gluon.jit
def _put_statistic(lse, delta, token, inside, scale, rings, slot, phase):
    """Fill a slot with the statistics of queries: what their scores, and the gradients of their weights, start from.

    Scores start from -lse / scale, so that exp(scale * score) is the weight: 0 for slots without a query and for
    queries that saw no key.
    """
    lse_ring, delta_ring, ready, free = rings
    row_lse = gl.load(lse + token, mask=inside, other=float("inf"))
    row_delta = gl.load(delta + token, mask=inside, other=0.0)
    row_lse = gl.where(row_lse == float("-inf"), float("inf"), row_lse)
    mbarrier.wait(free.index(slot), phase)
    lse_ring.index(slot).store(-row_lse / scale)
    delta_ring.index(slot).store(-row_delta)
    mbarrier.arrive(ready.index(slot), count=1)


@gluon.jit
def put_statistics(
    lse, delta, bases, offsets, rings, where, runs, scale, length, COLUMNS: gl.constexpr, STAGES: gl.constexpr
):
    """The warp for statistics: those of the listed query tiles, then of the runs of dense tokens."""
    _, start, _, stop, dense = where
    prefix_tiles, suffix_tiles, prefix, suffix_start, suffix, extra = runs
    layout: gl.constexpr = gl.BlockedLayout([COLUMNS // 32], [32], [1], [0])
    slots = gl.arange(0, COLUMNS, layout)
    offset = gl.load(offsets + slots)
    slot = 0
    phase = 1
    for i in range(start, stop):
        token = gl.load(bases + i) + offset
        # A short tile's empty slots may lie behind the last token.
        _put_statistic(lse, delta, token, token < length, scale, rings, slot, phase)
        slot, phase = following(slot, phase, STAGES)
    for i in range(0, dense):
        first, end = dense_run(i, prefix_tiles, suffix_tiles, prefix, suffix_start, suffix, extra, COLUMNS)
        _put_statistic(lse, delta, first + slots, first + slots < end, scale, rings, slot, phase)
        slot, phase = following(slot, phase, STAGES)
