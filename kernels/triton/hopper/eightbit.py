"""Forward kernel for Hopper in 8 bits: products of int8, or of int8 with queries and keys and e4m3 with values.

The schedule is that of `hopper.forward`: a warp copies column tiles, one deals row tiles, two groups of four warps
multiply. What `quantise` wrote lies in the order of tiles, so every copy is one box.

Weights of a step are relative to the largest of the step, which makes the most of their 8 bits; so the product with
the values is not added up in the tensor cores from step to step but here, in float32, each step with its own factor.
That also leaves no sum longer than a step to the 14 bits with which Hopper adds up products of e4m3.
"""

# What a kernel takes and returns exists on the GPU only: Python types would say nothing. Conditions known to the
# compiler stand apart from those that are not.
# ruff: noqa: ANN001, ANN201, ANN202, SIM102

# The language of Triton kernels is not quite Python.
# pyright: reportArgumentType=false, reportGeneralTypeIssues=false, reportAttributeAccessIssue=false, reportCallIssue=false, reportIndexIssue=false, reportOptionalMemberAccess=false, reportAssignmentType=false, reportOperatorIssue=false
from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from visattn.kernels.triton.hopper.jobs import FIELDS, JOBS, finish_job, next_job, wait_for_threads
from visattn.kernels.triton.hopper.parts import (
    GROUP_ROWS,
    GROUPS,
    LN2,
    dense_run,
    following,
    hide_masked,
    mask_words,
    place,
    row_layout,
    view,
)
from visattn.kernels.triton.parts import RUNTIME_SIZES

# Triton 3.6 knows it under another name.
_copy = getattr(tma, "async_load", tma.async_copy_global_to_shared)
# Weights of a step reach from 0 to 2 to this power: 127, and 256 where they are e4m3, which reaches 448.
INT8_TOP, FP8_TOP = gl.constexpr(6.988684686772166), gl.constexpr(8.0)
# Added to a float of up to 2^22 it leaves the nearest integer in the lowest bits.
ROUND = gl.constexpr(12582912.0)
ROUND_BITS = gl.constexpr(0x4B400000)
# The sum of a register's four bytes.
SUM = gl.constexpr("dp4a.s32.s32 $0, $1, 0x01010101, 0;")
# Four integers of 32 bits whose lowest bytes become one register.
PACK = gl.constexpr(
    "{ .reg .b32 a, b; prmt.b32 a, $1, $2, 0x0040; prmt.b32 b, $3, $4, 0x0040; prmt.b32 $0, a, b, 0x5410; }"
)
# Four floats that become one register of e4m3.
PACK_FP8 = gl.constexpr(
    "{ .reg .b16 a, b; cvt.rn.satfinite.e4m3x2.f32 a, $2, $1; cvt.rn.satfinite.e4m3x2.f32 b, $4, $3; "
    "mov.b32 $0, {a, b}; }"
)


@gluon.constexpr_function
def _product_layout(columns: int) -> gl.NVMMADistributedLayout:
    """Where four warps keep a product [64, columns] of bytes."""
    return gl.NVMMADistributedLayout([3, 0], [4, 1], [16, int(columns), 32])


