"""Forward kernel for Hopper in 8 bits: products of int8, or of int8 with queries and keys and e4m3 with values.

A warp copies column tiles, one deals row tiles, two groups of four warps multiply. What `quantise` wrote lies in the
order of tiles, so every copy is one box. Where lists have masks the groups take turns in making weights, which keeps
the unit for exponentials busy with one of them while the tensor cores multiply for the other; without masks the groups
are faster when neither waits for the other.

Weights of a step are relative to its largest, which makes the most of 8 bits, and so are what was added before and the
sums then: a step's product is added as it is. That is done in float32 and not in the tensor cores: no sum of e4m3
products is longer than a step, of which Hopper keeps 14 bits.
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
    warpgroup_mma,
    warpgroup_mma_wait,
)

from visattn.kernels.triton.hopper.eightbit.copy import copy_columns, deal
from visattn.kernels.triton.hopper.eightbit.softmax import (
    FP8_TOP,
    INT8_TOP,
    ROUND_BITS,
    bytes_of,
    level_of,
    logits_of,
    no_sums,
    product_layout,
    weights_of,
)
from visattn.kernels.triton.hopper.jobs import JOBS, finish_job, next_job, ring_of_jobs
from visattn.kernels.triton.hopper.parts import (
    GROUP_ROWS,
    GROUPS,
    LN2,
    following,
    hide_behind,
    hide_masked,
    mask_bits,
    row_layout,
)
from visattn.kernels.triton.parts import RUNTIME_SIZES


@gluon.jit
def _hide(scores, bits, step, where, runs, layout: gl.constexpr, PARTIAL: gl.constexpr, RAGGED: gl.constexpr):
    """Scores of one step with -inf where a mask says so, or behind the end of a run of dense tokens.

    `where` are the first step with masks and the first that is a run.
    """
    if PARTIAL:
        if (step >= where[0]) & (step < where[1]):
            scores = hide_masked(scores, bits, layout)
    if RAGGED:
        scores = hide_behind(scores, step - where[1], runs, layout)
    return scores


@gluon.jit
def _pair_of(ring, slot, TILES: gl.constexpr):
    """The numbers of a step's two key tiles, or twice that of its one, which every thread holds."""
    layout: gl.constexpr = gl.BlockedLayout([TILES], [32], [4], [0])
    values = ring.index(slot).load(layout)
    index = gl.arange(0, TILES, layout)
    return gl.sum(gl.where(index == 0, values, 0), 0), gl.sum(gl.where(index == TILES - 1, values, 0), 0)


@gluon.jit
def _scores(mine, keys, at, COLUMNS: gl.constexpr, layout: gl.constexpr):
    """Start the product of queries and keys of a slot, whose sums begin at the bits of ROUND.

    As floats they are then ROUND and what they count.
    """
    scores = gl.full([GROUP_ROWS, COLUMNS], ROUND_BITS, gl.int32, layout)
    return warpgroup_mma(mine, keys.index(at).permute((1, 0)), scores, is_async=True)


@gluon.jit
def _bits(masks, seen, slot, step, where, first_row: gl.constexpr, SIZES: gl.constexpr, PARTIAL: gl.constexpr):
    """Visibility bits of a step's column tiles, see `mask_bits`; 0 if no list has masks.

    `seen` has the masks' numbers, `where` is as in `_hide`. Nothing is loaded for steps that see everything.
    """
    if PARTIAL:
        masked = (step >= where[0]) & (step < where[1])
        first, second = _pair_of(seen, slot, SIZES[3])
        return mask_bits(masks, first, second, first_row, masked, SIZES[2], SIZES[1], SIZES[3])
    else:
        return 0


