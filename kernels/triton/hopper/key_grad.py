"""Backward kernel for keys and values on Hopper: query tiles come by the tensor memory accelerator.

The work of `key_grad.key_gradients`, in Gluon (Triton's lower level), with warps that have roles (as in
FlashAttention-3, Shah et al. 2024, section 3.1): one warp copies query tiles and their output gradients into a ring of
shared memory, one puts the softmax statistics of their queries beside them, and two groups of four warps each hold 64
keys and values, with their gradients in registers. Everything is transposed: [keys, queries].
"""

# What a kernel takes and returns exists on the GPU only: Python types would say nothing.
# ruff: noqa: ANN001, ANN201, ANN202, SIM102

# The language of Triton kernels is not quite Python.
# pyright: reportArgumentType=false, reportGeneralTypeIssues=false, reportAttributeAccessIssue=false, reportCallIssue=false, reportIndexIssue=false, reportOptionalMemberAccess=false, reportAssignmentType=false
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
from visattn.kernels.triton.hopper.fill import put_statistics
from visattn.kernels.triton.hopper.parts import (
    GROUP_ROWS,
    GROUPS,
    LN2,
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
)
from visattn.kernels.triton.parts import RUNTIME_SIZES


@gluon.jit
def add_tile(
    i, shared, rings, lists, score_scale, state, at,
    GROUP: gl.constexpr, SIZES: gl.constexpr, MASKED: gl.constexpr,
):  # fmt: skip
    """Add one query tile to both gradients, which are `state`; `at` is its slot and phase."""
    keys, values, queries, grads, q_ready, free, grad_ready = shared
    acc_k, acc_v = state
    slot, phase = at
    BLOCK_DIM: gl.constexpr = SIZES[0]
    COLUMNS: gl.constexpr = SIZES[2]
    STAGES: gl.constexpr = SIZES[4]
    s_layout: gl.constexpr = product_layout(COLUMNS)
    p_layout: gl.constexpr = gl.DotOperandLayout(0, product_layout(BLOCK_DIM), 2)
    of_column: gl.constexpr = gl.SliceLayout(0, s_layout)
    shape: gl.constexpr = [GROUP_ROWS, COLUMNS]
    first_row: gl.constexpr = GROUP * GROUP_ROWS
    if MASKED:
        mask = gl.load(lists[2] + i)
        words = mask_bits(lists[1], mask, mask, first_row, True, COLUMNS, SIZES[1], 1)
    mbarrier.wait(q_ready.index(slot), phase)
    begin = rings[0].index(slot).load(of_column)[None, :].broadcast_to(shape)
    scores = warpgroup_mma(keys.index(GROUP), queries.index(slot).permute((1, 0)), begin, is_async=True)
    begin = rings[1].index(slot).load(of_column)[None, :].broadcast_to(shape)
    mbarrier.wait(grad_ready.index(slot), phase)
    grad_weights = warpgroup_mma(values.index(GROUP), grads.index(slot).permute((1, 0)), begin, is_async=True)
    scores = warpgroup_mma_wait(1, deps=[scores])
    if MASKED:
        scores = hide_masked(scores, words, s_layout)
    p = gl.exp2(scores * score_scale)
    weights = gl.convert_layout(p.to(keys.dtype), p_layout)
    acc_v = warpgroup_mma(weights, grads.index(slot), acc_v, is_async=True)
    grad_weights = warpgroup_mma_wait(1, deps=[grad_weights])
    grad_scores = gl.convert_layout((p * grad_weights).to(keys.dtype), p_layout)
    acc_k = warpgroup_mma(grad_scores, queries.index(slot), acc_k, is_async=True)
    # Products that ran on into the next step would be serialised by the assembler, all of them.
    acc_k, acc_v, weights, grad_scores = warpgroup_mma_wait(0, deps=[acc_k, acc_v, weights, grad_scores])
    mbarrier.arrive(free.index(slot), count=1)
    slot, phase = following(slot, phase, STAGES)
    return (acc_k, acc_v), (slot, phase)