@gluon.jit
def _fours(x):
    """What becomes one register of bytes: columns 2c, 2c + 1, 2c + 8 and 2c + 9 of each 16 (see `quantise.woven`)."""
    rows: gl.constexpr = x.shape[0]
    columns: gl.constexpr = x.shape[1]
    x = x.reshape([rows, columns // 16, 2, 4, 2]).permute([0, 1, 3, 2, 4])
    even, odd = gl.split(x)
    first, third = gl.split(even)
    second, fourth = gl.split(odd)
    return first, second, third, fourth


@gluon.jit
def _bytes(words, layout: gl.constexpr, FP8: gl.constexpr):
    """Weights as a product reads them, from registers of four."""
    small: gl.constexpr = gl.float8e4nv if FP8 else gl.int8
    rows: gl.constexpr = words.shape[0]
    columns: gl.constexpr = words.shape[1] * 16
    low = gl.join(words.to(gl.int8), (words >> 8).to(gl.int8))
    high = gl.join((words >> 16).to(gl.int8), (words >> 24).to(gl.int8))
    x = gl.join(low, high).permute([0, 1, 2, 4, 3]).reshape([rows, columns])
    return gl.convert_layout(x, layout, assert_trivial=True).to(small, bitcast=True)


@gluon.jit
def _weights(p, FP8: gl.constexpr):
    """Weights in 8 bits, four a register, and their sum per row."""
    if FP8:
        words = gl.inline_asm_elementwise(PACK_FP8, "=r,f,f,f,f", _fours(p), dtype=gl.int32, is_pure=True, pack=1)
        return words, gl.sum(p, 1)
    else:
        bits = (p + ROUND).to(gl.int32, bitcast=True)
        words = gl.inline_asm_elementwise(PACK, "=r,r,r,r,r", _fours(bits), dtype=gl.int32, is_pure=True, pack=1)
        sums = gl.inline_asm_elementwise(SUM, "=r,r", [words], dtype=gl.int32, is_pure=True, pack=1)
        return words, gl.sum(gl.sum(sums, 2), 1).to(gl.float32)


@gluon.jit
def _softmax(scores, k_scales, q_scale, top, total, FP8: gl.constexpr):
    """One step of the online softmax, with a scale for each half of the scores' columns.

    Returns:
        Weights, four a register; largest logits and sums of weights so far; by what what was added so far, and this
        step, are to be multiplied.
    """
    of_row: gl.constexpr = q_scale.type.layout
    rows: gl.constexpr = scores.shape[0]
    columns: gl.constexpr = scores.shape[1]
    halves = scores.reshape([rows, 2, columns // 2])
    peaks = gl.max(halves, 2) - ROUND
    of_halves: gl.constexpr = peaks.type.layout
    k_scale = gl.where(gl.arange(0, 2, gl.SliceLayout(0, of_halves)) == 0, k_scales[0], k_scales[1])[None, :]
    own = gl.convert_layout(gl.max(peaks * k_scale, 1), of_row)
    new = gl.maximum(top, own)
    base = gl.where(new == float("-inf"), 0.0, new) * q_scale
    alpha, beta = gl.exp2(top * q_scale - base), gl.exp2(own * q_scale - base)
    base = gl.where(own == float("-inf"), 0.0, own) * q_scale - (FP8_TOP if FP8 else INT8_TOP)
    factor = gl.convert_layout(q_scale, gl.SliceLayout(1, of_halves))[:, None] * k_scale
    base = gl.convert_layout(base, gl.SliceLayout(1, of_halves))[:, None] + ROUND * factor
    p = gl.exp2(halves * factor[:, :, None] - base[:, :, None])
    words, sums = _weights(p.reshape([rows, columns]), FP8)
    return words, new, total * alpha + gl.convert_layout(sums, of_row) * beta, alpha, beta


@gluon.jit
def _hide(scores, words, masked, step, listed, runs, layout: gl.constexpr, PARTIAL: gl.constexpr, DENSE: gl.constexpr):
    """Scores of one step with -inf where a mask says so, or behind the end of a run of dense tokens.

    Steps from `listed` on are runs.
    """
    if PARTIAL:
        if masked:
            scores = hide_masked(scores, words, layout)
    if DENSE:
        prefix_tiles, suffix_tiles, prefix, suffix_start, suffix, extra = runs
        columns: gl.constexpr = scores.shape[1]
        run = step - listed
        first, end = dense_run(run, prefix_tiles, suffix_tiles, prefix, suffix_start, suffix, extra, columns)
        if (run >= 0) & (first + columns > end):
            column = gl.arange(0, columns, gl.SliceLayout(0, layout))
            inside = end - first - (column & 6) > (column & 121)
            scores = gl.where(inside[None, :], scores, float("-inf"))
    return scores


@gluon.jit
def _scales_of(scales, slot, TILES: gl.constexpr):
    """The scales of a step's two key tiles, or twice that of its one, which every thread holds."""
    layout: gl.constexpr = gl.BlockedLayout([TILES], [32], [4], [0])
    values = scales.index(slot).load(layout)
    index = gl.arange(0, TILES, layout)
    return gl.sum(gl.where(index == 0, values, 0.0), 0), gl.sum(gl.where(index == TILES - 1, values, 0.0), 0)


@gluon.jit
def _step(
    step, mine, q_scale, shared, lists, where, runs, state, at,
    first_row: gl.constexpr, SIZES: gl.constexpr, PARTIAL: gl.constexpr, DENSE: gl.constexpr,
    s_layout: gl.constexpr, o_layout: gl.constexpr, p_layout: gl.constexpr,
):  # fmt: skip
    """One step: scores, their weights, and the product with the values, which is added up here.

    Sums of bytes begin at the bits of ROUND: as floats they are then ROUND and what they count.

    Nothing runs beside the softmax of the same group: with a product in flight, its factors and both sums would not fit
    into the registers. The other group's does.

    `state` is the output so far, the largest logit of each row and the sum of its weights; `at` slot and phase.
    """
    keys, values, scales, k_ready, k_free, v_ready, v_free, _ = shared
    acc, top, total = state
    slot, phase = at
    start, split, stop = where
    COLUMNS: gl.constexpr = SIZES[2]
    TILES: gl.constexpr = SIZES[3]
    FP8: gl.constexpr = SIZES[5]
    of_output: gl.constexpr = gl.SliceLayout(1, o_layout)
    i = start + step * TILES
    masked = (i >= split) & (i < stop)
    words = ()
    if PARTIAL:
        # Their loads are done by the time that the scores are.
        words = mask_words(lists[0], lists[1], i, first_row, masked, s_layout, SIZES)
    scores = gl.full([GROUP_ROWS, COLUMNS], ROUND_BITS, gl.int32, s_layout)
    mbarrier.wait(k_ready.index(slot), phase)
    scores = warpgroup_mma(mine, keys.index(slot).permute((1, 0)), scores, is_async=True)
    k_scales = _scales_of(scales, slot, TILES)
    scores = warpgroup_mma_wait(0, deps=[scores]).to(gl.float32, bitcast=True)
    mbarrier.arrive(k_free.index(slot), count=1)
    scores = _hide(scores, words, masked, step, (stop - start) // TILES, runs, s_layout, PARTIAL, DENSE)
    weights, top, total, alpha, beta = _softmax(scores, k_scales, q_scale, top, total, FP8)
    if FP8:
        part = gl.zeros([GROUP_ROWS, SIZES[0]], gl.float32, o_layout)
    else:
        part = gl.full([GROUP_ROWS, SIZES[0]], ROUND_BITS, gl.int32, o_layout)
    weights = _bytes(weights, p_layout, FP8)
    mbarrier.wait(v_ready.index(slot), phase)
    part = warpgroup_mma(weights, values.index(slot).permute((1, 0)), part, use_acc=not FP8, is_async=True)
    alpha, beta = gl.convert_layout(alpha, of_output), gl.convert_layout(beta, of_output)
    acc = acc * alpha[:, None] if FP8 else acc * alpha[:, None] - (ROUND * beta)[:, None]
    part = warpgroup_mma_wait(0, deps=[part]).to(gl.float32, bitcast=True)
    mbarrier.arrive(v_free.index(slot), count=1)
    return acc + part * beta[:, None], top, total


@gluon.jit
def _write(
    acc, top, total, rows_of, staging, out, lse, v_shift, v_scale, pair, sizes,
    LSE: gl.constexpr, FP8: gl.constexpr, s_layout: gl.constexpr,
):  # fmt: skip
    """Store the results of a group's rows, through shared memory to a layout whose stores are whole lines."""
    heads, group, length, _ = sizes
    q_scale, offset, tokens = rows_of
    o_layout: gl.constexpr = acc.type.layout
    HEAD_DIM: gl.constexpr = acc.shape[1]
    io: gl.constexpr = row_layout(HEAD_DIM)
    d = gl.arange(0, HEAD_DIM, gl.SliceLayout(0, o_layout))
    kv = (pair // group).to(gl.int64) * HEAD_DIM
    empty = gl.convert_layout(gl.where(total == 0.0, 1.0, 0.0), gl.SliceLayout(1, o_layout))
    divisor = gl.convert_layout(gl.where(total == 0.0, 1.0, total), gl.SliceLayout(1, o_layout))
    shift = gl.load(v_shift + kv + d)[None, :] * (1.0 - empty)[:, None]
    acc = acc * (1.0 / divisor)[:, None] * gl.load(v_scale + kv + d)[None, :] + shift
    staging.store(acc.to(staging.dtype))
    token = tokens.load(gl.SliceLayout(1, io))
    sample, head = (pair // heads).to(gl.int64), (pair % heads).to(gl.int64)
    out_row = ((sample * length + token) * heads + head) * HEAD_DIM
    d = gl.arange(0, HEAD_DIM, gl.SliceLayout(0, io))
    gl.store(out + out_row[:, None] + d[None, :], staging.load(io), mask=(token >= 0)[:, None])
    if LSE:
        row_token = tokens.load(gl.SliceLayout(1, s_layout))
        # total = 0 gives log2 -inf, as it should be; weights count in units of the largest.
        peak = gl.where(total == 0.0, 0.0, top * q_scale)
        to = lse + pair.to(gl.int64) * length + row_token
        unit: gl.constexpr = FP8_TOP if FP8 else INT8_TOP
        rows = gl.arange(0, GROUP_ROWS, gl.SliceLayout(1, s_layout))
        gl.store(to, (peak + gl.log2(total) - unit + gl.load(offset + rows)) * LN2, mask=row_token >= 0)


@gluon.jit
def _consume(
    out, lse, per_row, v_shift, v_scale, shared, jobs, lists, sizes, runs,
    GROUP: gl.constexpr, SIZES: gl.constexpr, PARTIAL: gl.constexpr, DENSE: gl.constexpr, LSE: gl.constexpr,
):  # fmt: skip
    """One group of four warps: its 64 rows of each tile that the program takes, and their results."""
    q_scales, q_offset = per_row
    s_layout: gl.constexpr = _product_layout(SIZES[2])
    o_layout: gl.constexpr = _product_layout(SIZES[0])
    p_layout: gl.constexpr = gl.DotOperandLayout(0, o_layout, 4)
    of_row: gl.constexpr = gl.SliceLayout(1, s_layout)
    rows = gl.arange(0, GROUP_ROWS, of_row)
    number = 0
    slot = 0
    phase = 0
    row, pair, start, split, stop, dense = next_job(jobs, number, 4)
    while row >= 0:
        first_row = (pair * sizes[3] + row).to(gl.int64) * SIZES[1] + GROUP * GROUP_ROWS
        q_scale = gl.load(q_scales + first_row + rows)
        top = gl.full([GROUP_ROWS], float("-inf"), gl.float32, of_row)
        total = gl.zeros([GROUP_ROWS], gl.float32, of_row)
        acc = gl.zeros([GROUP_ROWS, SIZES[0]], gl.float32, o_layout)
        of_job = (number % JOBS) * GROUPS + GROUP
        mine = jobs[2].index(of_job)
        for step in range(0, (stop - start) // SIZES[3] + dense):
            acc, top, total = _step(
                step, mine, q_scale, shared, lists, (start, split, stop), runs, (acc, top, total), (slot, phase),
                GROUP * GROUP_ROWS, SIZES, PARTIAL, DENSE, s_layout, o_layout, p_layout,
            )  # fmt: skip
            slot, phase = following(slot, phase, SIZES[4])
        rows_of = (q_scale, q_offset + first_row, jobs[1].index(of_job))
        _write(acc, top, total, rows_of, shared[7].index(GROUP), out, lse, v_shift, v_scale, pair, sizes,
               LSE, SIZES[5], s_layout)  # fmt: skip
        finish_job(jobs, number)
        number += 1
        row, pair, start, split, stop, dense = next_job(jobs, number, 4)


@gluon.jit
def _fetch(k8, v8, shared, slot, phase, first, second, number, SIZES: gl.constexpr, k_scale):
    """Fill a slot of the rings with the column tiles `first` and, where a step has two, `second`."""
    keys, values, scales, k_ready, k_free, v_ready, v_free, _ = shared
    HEAD_DIM: gl.constexpr = SIZES[0]
    COLUMNS: gl.constexpr = SIZES[2]
    TILES: gl.constexpr = SIZES[3]
    STAGES: gl.constexpr = SIZES[4]
    SLOTS: gl.constexpr = COLUMNS // TILES
    key_tiles = view(keys, [STAGES * TILES, SLOTS, HEAD_DIM], gl.NVMMASharedLayout(HEAD_DIM, 8, rank=2))
    value_tiles = view(values, [STAGES * TILES, HEAD_DIM, SLOTS], gl.NVMMASharedLayout(SLOTS, 8, rank=2))
    index = gl.arange(0, TILES, gl.BlockedLayout([TILES], [32], [1], [0]))
    factors = gl.load(k_scale + number + gl.where(index == 0, first, second))
    mbarrier.wait(k_free.index(slot), phase)
    scales.index(slot).store(factors)
    wait_for_threads()
    mbarrier.expect(k_ready.index(slot), COLUMNS * HEAD_DIM)
    _copy(k8, [(number + first) * SLOTS, 0], k_ready.index(slot), key_tiles.index(slot * TILES))
    if TILES == 2:
        _copy(k8, [(number + second) * SLOTS, 0], k_ready.index(slot), key_tiles.index(slot * TILES + 1))
    mbarrier.wait(v_free.index(slot), phase)
    mbarrier.expect(v_ready.index(slot), COLUMNS * HEAD_DIM)
    _copy(v8, [(number + first) * HEAD_DIM, 0], v_ready.index(slot), value_tiles.index(slot * TILES))
    if TILES == 2:
        _copy(v8, [(number + second) * HEAD_DIM, 0], v_ready.index(slot), value_tiles.index(slot * TILES + 1))


@gluon.jit
def _copy_columns(k8, v8, k_scale, bases, tile_of, shared, jobs, sizes, tiles, run_tiles, SIZES: gl.constexpr):
    """The copying warp: keys and values of each tile that the program takes."""
    TILES: gl.constexpr = SIZES[3]
    STAGES: gl.constexpr = SIZES[4]
    slot = 0
    phase = 1
    number = 0
    row, pair, start, _split, stop, dense = next_job(jobs, number, 1)
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
            _fetch(k8, v8, shared, slot, phase, first, second, own, SIZES, k_scale)
            first = next_first
            second = next_second
            slot, phase = following(slot, phase, STAGES)
        for i in range(0, dense):
            run = run_tiles + i * TILES
            _fetch(k8, v8, shared, slot, phase, run, run + TILES - 1, own, SIZES, k_scale)
            slot, phase = following(slot, phase, STAGES)
        number += 1
        row, pair, start, _split, stop, dense = next_job(jobs, number, 1)


@gluon.jit
def _deal(
    q8, tokens, bounds, taken, jobs, dense_rows, grid_rows, pairs, row_tiles, owned, SIZES: gl.constexpr
):  # fmt: skip
    """The dealing warp: takes row tiles until none is left, and fetches their rows; see `jobs.deal`."""
    bounds_batch, list_batch, list_heads = owned
    fields, token_ring, queries, ready, free = jobs
    HEAD_DIM: gl.constexpr = SIZES[0]
    ROWS: gl.constexpr = SIZES[1]
    wide: gl.constexpr = gl.BlockedLayout([1], [32], [1], [0])
    index = gl.arange(0, FIELDS, wide)
    slots = gl.arange(0, GROUP_ROWS, wide)
    total = (dense_rows + grid_rows) * pairs
    tile = gl.program_id(0)
    number = 0
    while tile < total:
        before = gl.atomic_add(taken, 1, sem="relaxed")
        # Every tile is taken once: whoever takes the last leaves the counter as the next launch needs it.
        if before == total - 1:
            gl.store(taken, 0)
        upcoming = gl.num_programs(0) + before
        row, pair = place(tile, dense_rows, grid_rows, pairs)
        owner = pair // list_heads
        own_bounds = bounds + owner.to(gl.int64) * bounds_batch + row * 4
        bound = gl.load(own_bounds + index - 2, mask=(index >= 2) & (index < 6), other=0)
        # Start, split and stop count from the first entry of all owners.
        bound += gl.where((index >= 2) & (index < 5), owner * list_batch, 0)
        described = gl.where(index == 0, row, gl.where(index == 1, pair, bound))
        slot = number % JOBS
        mbarrier.wait(free.index(slot), ((number // JOBS) & 1) ^ 1)
        fields.index(slot).store(described)
        for g in gl.static_range(GROUPS):
            token_ring.index(slot * GROUPS + g).store(gl.load(tokens + row * ROWS + g * GROUP_ROWS + slots))
        wait_for_threads()
        mbarrier.expect(ready.index(slot), ROWS * HEAD_DIM)
        for g in gl.static_range(GROUPS):
            at = (pair * row_tiles + row) * ROWS + g * GROUP_ROWS
            _copy(q8, [at, 0], ready.index(slot), queries.index(slot * GROUPS + g))
        tile = upcoming
        number += 1
    slot = number % JOBS
    mbarrier.wait(free.index(slot), ((number // JOBS) & 1) ^ 1)
    fields.index(slot).store(gl.full([FIELDS], -1, gl.int32, wide))
    wait_for_threads()
    mbarrier.arrive(ready.index(slot), count=1)


@gluon.jit(do_not_specialize=[*RUNTIME_SIZES, "tiles", "run_tiles", "row_tiles"])
def attend_8bit(
    q8, k8, v8, q_scale, q_offset, k_scale, v_shift, v_scale, out, lse, taken,
    tokens, bounds, bases, tile_of, mask_ids, masks, bounds_batch, list_batch, list_heads,
    heads, group, length, tiles, run_tiles, row_tiles,
    dense_rows, grid_rows, pairs, prefix_tiles, suffix_tiles, prefix, suffix_start, suffix, extra,
    HEAD_DIM: gl.constexpr, ROWS: gl.constexpr, COLUMNS: gl.constexpr, TILES: gl.constexpr, STAGES: gl.constexpr,
    LSE: gl.constexpr, PARTIAL: gl.constexpr, DENSE: gl.constexpr, FP8: gl.constexpr,
):  # fmt: skip
    """Attention of query tiles of 128 tokens; see `forward.attend` for what the arguments share with it.

    Args (besides those of `forward.attend`):
        q8: Descriptor of the queries as [pairs * row tiles * 128, channels]; see `quantise.quantise_rows`.
        k8: Descriptor of the keys as [pairs * tiles * slots, channels]; see `quantise.quantise_columns`.
        v8: Descriptor of the values as [pairs * tiles * channels, slots].
        q_scale: See `quantise`, as q_offset, k_scale, v_shift and v_scale.
        taken: Counts the tiles that programs take: int32 [1], 0 before and after.
        tile_of: Which column tile begins at a token: int32 [tokens].
        tiles: Column tiles, those of runs of dense tokens behind those of the grid.
        run_tiles: Number of the first of those.
        row_tiles: Row tiles.
        FP8: Whether weights and values are e4m3.
    """
    small: gl.constexpr = gl.float8e4nv if FP8 else gl.int8
    rows8: gl.constexpr = gl.NVMMASharedLayout(HEAD_DIM, 8, rank=2)
    SLOTS: gl.constexpr = COLUMNS // TILES
    queries = gl.allocate_shared_memory(gl.int8, [JOBS * GROUPS, GROUP_ROWS, HEAD_DIM], rows8)
    keys = gl.allocate_shared_memory(gl.int8, [STAGES, COLUMNS, HEAD_DIM], rows8)
    values = gl.allocate_shared_memory(small, [STAGES, HEAD_DIM, COLUMNS], gl.NVMMASharedLayout(SLOTS, 8, rank=2))
    plain: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    scales = gl.allocate_shared_memory(gl.float32, [STAGES, TILES], plain)
    staging = gl.allocate_shared_memory(
        out.dtype.element_ty, [GROUPS, GROUP_ROWS, HEAD_DIM], gl.NVMMASharedLayout(128, 16, rank=2)
    )
    k_ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    k_free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    row_tokens = gl.allocate_shared_memory(gl.int32, [JOBS * GROUPS, GROUP_ROWS], plain)
    fields = gl.allocate_shared_memory(gl.int32, [JOBS, FIELDS], plain)
    job_ready = gl.allocate_shared_memory(gl.int64, [JOBS, 1], mbarrier.MBarrierLayout())
    job_free = gl.allocate_shared_memory(gl.int64, [JOBS, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(JOBS):
        mbarrier.init(job_ready.index(i), count=1)
        mbarrier.init(job_free.index(i), count=GROUPS + 1)
    for i in gl.static_range(STAGES):
        mbarrier.init(k_ready.index(i), count=1)
        mbarrier.init(v_ready.index(i), count=1)
        mbarrier.init(k_free.index(i), count=GROUPS)
        mbarrier.init(v_free.index(i), count=GROUPS)
    fence_async_shared()

    SIZES: gl.constexpr = (HEAD_DIM, ROWS, COLUMNS, TILES, STAGES, FP8)
    shared = (keys, values, scales, k_ready, k_free, v_ready, v_free, staging)
    runs = (prefix_tiles, suffix_tiles, prefix, suffix_start, suffix, extra)
    jobs = (fields, row_tokens, queries, job_ready, job_free)
    lists = (masks, mask_ids)
    sizes = (heads, group, length, row_tiles)
    per_row = (q_scale, q_offset)
    gl.warp_specialize(
        [
            (_consume, (out, lse, per_row, v_shift, v_scale, shared, jobs, lists, sizes, runs, gl.constexpr(0),
                        SIZES, PARTIAL, DENSE, LSE)),
            (_consume, (out, lse, per_row, v_shift, v_scale, shared, jobs, lists, sizes, runs, gl.constexpr(1),
                        SIZES, PARTIAL, DENSE, LSE)),
            (_copy_columns, (k8, v8, k_scale, bases, tile_of, shared, jobs, sizes, tiles, run_tiles, SIZES)),
            (_deal, (q8, tokens, bounds, taken, jobs, dense_rows, grid_rows, pairs, row_tiles,
                     (bounds_batch, list_batch, list_heads), SIZES)),
        ],
        [4, 1, 1],
        [240, 24, 24],
    )  # fmt: skip