@gluon.jit
def _step(
    step, steps, mine, q_scale, shared, masks, where, runs, state, at,
    first_row: gl.constexpr, SIZES: gl.constexpr, PARTIAL: gl.constexpr, RAGGED: gl.constexpr,
    s_layout: gl.constexpr, o_layout: gl.constexpr, p_layout: gl.constexpr,
):  # fmt: skip
    """One step: its weights while the next scores are multiplied, then the largest of those while its values are.

    The last step multiplies its own scores again, which nobody reads.

    `state` is this step's scores and the level of its weights, by what what was added before is to be multiplied, the
    output so far and the sums of its weights; `at` slot and phase, and whose turn it is.

    Returns:
        The next step's state, with this step's level instead of its own; that one; slot and phase.
    """
    keys, values, scales, seen, ready, free, turns, _ = shared
    scores, level, kept, acc, total = state
    slot, phase, turn = at
    COLUMNS: gl.constexpr = SIZES[2]
    TILES: gl.constexpr = SIZES[3]
    FP8: gl.constexpr = SIZES[5]
    GROUP: gl.constexpr = first_row // GROUP_ROWS
    next_slot, next_phase = following(slot, phase, SIZES[4])
    ahead = gl.where(step + 1 < steps, next_slot, slot)
    bits = _bits(masks, seen, ahead, step + 1, where, first_row, SIZES, PARTIAL)
    if PARTIAL:
        mbarrier.wait(turns.index(GROUP), turn)
    # Scales are read here, so that the assembler cannot move weights before the wait for the turn.
    logits = logits_of(scores, _pair_of(scales, slot, TILES), q_scale, level[1], FP8)
    products = _scores(mine, keys, ahead, COLUMNS, s_layout)
    weights, sums = weights_of(logits, FP8)
    weights = bytes_of(weights, p_layout, FP8)
    part = gl.zeros([GROUP_ROWS, SIZES[0]], gl.float32 if FP8 else gl.int32, o_layout)
    part = warpgroup_mma(weights, values.index(slot).permute((1, 0)), part, use_acc=False, is_async=True)
    if PARTIAL:
        mbarrier.arrive(turns.index(1 - GROUP), count=1)
    of_sums: gl.constexpr = gl.SliceLayout(1, total.type.layout)
    total = total * gl.convert_layout(kept, of_sums)[:, None] + gl.convert_layout(sums, total.type.layout)
    kept = gl.convert_layout(kept, gl.SliceLayout(1, o_layout))[:, None]
    products = warpgroup_mma_wait(1, deps=[products])
    scores = products.to(gl.float32, bitcast=True)
    scores = _hide(scores, bits, step + 1, where, runs, s_layout, PARTIAL, RAGGED)
    next_level, next_kept = level_of(scores, _pair_of(scales, ahead, TILES), q_scale, level)
    # Waiting here for the keys after keeps the assembler from moving the largest behind the wait for the product.
    after, after_phase = following(next_slot, next_phase, SIZES[4])
    mbarrier.wait(ready.index(after), after_phase, pred=step + 2 < steps)
    part, scores = warpgroup_mma_wait(0, deps=[part, scores])
    mbarrier.arrive(free.index(slot), count=1)
    acc = acc * kept + part.to(gl.float32)
    return (scores, next_level, next_kept, acc, total), level, (next_slot, next_phase, turn ^ 1)


@gluon.jit
def _write(
    acc, unit, total, rows_of, staging, out, lse, v_shift, v_scale, pair, sizes,
    LSE: gl.constexpr, FP8: gl.constexpr, s_layout: gl.constexpr,
):  # fmt: skip
    """Store the results of a group's rows, through shared memory to a layout whose stores are whole lines."""
    heads, group, length, _ = sizes
    offset, tokens = rows_of
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
        # total = 0 gives log2 -inf, as it should be.
        peak = gl.where(total == 0.0, 0.0, unit)
        to = lse + pair.to(gl.int64) * length + row_token
        largest: gl.constexpr = FP8_TOP if FP8 else INT8_TOP
        rows = gl.arange(0, GROUP_ROWS, gl.SliceLayout(1, s_layout))
        gl.store(to, (peak + gl.log2(total) - largest + gl.load(offset + rows)) * LN2, mask=row_token >= 0)


