"""Backward kernel for queries on Hopper: keys and values come by the tensor memory accelerator.

The work of `query_grad.query_gradients`, in Gluon (Triton's lower level), with the roles of `hopper.key_grad`: one warp
copies key tiles and their values into a ring of shared memory, and two groups of four warps each hold 64 queries and
gradients of their outputs in shared memory, and their gradients in registers.
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
from visattn.kernels.triton.hopper.fill import put_tile_masks
from visattn.kernels.triton.hopper.parts import (
    GROUP_ROWS,
    GROUPS,
    dense_run,
    following,
    half_of_row,
    hide_masked,
    leave_out,
    mask_bits,
    next_left_out,
    place,
    product_layout,
    row_layout,
    rows_inside,
    visit_of_half,
    wait_for_threads,
)
from visattn.kernels.triton.parts import RUNTIME_SIZES

LOG2E = gl.constexpr(1.4426950408889634)


@gluon.jit
def _step(
    i, shared, lists, score_scale, row_lse, row_delta, bounds, state, at,
    GROUP: gl.constexpr, SIZES: gl.constexpr, MASKED: gl.constexpr, DENSE: gl.constexpr,
):  # fmt: skip
    """Scores of one key tile, while the one before is added to the gradient.

    `state` is the gradient without the tile before this one, and the gradients of that one's scores; `at` slot and
    phase of this tile, and the slot before it. `bounds` are the first token and the end of a run of dense tokens.
    """
    queries, grads, keys, values, k_ready, v_ready, free, visible = shared
    acc, factors = state
    slot, phase, last, any_before = at
    COLUMNS: gl.constexpr = SIZES[2]
    STAGES: gl.constexpr = SIZES[4]
    KEY_MASK: gl.constexpr = SIZES[5]
    s_layout: gl.constexpr = product_layout(COLUMNS)
    p_layout: gl.constexpr = gl.DotOperandLayout(0, product_layout(SIZES[0]), 2)
    shape: gl.constexpr = [GROUP_ROWS, COLUMNS]
    first_row: gl.constexpr = GROUP * GROUP_ROWS
    if MASKED:
        mask = gl.load(lists[2] + i)
        words = mask_bits(lists[1], mask, mask, first_row, True, COLUMNS, SIZES[1], 1)
    nothing = gl.zeros(shape, gl.float32, s_layout)
    mbarrier.wait(k_ready.index(slot), phase)
    begin = nothing
    if KEY_MASK:
        # Scores of masked keys begin, and so remain, at -inf.
        begin = visible.index(slot).load(gl.SliceLayout(0, s_layout))[None, :].broadcast_to(shape)
    scores = warpgroup_mma(
        queries.index(GROUP), keys.index(slot).permute((1, 0)), begin, use_acc=KEY_MASK, is_async=True
    )
    mbarrier.wait(v_ready.index(slot), phase)
    grad_weights = warpgroup_mma(
        grads.index(GROUP), values.index(slot).permute((1, 0)), nothing, use_acc=False, is_async=True
    )
    # The first time these are zeros times the keys of the first tile.
    acc = warpgroup_mma(factors, keys.index(last), acc, is_async=True)
    scores = warpgroup_mma_wait(2, deps=[scores])
    if MASKED:
        scores = hide_masked(scores, words, s_layout)
    if DENSE:
        column = gl.arange(0, COLUMNS, gl.SliceLayout(0, s_layout))
        scores = gl.where((bounds[0] + column < bounds[1])[None, :], scores, float("-inf"))
    p = gl.exp2(scores * score_scale - row_lse[:, None])
    grad_weights = warpgroup_mma_wait(1, deps=[grad_weights])
    fresh = gl.convert_layout((p * (grad_weights - row_delta[:, None])).to(keys.dtype), p_layout)
    acc, factors = warpgroup_mma_wait(0, deps=[acc, factors])
    mbarrier.arrive(free.index(last), count=1, pred=any_before)
    following_slot, following_phase = following(slot, phase, STAGES)
    return (acc, fresh), (following_slot, following_phase, slot, True)


@gluon.jit
def _consume(
    q, grad_out, grad_q, lse, delta, shared, lists, where, runs, sizes,
    GROUP: gl.constexpr, SIZES: gl.constexpr, UNIT: gl.constexpr, PARTIAL: gl.constexpr, DENSE: gl.constexpr,
    HALVES: gl.constexpr,
):  # fmt: skip
    """One group of four warps: its 64 queries against every key tile, and their gradients."""
    queries, grads, keys, _, _, _, _, _ = shared
    row, start, split, stop, dense = where
    q_token, grad_token, out_token, scale, score_scale = sizes
    prefix_tiles, suffix_tiles, prefix, suffix_start, suffix, extra = runs
    BLOCK_DIM: gl.constexpr = SIZES[0]
    ROWS: gl.constexpr = SIZES[1]
    COLUMNS: gl.constexpr = SIZES[2]
    s_layout: gl.constexpr = product_layout(COLUMNS)
    o_layout: gl.constexpr = product_layout(BLOCK_DIM)
    p_layout: gl.constexpr = gl.DotOperandLayout(0, o_layout, 2)
    io: gl.constexpr = row_layout(BLOCK_DIM)

    slots = GROUP * GROUP_ROWS + gl.arange(0, GROUP_ROWS, gl.SliceLayout(1, io))
    d = gl.arange(0, BLOCK_DIM, gl.SliceLayout(0, io))
    token = gl.load(lists[0] + row * ROWS + slots)
    here = rows_inside(token, d, SIZES[6], BLOCK_DIM)
    wide = token.to(gl.int64)[:, None]
    queries.index(GROUP).store(gl.load(q + wide * (q_token * UNIT) + d[None, :], mask=here, other=0.0))
    grads.index(GROUP).store(gl.load(grad_out + wide * (grad_token * UNIT) + d[None, :], mask=here, other=0.0))
    fence_async_shared()
    # Every warp's rows are read by the products of all.
    wait_for_threads()
    row_token = gl.load(
        lists[0] + row * ROWS + GROUP * GROUP_ROWS + gl.arange(0, GROUP_ROWS, gl.SliceLayout(1, s_layout))
    )
    # A row that saw no key, or is none, has weight 0 everywhere.
    row_lse = gl.load(lse + row_token, mask=row_token >= 0, other=float("inf"))
    row_lse = gl.where(row_lse == float("-inf"), float("inf"), row_lse * LOG2E)
    row_delta = gl.load(delta + row_token, mask=row_token >= 0, other=0.0)

    state = (
        gl.zeros([GROUP_ROWS, BLOCK_DIM], gl.float32, o_layout),
        gl.zeros([GROUP_ROWS, COLUMNS], keys.dtype, p_layout),
    )
    at = (0, 0, 0, False)
    alone = stop
    turns = 0
    if HALVES:
        split, alone, turns = half_of_row(lists[3], row, split, GROUP)
    for i in range(start, split):
        state, at = _step(
            i, shared, lists, score_scale, row_lse, row_delta, (0, 0), state, at, GROUP, SIZES, False, False
        )
        if HALVES and GROUP == 1:
            if next_left_out(i, alone, turns, GROUP):
                slot, phase = leave_out((shared[4], shared[5]), shared[6], at[:2], SIZES[4])
                at = (slot, phase, at[2], at[3])
    if PARTIAL:
        for index in range(split, stop - turns):
            i = index
            if HALVES:
                i = visit_of_half(index, alone, turns, GROUP)
            state, at = _step(
                i, shared, lists, score_scale, row_lse, row_delta, (0, 0), state, at, GROUP, SIZES, True, False
            )
            if HALVES:
                if next_left_out(index, alone, turns, GROUP):
                    slot, phase = leave_out((shared[4], shared[5]), shared[6], at[:2], SIZES[4])
                    at = (slot, phase, at[2], at[3])
    if DENSE:
        for i in range(0, dense):
            run = dense_run(i, prefix_tiles, suffix_tiles, prefix, suffix_start, suffix, extra, COLUMNS)
            state, at = _step(
                i, shared, lists, score_scale, row_lse, row_delta, run, state, at, GROUP, SIZES, False, True
            )
    acc, factors = state
    # Without a step the ring holds nothing.
    if (start < stop) | (dense > 0):
        acc = warpgroup_mma(factors, keys.index(at[2]), acc, is_async=True)
        acc, factors = warpgroup_mma_wait(0, deps=[acc, factors])

    # Through the memory of queries to a layout whose stores are whole lines.
    queries.index(GROUP).store((acc * scale).to(keys.dtype))
    wait_for_threads()
    # Loaded again (volatile: not merged with the first load) to hold fewer registers in the loops.
    token = gl.load(lists[0] + row * ROWS + slots, volatile=True)
    out_row = token.to(gl.int64)[:, None] * out_token + d[None, :]
    gl.store(grad_q + out_row, queries.index(GROUP).load(io), mask=rows_inside(token, d, SIZES[6], BLOCK_DIM))


@gluon.jit
def _copy_columns(
    k_grid, v_grid, k_runs, v_runs, copied, bases, where, place, runs, BOX: gl.constexpr, SIZES: gl.constexpr
):
    """The copying warp: keys and values."""
    _, start, _, stop, dense = where
    slot = 0
    phase = 1
    produce(k_grid, v_grid, k_runs, v_runs, copied, bases, (start, stop, dense), place, runs, slot, phase, slot, phase,
            BOX, SIZES[2], SIZES[3], SIZES[0], SIZES[4], SIZES[4], True)  # fmt: skip


@gluon.jit
def _put_masks(key_mask, bases, offsets, ring, where, runs, key_length, SIZES: gl.constexpr):
    """The warp for the key mask, idle without one."""
    _, start, _, stop, dense = where
    slot = 0
    phase = 1
    if SIZES[5]:
        put_tile_masks(key_mask, bases, offsets, ring, (start, stop, dense), runs, key_length, slot, phase,
                       SIZES[2], SIZES[3], SIZES[4])  # fmt: skip


@gluon.jit(do_not_specialize=[*RUNTIME_SIZES, "side_y", "side_x"])
def query_gradients(
    k_grid, v_grid, k_runs, v_runs, q, grad_out, lse, delta, grad_q, key_mask,
    tokens, bounds, halves, bases, mask_ids, offsets, masks,
    q_batch, q_token, q_head, grad_batch, grad_token, grad_head, bounds_batch, list_batch, list_heads,
    scale, score_scale, heads, group, length, key_length,
    dense_rows, grid_rows, pairs, prefix_tiles, suffix_tiles, prefix, suffix_start, suffix, extra, side_y, side_x,
    HEAD_DIM: gl.constexpr, BLOCK_DIM: gl.constexpr, ROWS: gl.constexpr, COLUMNS: gl.constexpr,
    BOX: gl.constexpr, FOLDED: gl.constexpr, STAGES: gl.constexpr, UNIT: gl.constexpr,
    PARTIAL: gl.constexpr, DENSE: gl.constexpr, KEY_MASK: gl.constexpr, HALVES: gl.constexpr,
):  # fmt: skip
    """Compute dQ of one query tile of 128 tokens; see `query_grad.query_gradients` for what the arguments share.

    Args (besides those of `query_grad.query_gradients`):
        k_grid: Descriptor of the grid's keys as [outer, t, y, x, channels]; `v_grid` of its values.
        k_runs: Descriptor of all keys as [outer, 1, 1, tokens, channels]; `v_runs` of all values.
        side_y: Length of the grid's second last axis.
        side_x: Length of its last axis.
        BOX: Tokens of a key tile per axis (t, y, x).
        FOLDED: Whether heads lie in the channels of the descriptors; else in `outer`, behind the samples.
        BLOCK_DIM: Channels that are computed with, 64 or 128: those from HEAD_DIM on are zero or not stored.
        HALVES: Whether `halves` says what each half of a row tile has to do (`Program.halves`).
    """
    row, pair = place(gl.program_id(0), dense_rows, grid_rows, pairs)
    sample, head = (pair // heads).to(gl.int64), (pair % heads).to(gl.int64)
    kv_head = head // group
    owner = (pair // list_heads).to(gl.int64)
    bound = bounds + owner * bounds_batch + row * 4
    start, split, stop, dense = gl.load(bound), gl.load(bound + 1), gl.load(bound + 2), gl.load(bound + 3)
    bases += owner * list_batch
    mask_ids += owner * list_batch
    if FOLDED:
        outer, column = sample, kv_head * HEAD_DIM
    else:
        outer, column = sample * (heads // group) + kv_head, kv_head * 0
    q += (sample * q_batch + head * q_head) * UNIT
    grad_out += (sample * grad_batch + head * grad_head) * UNIT
    grad_q += (sample * length * heads + head) * HEAD_DIM
    lse += pair.to(gl.int64) * length
    delta += pair.to(gl.int64) * length

    layout: gl.constexpr = gl.NVMMASharedLayout(128, 16, rank=2)
    dtype: gl.constexpr = q.dtype.element_ty
    queries = gl.allocate_shared_memory(dtype, [GROUPS, GROUP_ROWS, BLOCK_DIM], layout)
    grads = gl.allocate_shared_memory(dtype, [GROUPS, GROUP_ROWS, BLOCK_DIM], layout)
    keys = gl.allocate_shared_memory(dtype, [STAGES, COLUMNS, BLOCK_DIM], layout)
    values = gl.allocate_shared_memory(dtype, [STAGES, COLUMNS, BLOCK_DIM], layout)
    k_ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        # Keys, and what their scores begin with.
        mbarrier.init(k_ready.index(i), count=2 if KEY_MASK else 1)
        mbarrier.init(v_ready.index(i), count=1)
        mbarrier.init(free.index(i), count=GROUPS)
    visible = keys
    if KEY_MASK:
        plain: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
        visible = gl.allocate_shared_memory(gl.float32, [STAGES, COLUMNS], plain)
    fence_async_shared()

    SIZES: gl.constexpr = (BLOCK_DIM, ROWS, COLUMNS, 1, STAGES, KEY_MASK, HEAD_DIM)
    shared = (queries, grads, keys, values, k_ready, v_ready, free, visible)
    copied = (keys, values, k_ready, free, v_ready, free)
    where = (row, start, split, stop, dense)
    runs = (prefix_tiles, suffix_tiles, prefix, suffix_start, suffix, extra)
    lists = (tokens, masks, mask_ids, halves)
    sizes = (q_token, grad_token, heads * HEAD_DIM, scale, score_scale)
    gl.warp_specialize(
        [
            (_consume, (q, grad_out, grad_q, lse, delta, shared, lists, where, runs, sizes,
                        gl.constexpr(0), SIZES, UNIT, PARTIAL, DENSE, HALVES)),
            (_consume, (q, grad_out, grad_q, lse, delta, shared, lists, where, runs, sizes,
                        gl.constexpr(1), SIZES, UNIT, PARTIAL, DENSE, HALVES)),
            (_copy_columns, (k_grid, v_grid, k_runs, v_runs, copied, bases, where,
                             (outer.to(gl.int32), column.to(gl.int32), side_y, side_x), runs, BOX, SIZES)),
            (_put_masks, (key_mask + sample * key_length, bases, offsets, (visible, k_ready, free), where, runs,
                          key_length, SIZES)),
        ],
        [4, 1, 1],
        [240, 24, 24],
    )  # fmt: skip
