"""The dealing warp of the Hopper kernel: which row tile its program takes next, and the rows of that tile.

A program takes one row tile after the other until none is left. While its other warps work on one, the dealing warp
puts the next into a ring of two slots: where its list lies, its tokens, and its rows of queries. So a tile starts with
everything at hand, and its keys are copied while the one before it writes its results.
"""

# What a kernel takes and returns exists on the GPU only: Python types would say nothing.
# ruff: noqa: ANN001, ANN201, ANN202

# The language of Triton kernels is not quite Python.
# pyright: reportArgumentType=false, reportGeneralTypeIssues=false, reportAttributeAccessIssue=false, reportCallIssue=false, reportIndexIssue=false, reportOptionalMemberAccess=false, reportAssignmentType=false, reportOperatorIssue=false
from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier

from visattn.kernels.triton.hopper.parts import GROUP_ROWS, GROUPS, place, view, wait_for_threads

# Slots of the ring, and numbers that describe a job: row tile, pair, start, split, stop, dense, then three of
# `Program.halves`; a power of two.
JOBS = gl.constexpr(2)
FIELDS = gl.constexpr(16)
# Rows of one copy.
PIECE_ROWS = gl.constexpr(16)
# Older releases of Triton (3.6) know this under another name.
_copy = getattr(async_copy, "async_load", None) or async_copy.async_copy_global_to_shared