@gluon.jit
def load_rows(k, v, tokens, k_step, v_step, keys, values, GROUP: gl.constexpr, HEAD_DIM: gl.constexpr):
    """Put a group's keys and values, of a row tile whose tokens begin at `tokens`, into shared memory."""
    BLOCK_DIM: gl.constexpr = keys.shape[2]
    io: gl.constexpr = row_layout(BLOCK_DIM)
    slots = GROUP * GROUP_ROWS + gl.arange(0, GROUP_ROWS, gl.SliceLayout(1, io))
    d = gl.arange(0, BLOCK_DIM, gl.SliceLayout(0, io))
    token = gl.load(tokens + slots)
    here = rows_inside(token, d, HEAD_DIM, BLOCK_DIM)
    wide = token.to(gl.int64)[:, None]
    keys.index(GROUP).store(gl.load(k + wide * k_step + d[None, :], mask=here, other=0.0))
    values.index(GROUP).store(gl.load(v + wide * v_step + d[None, :], mask=here, other=0.0))


@gluon.jit
def store_rows(
    own_k, own_v, grad_k, grad_v, key_mask, tokens, step, keys, values,
    GROUP: gl.constexpr, HEAD_DIM: gl.constexpr, KEY_MASK: gl.constexpr,
):  # fmt: skip
    """Store the gradients of a group's rows, through the memory of its keys and values to whole lines."""
    BLOCK_DIM: gl.constexpr = keys.shape[2]
    io: gl.constexpr = row_layout(BLOCK_DIM)
    slots = GROUP * GROUP_ROWS + gl.arange(0, GROUP_ROWS, gl.SliceLayout(1, io))
    d = gl.arange(0, BLOCK_DIM, gl.SliceLayout(0, io))
    keys.index(GROUP).store(own_k.to(keys.dtype))
    values.index(GROUP).store(own_v.to(keys.dtype))
    # Loaded again (volatile: not merged with the first load) to hold fewer registers in the loops.
    token = gl.load(tokens + slots, volatile=True)
    here = rows_inside(token, d, HEAD_DIM, BLOCK_DIM)
    out_row = token.to(gl.int64)[:, None] * step + d[None, :]
    own_k = keys.index(GROUP).load(io)
    own_v = values.index(GROUP).load(io)
    if KEY_MASK:
        # Rows do not mix, so masked keys are dropped only here.
        kept = (gl.load(key_mask + token, mask=token >= 0, other=0) != 0)[:, None]
        own_k = gl.where(kept, own_k, 0.0)
        own_v = gl.where(kept, own_v, 0.0)
    gl.store(grad_k + out_row, own_k, mask=here)
    gl.store(grad_v + out_row, own_v, mask=here)


