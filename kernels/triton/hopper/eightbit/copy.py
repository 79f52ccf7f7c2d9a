"""The copying and the dealing warp of Hopper's kernel in 8 bits: column tiles, row tiles and their queries.

What `quantise` wrote lies in the order of tiles, so every copy is one box.
"""

# What a kernel takes and returns exists on the GPU only: Python types would say nothing.
# ruff: noqa: ANN001, ANN201, ANN202

# The language of Triton kernels is not quite Python.
# pyright: reportArgumentType=false, reportGeneralTypeIssues=false, reportAttributeAccessIssue=false, reportCallIssue=false, reportIndexIssue=false, reportOptionalMemberAccess=false, reportAssignmentType=false, reportOperatorIssue=false
from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma

from visattn.kernels.triton.hopper.jobs import describe, end_jobs, finish_job, next_job, take
from visattn.kernels.triton.hopper.parts import GROUP_ROWS, GROUPS, following, place, view, wait_for_threads

# Triton 3.6 knows it under another name.
_copy = getattr(tma, "async_load", tma.async_copy_global_to_shared)


@gluon.jit
def _fetch(k8, v8, shared, slot, phase, first, second, number, masks, SIZES: gl.constexpr, k_scale):
    """Fill a slot of the rings with the column tiles `first` and, where a step has two, `second`, and their masks."""
    keys, values, scales, seen, ready, free, _, _ = shared
    HEAD_DIM: gl.constexpr = SIZES[0]
    COLUMNS: gl.constexpr = SIZES[2]
    TILES: gl.constexpr = SIZES[3]
    STAGES: gl.constexpr = SIZES[4]
    SLOTS: gl.constexpr = COLUMNS // TILES
    key_tiles = view(keys, [STAGES * TILES, SLOTS, HEAD_DIM], gl.NVMMASharedLayout(HEAD_DIM, 8, rank=2))
    value_tiles = view(values, [STAGES * TILES, HEAD_DIM, SLOTS], gl.NVMMASharedLayout(SLOTS, 8, rank=2))
    index = gl.arange(0, TILES, gl.BlockedLayout([TILES], [32], [1], [0]))
    factors = gl.load(k_scale + number + gl.where(index == 0, first, second))
    mbarrier.wait(free.index(slot), phase)
    scales.index(slot).store(factors)
    seen.index(slot).store(masks)
    wait_for_threads()
    mbarrier.expect(ready.index(slot), 2 * COLUMNS * HEAD_DIM)
    _copy(k8, [(number + first) * SLOTS, 0], ready.index(slot), key_tiles.index(slot * TILES))
    if TILES == 2:
        _copy(k8, [(number + second) * SLOTS, 0], ready.index(slot), key_tiles.index(slot * TILES + 1))
    _copy(v8, [(number + first) * HEAD_DIM, 0], ready.index(slot), value_tiles.index(slot * TILES))
    if TILES == 2:
        _copy(v8, [(number + second) * HEAD_DIM, 0], ready.index(slot), value_tiles.index(slot * TILES + 1))


@gluon.jit
def copy_columns(
    k8, v8, k_scale, bases, tile_of, mask_ids, shared, jobs, sizes, tiles, run_tiles, SIZES: gl.constexpr,
    PARTIAL: gl.constexpr,
):  # fmt: skip
    """The copying warp: keys and values of each tile that the program takes."""
    TILES: gl.constexpr = SIZES[3]
    STAGES: gl.constexpr = SIZES[4]
    layout: gl.constexpr = gl.BlockedLayout([TILES], [32], [1], [0])
    index = gl.arange(0, TILES, layout)
    none = gl.zeros([TILES], gl.int32, layout)
    slot = 0
    phase = 1
    number = 0
    row, pair, start, split, stop, dense = next_job(jobs, number, 1)
    while row >= 0:
        finish_job(jobs, number)
        # Query heads of a sample are a multiple of key heads.
        own = (pair // sizes[1]) * tiles
        has_any = start < stop
        first = gl.load(tile_of + gl.load(bases + start, mask=has_any, other=0))
        second = gl.load(tile_of + gl.load(bases + start + TILES - 1, mask=has_any, other=0))
        for i in range(start, stop, TILES):
            ahead = gl.minimum(i + TILES, stop - TILES)
            next_first = gl.load(tile_of + gl.load(bases + ahead))
            next_second = gl.load(tile_of + gl.load(bases + ahead + TILES - 1))
            masks = none
            if PARTIAL:
                masks = gl.load(mask_ids + i + index, mask=index >= split - i, other=0)
            _fetch(k8, v8, shared, slot, phase, first, second, own, masks, SIZES, k_scale)
            first = next_first
            second = next_second
            slot, phase = following(slot, phase, STAGES)
        for i in range(0, dense):
            run = run_tiles + i * TILES
            _fetch(k8, v8, shared, slot, phase, run, run + TILES - 1, own, none, SIZES, k_scale)
            slot, phase = following(slot, phase, STAGES)
        number += 1
        row, pair, start, split, stop, dense = next_job(jobs, number, 1)


@gluon.jit
def deal(
    q8, tokens, bounds, taken, jobs, dense_rows, grid_rows, pairs, row_tiles, owned, SIZES: gl.constexpr
):  # fmt: skip
    """The dealing warp: takes row tiles until none is left, and fetches their rows; see `jobs.deal`."""
    queries, ready = jobs[2], jobs[3]
    HEAD_DIM: gl.constexpr = SIZES[0]
    ROWS: gl.constexpr = SIZES[1]
    total = (dense_rows + grid_rows) * pairs
    tile = gl.program_id(0)
    number = 0
    while tile < total:
        upcoming = take(taken, total)
        row, pair = place(tile, dense_rows, grid_rows, pairs)
        slot = describe(tokens, bounds, bounds, jobs, number, row, pair, owned, ROWS, False)
        wait_for_threads()
        mbarrier.expect(ready.index(slot), ROWS * HEAD_DIM)
        for g in gl.static_range(GROUPS):
            at = (pair * row_tiles + row) * ROWS + g * GROUP_ROWS
            _copy(q8, [at, 0], ready.index(slot), queries.index(slot * GROUPS + g))
        tile = upcoming
        number += 1
    end_jobs(jobs, number)