@gluon.jit
def ring_of_jobs(queries, READERS: gl.constexpr):
    """The ring of jobs, with `queries` for their rows; so many groups and warps read each job."""
    plain: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    row_tokens = gl.allocate_shared_memory(gl.int32, [JOBS * GROUPS, GROUP_ROWS], plain)
    fields = gl.allocate_shared_memory(gl.int32, [JOBS, FIELDS], plain)
    ready = gl.allocate_shared_memory(gl.int64, [JOBS, 1], mbarrier.MBarrierLayout())
    free = gl.allocate_shared_memory(gl.int64, [JOBS, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(JOBS):
        mbarrier.init(ready.index(i), count=1)
        mbarrier.init(free.index(i), count=READERS)
    return fields, row_tokens, queries, ready, free


@gluon.jit
def _field(values, index, i: gl.constexpr):
    """The i-th number of a job, which every thread holds whole."""
    return gl.sum(gl.where(index == i, values, 0), 0)


@gluon.jit
def next_job(jobs, number, WARPS: gl.constexpr):
    """Wait for the number-th job of a program: (row tile, pair, start, split, stop, dense); row tile -1 ends them."""
    fields, _, _, ready, _ = jobs
    slot = number % JOBS
    layout: gl.constexpr = gl.BlockedLayout([FIELDS], [32], [WARPS], [0])
    mbarrier.wait(ready.index(slot), (number // JOBS) & 1)
    values = fields.index(slot).load(layout)
    index = gl.arange(0, FIELDS, layout)
    return (
        _field(values, index, 0), _field(values, index, 1), _field(values, index, 2),
        _field(values, index, 3), _field(values, index, 4), _field(values, index, 5),
    )  # fmt: skip


@gluon.jit
def halves_of_job(jobs, number, WARPS: gl.constexpr):
    """What `Program.halves` says of a job that `next_job` has waited for: three list entries."""
    layout: gl.constexpr = gl.BlockedLayout([FIELDS], [32], [WARPS], [0])
    values = jobs[0].index(number % JOBS).load(layout)
    index = gl.arange(0, FIELDS, layout)
    return _field(values, index, 6), _field(values, index, 7), _field(values, index, 8)


@gluon.jit
def finish_job(jobs, number):
    """Give the slot of a job back; all threads of the caller must have read what they need."""
    wait_for_threads()
    mbarrier.arrive(jobs[4].index(number % JOBS), count=1)


@gluon.jit
def _fetch_rows(q, q_token, jobs, slot, BLOCK_DIM: gl.constexpr, HEAD_DIM: gl.constexpr, UNIT: gl.constexpr):
    """Copy the rows of queries whose tokens are in a slot; those of empty row slots are token 0's.

    Shared memory has the rows of a group 64 channels at a time, so pieces of that width are one behind the other.
    """
    _, tokens, queries, _, _ = jobs
    HALVES: gl.constexpr = BLOCK_DIM // 64
    PIECES: gl.constexpr = GROUP_ROWS // PIECE_ROWS
    pieces = view(queries, [JOBS * GROUPS * HALVES * PIECES, PIECE_ROWS, 64], gl.NVMMASharedLayout(128, 16, rank=2))
    token_pieces = view(tokens, [JOBS * GROUPS * PIECES, PIECE_ROWS], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [1, 1], [1, 0])
    d = gl.arange(0, 64, gl.SliceLayout(0, layout))
    for i in range(GROUPS * PIECES):
        token = token_pieces.index(slot * GROUPS * PIECES + i).load(gl.SliceLayout(1, layout))
        rows = q + (gl.maximum(token, 0).to(gl.int64) * (q_token * UNIT))[:, None] + d[None, :]
        piece = (slot * GROUPS + i // PIECES) * HALVES * PIECES + i % PIECES
        for half in gl.static_range(HALVES):
            if HEAD_DIM == BLOCK_DIM:
                _copy(pieces.index(piece + half * PIECES), rows + half * 64)
            else:
                # What is not copied is zero.
                inside = (d + half * 64 < HEAD_DIM)[None, :].broadcast_to([PIECE_ROWS, 64])
                _copy(pieces.index(piece + half * PIECES), rows + half * 64, mask=inside)
    async_copy.commit_group()
    async_copy.wait_group(0)
    fence_async_shared()


@gluon.jit
def take(taken, total):
    """The tile that a program takes next, `total` or more if none is left."""
    before = gl.atomic_add(taken, 1, sem="relaxed")
    # Every tile is taken once: whoever takes the last leaves the counter as the next launch needs it.
    if before == total - 1:
        gl.store(taken, 0)
    return gl.num_programs(0) + before


@gluon.jit
def describe(
    tokens, bounds, halves, jobs, number, row, pair, owned, ROWS: gl.constexpr, HALVES: gl.constexpr
):  # fmt: skip
    """Put the numbers and the tokens of a program's number-th job into the ring, once its slot is free: that slot."""
    bounds_batch, list_batch, list_heads = owned
    fields, token_ring, _, _, free = jobs
    wide: gl.constexpr = gl.BlockedLayout([1], [32], [1], [0])
    index = gl.arange(0, FIELDS, wide)
    slots = gl.arange(0, GROUP_ROWS, wide)
    owner = pair // list_heads
    own_bounds = bounds + owner.to(gl.int64) * bounds_batch + row * 4
    bound = gl.load(own_bounds + index - 2, mask=(index >= 2) & (index < 6), other=0)
    # Start, split and stop count from the first entry of all owners.
    bound += gl.where((index >= 2) & (index < 5), owner * list_batch, 0)
    if HALVES:
        # Lists that are known beforehand have one owner.
        bound += gl.load(halves + row * 4 + index - 6, mask=(index >= 6) & (index < 9), other=0)
    described = gl.where(index == 0, row, gl.where(index == 1, pair, bound))
    slot = number % JOBS
    mbarrier.wait(free.index(slot), ((number // JOBS) & 1) ^ 1)
    fields.index(slot).store(described)
    for g in gl.static_range(GROUPS):
        token_ring.index(slot * GROUPS + g).store(gl.load(tokens + row * ROWS + g * GROUP_ROWS + slots))
    return slot


@gluon.jit
def end_jobs(jobs, number):
    """Tell the other warps that there is no number-th job."""
    fields, _, _, ready, free = jobs
    slot = number % JOBS
    mbarrier.wait(free.index(slot), ((number // JOBS) & 1) ^ 1)
    fields.index(slot).store(gl.full([FIELDS], -1, gl.int32, gl.BlockedLayout([1], [32], [1], [0])))
    wait_for_threads()
    mbarrier.arrive(ready.index(slot), count=1)


@gluon.jit
def deal(
    q, tokens, bounds, halves, taken, jobs, steps, heads, dense_rows, grid_rows, pairs, owned,
    SIZES: gl.constexpr, UNIT: gl.constexpr,
):  # fmt: skip
    """The dealing warp: takes tiles until none is left, and fetches their rows.

    `taken` counts how often programs have looked for a tile behind their first one, which is once per tile. `owned` are
    the distances of the bounds and of the lists of two owners, and the query heads of an owner.
    """
    q_batch, q_token, q_head = steps
    BLOCK_DIM: gl.constexpr = SIZES[0]
    ROWS: gl.constexpr = SIZES[1]
    HALVES: gl.constexpr = SIZES[7]
    total = (dense_rows + grid_rows) * pairs
    tile = gl.program_id(0)
    number = 0
    while tile < total:
        following = take(taken, total)
        row, pair = place(tile, dense_rows, grid_rows, pairs)
        slot = describe(tokens, bounds, halves, jobs, number, row, pair, owned, ROWS, HALVES)
        sample, head = (pair // heads).to(gl.int64), (pair % heads).to(gl.int64)
        _fetch_rows(q + (sample * q_batch + head * q_head) * UNIT, q_token, jobs, slot, BLOCK_DIM, SIZES[10], UNIT)
        wait_for_threads()
        mbarrier.arrive(jobs[3].index(slot), count=1)
        tile = following
        number += 1
    end_jobs(jobs, number)