@gluon.jit
def _consume(
    k, v, grad_k, grad_v, key_mask, shared, rings, lists, where, sizes,
    GROUP: gl.constexpr, SIZES: gl.constexpr, UNIT: gl.constexpr, PARTIAL: gl.constexpr, DENSE: gl.constexpr,
    KEY_MASK: gl.constexpr, HALVES: gl.constexpr,
):  # fmt: skip
    """One group of four warps: its 64 keys and values against every query tile, and their gradients."""
    keys, values, _, _, _, _, _ = shared
    row, start, split, stop, dense = where
    k_token, v_token, grad_token, score_scale = sizes
    BLOCK_DIM: gl.constexpr = SIZES[0]
    ROWS: gl.constexpr = SIZES[1]
    o_layout: gl.constexpr = product_layout(BLOCK_DIM)

    load_rows(k, v, lists[0] + row * ROWS, k_token * UNIT, v_token * UNIT, keys, values, GROUP, SIZES[5])
    fence_async_shared()

    nothing = gl.zeros([GROUP_ROWS, BLOCK_DIM], gl.float32, o_layout)
    state = (nothing, nothing)
    at = (0, 0)
    alone = stop
    turns = 0
    if HALVES:
        split, alone, turns = half_of_row(lists[3], row, split, GROUP)
    for i in range(start, split):
        state, at = add_tile(i, shared, rings, lists, score_scale, state, at, GROUP, SIZES, False)
        if HALVES and GROUP == 1:
            if next_left_out(i, alone, turns, GROUP):
                at = leave_out((shared[4], shared[6]), shared[5], at, SIZES[4])
    if PARTIAL:
        for index in range(split, stop - turns):
            i = index
            if HALVES:
                i = visit_of_half(index, alone, turns, GROUP)
            state, at = add_tile(i, shared, rings, lists, score_scale, state, at, GROUP, SIZES, True)
            if HALVES:
                if next_left_out(index, alone, turns, GROUP):
                    at = leave_out((shared[4], shared[6]), shared[5], at, SIZES[4])
    if DENSE:
        for i in range(0, dense):
            state, at = add_tile(i, shared, rings, lists, score_scale, state, at, GROUP, SIZES, False)
    acc_k, acc_v = state

    store_rows(
        acc_k * (score_scale * LN2), acc_v, grad_k, grad_v, key_mask, lists[0] + row * ROWS, grad_token, keys, values,
        GROUP, SIZES[5], KEY_MASK,
    )  # fmt: skip


@gluon.jit
def copy_columns(
    q_grid, grad_grid, q_runs, grad_runs, copied, bases, where, place, runs,
    BOX: gl.constexpr, SIZES: gl.constexpr,
):  # fmt: skip
    """The copying warp: queries and the gradients of their outputs."""
    _, start, _, stop, dense = where
    slot = 0
    phase = 1
    produce(q_grid, grad_grid, q_runs, grad_runs, copied, bases, (start, stop, dense), place, runs, slot, phase,
            slot, phase, BOX, SIZES[2], SIZES[3], SIZES[0], SIZES[4], SIZES[4], True)  # fmt: skip