@gluon.jit
def _consume(
    out, lse, per_row, v_shift, v_scale, shared, jobs, masks, sizes, runs,
    GROUP: gl.constexpr, SIZES: gl.constexpr, PARTIAL: gl.constexpr, RAGGED: gl.constexpr, LSE: gl.constexpr,
):  # fmt: skip
    """One group of four warps: its 64 rows of each tile that the program takes, and their results."""
    q_scales, q_offset = per_row
    s_layout: gl.constexpr = product_layout(SIZES[2])
    o_layout: gl.constexpr = product_layout(SIZES[0])
    p_layout: gl.constexpr = gl.DotOperandLayout(0, o_layout, 4)
    of_row: gl.constexpr = gl.SliceLayout(1, s_layout)
    rows = gl.arange(0, GROUP_ROWS, of_row)
    number = 0
    at = (0, 0, 0)
    row, pair, start, split, stop, dense = next_job(jobs, number, 4)
    while row >= 0:
        first_row = (pair * sizes[3] + row).to(gl.int64) * SIZES[1] + GROUP * GROUP_ROWS
        q_scale = gl.load(q_scales + first_row + rows)
        of_job = (number % JOBS) * GROUPS + GROUP
        mine = jobs[2].index(of_job)
        where = ((split - start) // SIZES[3], (stop - start) // SIZES[3])
        steps = where[1] + dense
        mbarrier.wait(shared[4].index(at[0]), at[1], pred=steps > 0)
        products = _scores(mine, shared[0], at[0], SIZES[2], s_layout)
        k_scales = _pair_of(shared[2], at[0], SIZES[3])
        bits = _bits(masks, shared[3], at[0], 0, where, GROUP * GROUP_ROWS, SIZES, PARTIAL)
        products = warpgroup_mma_wait(0, deps=[products])
        scores = products.to(gl.float32, bitcast=True)
        scores = _hide(scores, bits, 0, where, runs, s_layout, PARTIAL, RAGGED)
        level = gl.full([GROUP_ROWS], float("-inf"), gl.float32, of_row)
        level = (level, level)
        next_level, kept = level_of(scores, k_scales, q_scale, level)
        second, second_phase = following(at[0], at[1], SIZES[4])
        mbarrier.wait(shared[4].index(second), second_phase, pred=steps > 1)
        total = no_sums(products)
        acc = gl.zeros([GROUP_ROWS, SIZES[0]], gl.float32, o_layout)
        state = (scores, next_level, kept, acc, total)
        for step in range(0, steps):
            state, level, at = _step(
                step, steps, mine, q_scale, shared, masks, where, runs, state, at,
                GROUP * GROUP_ROWS, SIZES, PARTIAL, RAGGED, s_layout, o_layout, p_layout,
            )  # fmt: skip
        _products, _level, _kept, acc, total = state
        # Read again, they need not be kept in registers meanwhile.
        row, pair, _start, _split, _stop, _dense = next_job(jobs, number, 4)
        first_row = (pair * sizes[3] + row).to(gl.int64) * SIZES[1] + GROUP * GROUP_ROWS
        rows_of = (q_offset + first_row, jobs[1].index(of_job))
        total = gl.convert_layout(gl.sum(total, 1), of_row)
        _write(acc, level[1], total, rows_of, shared[7].index(GROUP), out, lse, v_shift, v_scale, pair, sizes,
               LSE, SIZES[5], s_layout)  # fmt: skip
        finish_job(jobs, number)
        number += 1
        row, pair, start, split, stop, dense = next_job(jobs, number, 4)


@gluon.jit(do_not_specialize=[*RUNTIME_SIZES, "tiles", "run_tiles", "row_tiles"])
def attend_8bit(
    q8, k8, v8, q_scale, q_offset, k_scale, v_shift, v_scale, out, lse, taken,
    tokens, bounds, bases, tile_of, mask_ids, masks, bounds_batch, list_batch, list_heads,
    heads, group, length, tiles, run_tiles, row_tiles,
    dense_rows, grid_rows, pairs, prefix_tiles, suffix_tiles, prefix, suffix_start, suffix, extra,
    HEAD_DIM: gl.constexpr, ROWS: gl.constexpr, COLUMNS: gl.constexpr, TILES: gl.constexpr, STAGES: gl.constexpr,
    LSE: gl.constexpr, PARTIAL: gl.constexpr, RAGGED: gl.constexpr, FP8: gl.constexpr,
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
        RAGGED: Whether a run of dense tokens ends inside a step (`Program.ragged`).
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
    seen = gl.allocate_shared_memory(gl.int32, [STAGES, TILES], plain)
    staging = gl.allocate_shared_memory(
        out.dtype.element_ty, [GROUPS, GROUP_ROWS, HEAD_DIM], gl.NVMMASharedLayout(128, 16, rank=2)
    )
    ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    # A barrier that nothing waits for would share its memory with what the warps are handed, and spoil it.
    turns = free
    if PARTIAL:
        turns = gl.allocate_shared_memory(gl.int64, [GROUPS, 1], mbarrier.MBarrierLayout())
        for i in gl.static_range(GROUPS):
            mbarrier.init(turns.index(i), count=1)
    jobs = ring_of_jobs(queries, GROUPS + 1)
    for i in gl.static_range(STAGES):
        mbarrier.init(ready.index(i), count=1)
        mbarrier.init(free.index(i), count=GROUPS)
    fence_async_shared()
    if PARTIAL:
        mbarrier.arrive(turns.index(0), count=1)

    SIZES: gl.constexpr = (HEAD_DIM, ROWS, COLUMNS, TILES, STAGES, FP8)
    shared = (keys, values, scales, seen, ready, free, turns, staging)
    runs = (prefix_tiles, suffix_tiles, prefix, suffix_start, suffix, extra)
    sizes = (heads, group, length, row_tiles)
    per_row = (q_scale, q_offset)
    gl.warp_specialize(
        [
            (_consume, (out, lse, per_row, v_shift, v_scale, shared, jobs, masks, sizes, runs, gl.constexpr(0),
                        SIZES, PARTIAL, RAGGED, LSE)),
            (_consume, (out, lse, per_row, v_shift, v_scale, shared, jobs, masks, sizes, runs, gl.constexpr(1),
                        SIZES, PARTIAL, RAGGED, LSE)),
            (copy_columns, (k8, v8, k_scale, bases, tile_of, mask_ids, shared, jobs, sizes, tiles, run_tiles,
                            SIZES, PARTIAL)),
            (deal, (q8, tokens, bounds, taken, jobs, dense_rows, grid_rows, pairs, row_tiles,
                     (bounds_batch, list_batch, list_heads), SIZES)),
        ],
        [4, 1, 1],
        [240, 24, 24],
    )  # fmt: skip
