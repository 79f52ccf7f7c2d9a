"""Forward kernel for Hopper: tiles come by the tensor memory accelerator, products and softmax overlap.

The work of `forward.attend`, in Gluon (Triton's lower level), with the schedule of FlashAttention-3 (Shah et al.
2024, sections 3.1 and 3.2): one warp copies column tiles into a ring of shared memory, and two groups of four warps
each hold half of the row tile. A group starts the scores of the next column tile, then adds the current one to its
output, so that the tensor cores work while it computes the softmax of the scores that are ready.

A program stays on its multiprocessor and takes one row tile (a job) after the other. Their steps are one loop: the
scores of a job's first step run while the last step of the job before is added to its output.
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

from visattn.kernels.triton.hopper.copy import produce
from visattn.kernels.triton.hopper.fill import put_masks
from visattn.kernels.triton.hopper.jobs import JOBS, deal, finish_job, halves_of_job, next_job, ring_of_jobs
from visattn.kernels.triton.hopper.parts import (
    GROUP_ROWS,
    GROUPS,
    LN2,
    following,
    hide_behind,
    hide_masked,
    mask_bits,
    next_left_out,
    product_layout,
    row_layout,
    rows_inside,
    visit_of_half,
    wait_for_threads,
)
from visattn.kernels.triton.parts import RUNTIME_SIZES


@gluon.jit
def _softmax(scores, top, total, scale):
    """One step of the online softmax, base 2; a row that has seen no key yet has top = -inf."""
    new = gl.maximum(top, gl.max(scores, 1))
    base = gl.where(new == float("-inf"), 0.0, new * scale)
    p = gl.exp2(scores * scale - base[:, None])
    alpha = gl.exp2(top * scale - base)
    return p, new, total * alpha + gl.sum(p, 1), alpha


@gluon.jit
def _hide(scores, words, masked, step, listed, runs, layout: gl.constexpr, PARTIAL: gl.constexpr, RAGGED: gl.constexpr):
    """Scores of one step with -inf where a mask says so, or behind the end of a run of dense tokens.

    Steps from `listed` on are runs.
    """
    if PARTIAL:
        if masked:
            scores = hide_masked(scores, words, layout)
    if RAGGED:
        scores = hide_behind(scores, step - listed, runs, layout)
    return scores


@gluon.jit
def _start_scores(mine, shared, slot, SIZES: gl.constexpr, s_layout: gl.constexpr):
    """Start the product of queries and the keys of a slot; scores of masked keys begin, and so remain, at -inf."""
    keys, visible = shared[0], shared[7]
    KEY_MASK: gl.constexpr = SIZES[6]
    shape: gl.constexpr = [GROUP_ROWS, SIZES[2]]
    if KEY_MASK:
        begin = visible.index(slot).load(gl.SliceLayout(0, s_layout))[None, :].broadcast_to(shape)
    else:
        begin = gl.zeros(shape, gl.float32, s_layout)
    return warpgroup_mma(mine, keys.index(slot).permute((1, 0)), begin, use_acc=KEY_MASK, is_async=True)


@gluon.jit
def _step(
    step, steps, any_before, adds, mine, shared, lists, where, marked, scale, runs, state, at,
    first_row: gl.constexpr, SIZES: gl.constexpr, PARTIAL: gl.constexpr, RAGGED: gl.constexpr,
    s_layout: gl.constexpr, p_layout: gl.constexpr,
):  # fmt: skip
    """Scores and softmax of one step, while the step before is added to its output, which may be another job's.

    `state` is the output without the step before this one, that step's weights, and top and total of each row; `at`
    slot and phase of this step's keys, which are there, of the values of this step, and of those of the step before,
    and whose turn it is. `marked` is where listed steps have masks for these rows. `any_before` is False in a program's
    first step only; `adds` says whether the job of the step before had one before that.
    """
    keys, values, k_ready, k_free, v_ready, v_free, turns, _ = shared
    acc, weights, top, total = state
    k_slot, k_phase, v_slot, v_phase, last_slot, last_phase, turn = at
    start, stop = where
    TILES: gl.constexpr = SIZES[3]
    STAGES: gl.constexpr = SIZES[4]
    TURNS: gl.constexpr = SIZES[5]
    VALUE_STAGES: gl.constexpr = SIZES[8]
    group: gl.constexpr = first_row // GROUP_ROWS
    i = start + step * TILES
    masked = (i >= marked[0]) & (i < marked[1])
    words = ()
    if PARTIAL:
        # Their loads are done by the time that the scores are.
        mask = gl.load(lists[1] + i, mask=masked, other=0)
        second = gl.load(lists[1] + i + TILES - 1, mask=masked, other=0)
        words = mask_bits(lists[0], mask, second, first_row, masked, SIZES[2], SIZES[1], TILES)
    if TURNS:
        mbarrier.wait(turns.index(group), turn)
    scores = _start_scores(mine, shared, k_slot, SIZES, s_layout)
    mbarrier.wait(v_ready.index(last_slot), last_phase, pred=any_before)
    acc = warpgroup_mma(weights, values.index(last_slot), acc, use_acc=adds, is_async=True)
    if TURNS:
        mbarrier.arrive(turns.index(1 - group), count=1)
    scores = warpgroup_mma_wait(1, deps=[scores])
    done_slot = k_slot
    if not SIZES[9]:
        mbarrier.arrive(k_free.index(k_slot), count=1)
    scores = _hide(scores, words, masked, step, (stop - start) // TILES, runs, s_layout, PARTIAL, RAGGED)
    fresh, top, total, alpha = _softmax(scores, top, total, scale)
    fresh = gl.convert_layout(fresh.to(keys.dtype), p_layout)
    # Waiting here for the next keys keeps the assembler from moving the softmax behind the wait for the product.
    k_slot, k_phase = following(k_slot, k_phase, STAGES)
    mbarrier.wait(k_ready.index(k_slot), k_phase, pred=step + 1 < steps)
    acc, weights = warpgroup_mma_wait(0, deps=[acc, weights])
    if SIZES[9]:
        # One arrival for both, since each costs a barrier of the group; there is a slot more of values than of keys.
        mbarrier.arrive(k_free.index(done_slot), count=1)
    else:
        mbarrier.arrive(v_free.index(last_slot), count=1, pred=any_before)
    next_slot, next_phase = following(v_slot, v_phase, VALUE_STAGES)
    at = (k_slot, k_phase, next_slot, next_phase, v_slot, v_phase, turn ^ 1)
    return (acc, fresh, top, total), alpha, at


@gluon.jit
def _leave_out(step, steps, shared, at, SIZES: gl.constexpr):
    """Give the slots of a step back in which these rows see nothing; its keys are there."""
    _, _, k_ready, k_free, v_ready, v_free, _, _ = shared
    k_slot, k_phase, v_slot, v_phase, last_slot, last_phase, turn = at
    mbarrier.wait(v_ready.index(v_slot), v_phase)
    # No warp may miss a phase: all have waited before another can begin.
    wait_for_threads()
    mbarrier.arrive(k_free.index(k_slot), count=1)
    mbarrier.arrive(v_free.index(v_slot), count=1)
    k_slot, k_phase = following(k_slot, k_phase, SIZES[4])
    v_slot, v_phase = following(v_slot, v_phase, SIZES[8])
    mbarrier.wait(k_ready.index(k_slot), k_phase, pred=step + 1 < steps)
    return k_slot, k_phase, v_slot, v_phase, last_slot, last_phase, turn


@gluon.jit
def _write(
    acc, top, total, mine, tokens, out, lse, pair, sizes,
    HEAD_DIM: gl.constexpr, LSE: gl.constexpr, s_layout: gl.constexpr,
):  # fmt: skip
    """Store the results of a group's rows, through their queries' memory to a layout whose stores are whole lines."""
    heads, length, scale = sizes
    o_layout: gl.constexpr = acc.type.layout
    BLOCK_DIM: gl.constexpr = acc.shape[1]
    io: gl.constexpr = row_layout(BLOCK_DIM)
    divisor = gl.convert_layout(gl.where(total == 0.0, 1.0, total), gl.SliceLayout(1, o_layout))
    mine.store((acc / divisor[:, None]).to(mine.dtype))
    token = tokens.load(gl.SliceLayout(1, io))
    sample, head = (pair // heads).to(gl.int64), (pair % heads).to(gl.int64)
    out_row = ((sample * length + token) * heads + head) * HEAD_DIM
    d = gl.arange(0, BLOCK_DIM, gl.SliceLayout(0, io))
    inside = rows_inside(token, d, HEAD_DIM, BLOCK_DIM)
    gl.store(out + out_row[:, None] + d[None, :], mine.load(io), mask=inside)
    if LSE:
        row_token = tokens.load(gl.SliceLayout(1, s_layout))
        # total = 0 gives log2 -inf, as it should be.
        peak = gl.where(total == 0.0, 0.0, top * scale)
        to = lse + pair.to(gl.int64) * length + row_token
        gl.store(to, (peak + gl.log2(total)) * LN2, mask=row_token >= 0)


@gluon.jit
def _consume(
    out, lse, shared, jobs, lists, sizes, runs,
    GROUP: gl.constexpr, SIZES: gl.constexpr, PARTIAL: gl.constexpr, RAGGED: gl.constexpr, LSE: gl.constexpr,
):  # fmt: skip
    """One group of four warps: its 64 rows of each tile that the program takes, and their results.

    A job's last step is added to its output, and the results are written, in the first step of the job after; behind
    the last job there is one step more, whose scores are nobody's.
    """
    keys, _, k_ready, _, _, _, _, _ = shared
    HALVES: gl.constexpr = SIZES[7]
    s_layout: gl.constexpr = product_layout(SIZES[2])
    o_layout: gl.constexpr = product_layout(SIZES[0])
    p_layout: gl.constexpr = gl.DotOperandLayout(0, o_layout, 2)
    of_row: gl.constexpr = gl.SliceLayout(1, s_layout)
    top = gl.full([GROUP_ROWS], float("-inf"), gl.float32, of_row)
    total = gl.zeros([GROUP_ROWS], gl.float32, of_row)
    acc = gl.zeros([GROUP_ROWS, SIZES[0]], gl.float32, o_layout)
    weights = gl.zeros([GROUP_ROWS, SIZES[2]], keys.dtype, p_layout)
    number = 0
    done_pair = 0
    going = True
    at = (0, 0, 0, 0, 0, 0, 0)
    adds = False
    while going:
        row, pair, start, split, stop, dense = next_job(jobs, number, 4)
        going = row >= 0
        mbarrier.wait(k_ready.index(at[0]), at[1], pred=going)
        steps = gl.where(going, (stop - start) // SIZES[3] + dense, 1)
        done_top = top
        done_total = total
        top = gl.full([GROUP_ROWS], float("-inf"), gl.float32, of_row)
        total = gl.zeros([GROUP_ROWS], gl.float32, of_row)
        mine = jobs[2].index((number % JOBS) * GROUPS + GROUP)
        marked = (split, stop)
        active = steps
        if HALVES:
            second, alone, ends = halves_of_job(jobs, number, 4)
            marked = (second, stop) if GROUP == 0 else (split, ends)
            # Steps of one half come in turns: each half leaves every other one out.
            turn_from = (alone - start) // SIZES[3]
            turns = (ends - alone) // (2 * SIZES[3])
            active = gl.where(going, steps - turns, 1)
        for index in range(0, active):
            step = index
            if HALVES:
                step = gl.where(going, visit_of_half(index, turn_from, turns, GROUP), index)
            state = (acc, weights, top, total)
            any_before = (number > 0) | (index > 0)
            state, alpha, at = _step(
                step, steps, any_before, adds, mine, shared, lists, (start, stop), marked, sizes[2], runs, state, at,
                GROUP * GROUP_ROWS, SIZES, PARTIAL, RAGGED, s_layout, p_layout,
            )  # fmt: skip
            adds = index > 0
            if HALVES:
                if going & next_left_out(index, turn_from, turns, GROUP):
                    at = _leave_out(step + 1, steps, shared, at, SIZES)
            acc, weights, top, total = state
            if (index == 0) & (number > 0):
                slot = ((number - 1) % JOBS) * GROUPS + GROUP
                _write(acc, done_top, done_total, jobs[2].index(slot), jobs[1].index(slot), out, lse, done_pair,
                       sizes, SIZES[10], LSE, s_layout)  # fmt: skip
                finish_job(jobs, number - 1)
            acc = acc * gl.convert_layout(alpha, gl.SliceLayout(1, o_layout))[:, None]
        number += 1
        done_pair = pair


@gluon.jit
def _copy_columns(
    k_grid, v_grid, k_runs, v_runs, rings, bases, jobs, heads, group, sides, runs,
    BOX: gl.constexpr, FOLDED: gl.constexpr, SIZES: gl.constexpr,
):  # fmt: skip
    """The copying warp: keys and values of each tile that the program takes."""
    BLOCK_DIM: gl.constexpr = SIZES[0]
    slot = 0
    phase = 1
    v_slot = 0
    v_phase = 1
    number = 0
    row, pair, start, _split, stop, dense = next_job(jobs, number, 1)
    while row >= 0:
        finish_job(jobs, number)
        sample, kv_head = pair // heads, pair % heads // group
        if FOLDED:
            outer, column = sample, kv_head * SIZES[10]
        else:
            outer, column = sample * (heads // group) + kv_head, kv_head * 0
        slot, phase, v_slot, v_phase = produce(
            k_grid, v_grid, k_runs, v_runs, rings, bases, (start, stop, dense),
            (outer, column, sides[0], sides[1]), runs, slot, phase, v_slot, v_phase,
            BOX, SIZES[2], SIZES[3], BLOCK_DIM, SIZES[4], SIZES[8], not SIZES[9],
        )  # fmt: skip
        number += 1
        row, pair, start, _split, stop, dense = next_job(jobs, number, 1)


@gluon.jit(do_not_specialize=[*RUNTIME_SIZES, "side_y", "side_x"])
def attend(
    k_grid, v_grid, k_runs, v_runs, q, out, lse, key_mask, taken,
    tokens, bounds, halves, bases, mask_ids, offsets, masks,
    q_batch, q_token, q_head, bounds_batch, list_batch, list_heads,
    scale, heads, group, length, key_length,
    dense_rows, grid_rows, pairs, prefix_tiles, suffix_tiles, prefix, suffix_start, suffix, extra, side_y, side_x,
    HEAD_DIM: gl.constexpr, BLOCK_DIM: gl.constexpr, ROWS: gl.constexpr, COLUMNS: gl.constexpr, TILES: gl.constexpr,
    BOX: gl.constexpr, FOLDED: gl.constexpr, STAGES: gl.constexpr, UNIT: gl.constexpr, LSE: gl.constexpr,
    PARTIAL: gl.constexpr, RAGGED: gl.constexpr, KEY_MASK: gl.constexpr, TURNS: gl.constexpr,
    HALVES: gl.constexpr, VALUE_STAGES: gl.constexpr, TOGETHER: gl.constexpr,
):  # fmt: skip
    """Attention of query tiles of 128 tokens; see `forward.attend` for what the arguments share with it.

    Args (besides those of `forward.attend`):
        k_grid: Descriptor of the grid's keys as [outer, t, y, x, channels]; `v_grid` of its values.
        k_runs: Descriptor of all keys as [outer, 1, 1, tokens, channels]; `v_runs` of all values.
        taken: Counts the tiles that programs take: int32 [1], 0 before and after.
        side_y: Length of the grid's second last axis.
        side_x: Length of its last axis.
        BOX: Tokens of a column tile per axis (t, y, x).
        FOLDED: Whether heads lie in the channels of the descriptors; else in `outer`, behind the samples.
        TURNS: Whether the two groups of warps take turns in starting their products.
        BLOCK_DIM: Channels that are computed with, 64 or 128: those from HEAD_DIM on are zero or not stored.
        RAGGED: Whether a run of dense tokens ends inside a step (`Program.ragged`).
        HALVES: Whether `halves` says what each half of a row tile has to do (`Program.halves`).
        VALUE_STAGES: Slots of the ring of values; that of keys has STAGES.
        TOGETHER: Whether the keys of a step and the values of the step before are given back by one arrival, for which
            VALUE_STAGES must exceed STAGES and steps must not be left out.
    """
    layout: gl.constexpr = gl.NVMMASharedLayout(128, 16, rank=2)
    dtype: gl.constexpr = q.dtype.element_ty
    queries = gl.allocate_shared_memory(dtype, [JOBS * GROUPS, GROUP_ROWS, BLOCK_DIM], layout)
    keys = gl.allocate_shared_memory(dtype, [STAGES, COLUMNS, BLOCK_DIM], layout)
    values = gl.allocate_shared_memory(dtype, [VALUE_STAGES, COLUMNS, BLOCK_DIM], layout)
    k_ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    k_free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_ready = gl.allocate_shared_memory(gl.int64, [VALUE_STAGES, 1], mbarrier.MBarrierLayout())
    # A barrier that nothing waits for would share its memory with what the warps are handed, and spoil it.
    v_free = k_free
    if not TOGETHER:
        v_free = gl.allocate_shared_memory(gl.int64, [VALUE_STAGES, 1], mbarrier.MBarrierLayout())
    turns = k_free
    if TURNS:
        turns = gl.allocate_shared_memory(gl.int64, [GROUPS, 1], mbarrier.MBarrierLayout())
        for i in gl.static_range(GROUPS):
            mbarrier.init(turns.index(i), count=1)
    plain: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    # Both groups, the copying warp, and the one for the mask.
    jobs = ring_of_jobs(queries, GROUPS + 2 if KEY_MASK else GROUPS + 1)
    visible = keys
    if KEY_MASK:
        visible = gl.allocate_shared_memory(gl.float32, [STAGES, COLUMNS], plain)
    for i in gl.static_range(STAGES):
        # Keys, and what their scores begin with.
        mbarrier.init(k_ready.index(i), count=2 if KEY_MASK else 1)
        mbarrier.init(k_free.index(i), count=GROUPS)
    for i in gl.static_range(VALUE_STAGES):
        mbarrier.init(v_ready.index(i), count=1)
        if not TOGETHER:
            mbarrier.init(v_free.index(i), count=GROUPS)
    fence_async_shared()
    if TURNS:
        mbarrier.arrive(turns.index(0), count=1)

    SIZES: gl.constexpr = (
        BLOCK_DIM, ROWS, COLUMNS, TILES, STAGES, TURNS, KEY_MASK, HALVES, VALUE_STAGES, TOGETHER, HEAD_DIM,
    )  # fmt: skip
    rings = (keys, values, k_ready, k_free, v_ready, v_free)
    shared = (keys, values, k_ready, k_free, v_ready, v_free, turns, visible)
    runs = (prefix_tiles, suffix_tiles, prefix, suffix_start, suffix, extra)
    lists = (masks, mask_ids)
    sizes = (heads, length, scale)
    gl.warp_specialize(
        [
            (_consume, (out, lse, shared, jobs, lists, sizes, runs, gl.constexpr(0), SIZES, PARTIAL, RAGGED, LSE)),
            (_consume, (out, lse, shared, jobs, lists, sizes, runs, gl.constexpr(1), SIZES, PARTIAL, RAGGED, LSE)),
            (_copy_columns, (k_grid, v_grid, k_runs, v_runs, rings, bases, jobs, heads, group, (side_y, side_x), runs,
                             BOX, FOLDED, SIZES)),
            (deal, (q, tokens, bounds, halves, taken, jobs, (q_batch, q_token, q_head), heads, dense_rows, grid_rows,
                    pairs, (bounds_batch, list_batch, list_heads), SIZES, UNIT)),
            (put_masks, (key_mask, bases, offsets, shared, jobs, runs, heads, key_length, SIZES)),
        ],
        [4, 1, 1, 1],
        [240, 24, 24, 24],
    )  # fmt: skip