@gluon.jit(do_not_specialize=[*RUNTIME_SIZES, "side_y", "side_x"])
def key_gradients(
    q_grid, grad_grid, q_runs, grad_runs, k, v, lse, delta, grad_k, grad_v, key_mask,
    tokens, bounds, halves, bases, mask_ids, offsets, masks,
    k_batch, k_token, k_head, v_batch, v_token, v_head, bounds_batch, list_batch, list_heads,
    scale, score_scale, heads, length, key_length,
    dense_rows, grid_rows, pairs, prefix_tiles, suffix_tiles, prefix, suffix_start, suffix, extra, side_y, side_x,
    HEAD_DIM: gl.constexpr, BLOCK_DIM: gl.constexpr, ROWS: gl.constexpr, COLUMNS: gl.constexpr,
    BOX: gl.constexpr, FOLDED: gl.constexpr, STAGES: gl.constexpr, UNIT: gl.constexpr,
    PARTIAL: gl.constexpr, DENSE: gl.constexpr, KEY_MASK: gl.constexpr, HALVES: gl.constexpr,
):  # fmt: skip
    """Compute dK and dV of one key tile of 128 tokens; see `key_grad.key_gradients` for what the arguments share.

    Args (besides those of `key_grad.key_gradients`):
        q_grid: Descriptor of the grid's queries as [outer, t, y, x, channels]; `grad_grid` of the gradients of its
            outputs.
        q_runs: Descriptor of all queries as [outer, 1, 1, tokens, channels]; `grad_runs` of all those gradients.
        side_y: Length of the grid's second last axis.
        side_x: Length of its last axis.
        BOX: Tokens of a query tile per axis (t, y, x).
        FOLDED: Whether heads lie in the channels of the descriptors; else in `outer`, behind the samples.
        BLOCK_DIM: Channels that are computed with, 64 or 128: those from HEAD_DIM on are zero or not stored.
        HALVES: Whether `halves` says what each half of a row tile has to do (`Program.halves`).
    """
    row, pair = place(gl.program_id(0), dense_rows, grid_rows, pairs)
    sample, head = (pair // heads).to(gl.int64), (pair % heads).to(gl.int64)
    owner = (pair // list_heads).to(gl.int64)
    bound = bounds + owner * bounds_batch + row * 4
    start, split, stop, dense = gl.load(bound), gl.load(bound + 1), gl.load(bound + 2), gl.load(bound + 3)
    bases += owner * list_batch
    mask_ids += owner * list_batch
    if FOLDED:
        outer, column = sample, head * HEAD_DIM
    else:
        outer, column = sample * heads + head, head * 0
    k += (sample * k_batch + head * k_head) * UNIT
    v += (sample * v_batch + head * v_head) * UNIT
    key_mask += sample * key_length
    out = (sample * key_length * heads + head) * HEAD_DIM
    grad_k += out
    grad_v += out
    lse += pair.to(gl.int64) * length
    delta += pair.to(gl.int64) * length

    layout: gl.constexpr = gl.NVMMASharedLayout(128, 16, rank=2)
    plain: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    dtype: gl.constexpr = k.dtype.element_ty
    keys = gl.allocate_shared_memory(dtype, [GROUPS, GROUP_ROWS, BLOCK_DIM], layout)
    values = gl.allocate_shared_memory(dtype, [GROUPS, GROUP_ROWS, BLOCK_DIM], layout)
    queries = gl.allocate_shared_memory(dtype, [STAGES, COLUMNS, BLOCK_DIM], layout)
    grads = gl.allocate_shared_memory(dtype, [STAGES, COLUMNS, BLOCK_DIM], layout)
    lse_ring = gl.allocate_shared_memory(gl.float32, [STAGES, COLUMNS], plain)
    delta_ring = gl.allocate_shared_memory(gl.float32, [STAGES, COLUMNS], plain)
    q_ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    grad_ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        # Queries and their statistics.
        mbarrier.init(q_ready.index(i), count=2)
        mbarrier.init(grad_ready.index(i), count=1)
        mbarrier.init(free.index(i), count=GROUPS)
    fence_async_shared()

    SIZES: gl.constexpr = (BLOCK_DIM, ROWS, COLUMNS, 1, STAGES, HEAD_DIM)
    shared = (keys, values, queries, grads, q_ready, free, grad_ready)
    rings = (lse_ring, delta_ring, q_ready, free)
    copied = (queries, grads, q_ready, free, grad_ready, free)
    where = (row, start, split, stop, dense)
    runs = (prefix_tiles, suffix_tiles, prefix, suffix_start, suffix, extra)
    lists = (tokens, masks, mask_ids, halves)
    sizes = (k_token, v_token, heads * HEAD_DIM, score_scale)
    gl.warp_specialize(
        [
            (_consume, (k, v, grad_k, grad_v, key_mask, shared, rings, lists, where, sizes,
                        gl.constexpr(0), SIZES, UNIT, PARTIAL, DENSE, KEY_MASK, HALVES)),
            (_consume, (k, v, grad_k, grad_v, key_mask, shared, rings, lists, where, sizes,
                        gl.constexpr(1), SIZES, UNIT, PARTIAL, DENSE, KEY_MASK, HALVES)),
            (copy_columns, (q_grid, grad_grid, q_runs, grad_runs, copied, bases, where,
                             (outer.to(gl.int32), column.to(gl.int32), side_y, side_x), runs, BOX, SIZES)),
            (put_statistics, (lse, delta, bases, offsets, rings, where, runs, scale, length, COLUMNS, STAGES)),
        ],
        [4, 1, 1],
        [240, 24, 24],
    )  # fmt: skip
