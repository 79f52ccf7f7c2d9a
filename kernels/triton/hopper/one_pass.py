"""Backward kernel for queries, keys and values in one pass on Hopper: five products per visited tile.

The work of `hopper.key_grad`, and dQ of the query tiles that it visits. A key tile's part of dQ is the product of the
gradients of scores, which both groups of warps put into shared memory, and the keys; each group has half of the
channels. A warp of its own adds the parts to a buffer of float32 in global memory. Key tiles take turns in that, in the
order in which their programs start, so results repeat bit for bit: `turns` has where whose turn it is.
"""

# What a kernel takes and returns exists on the GPU only: Python types would say nothing.
# ruff: noqa: ANN001, ANN201, ANN202, SIM102, SIM108

# The language of Triton kernels is not quite Python.
# pyright: reportArgumentType=false, reportGeneralTypeIssues=false, reportAttributeAccessIssue=false, reportCallIssue=false, reportIndexIssue=false, reportOptionalMemberAccess=false, reportAssignmentType=false
from __future__ import annotations

import triton
import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language._core import builtin
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from visattn.kernels.triton.hopper.fill import put_statistics
from visattn.kernels.triton.hopper.key_grad import add_tile, copy_columns, load_rows, store_rows
from visattn.kernels.triton.hopper.parts import (
    GROUP_ROWS,
    GROUPS,
    LN2,
    following,
    hide_masked,
    mask_bits,
    product_layout,
    view,
    wait_for_threads,
)
from visattn.kernels.triton.parts import RUNTIME_SIZES

# Channels of one piece of a part of dQ: 128 bytes of float32.
PIECE = gl.constexpr(32)


@builtin
def _add_copy(source, coordinates, target, _semantic=None):
    """Start adding shared memory to the box of a descriptor that begins at these coordinates."""
    from triton._C.libtriton import ir

    handles = _semantic._convert_to_ir_values(coordinates, require_i64=False)
    _semantic.builder.create_async_tma_reduce(ir.DESCRIPTOR_REDUCE_KIND.ADD, target.handle, handles, source.handle)


@gluon.jit
def _place(pid, dense_rows, grid_rows, pairs, together):
    """Row tile and pair of a program: dense rows of all pairs first, then the grid rows of so many pairs in turns."""
    rest = pid - dense_rows * pairs
    is_dense = rest < 0
    first = rest // (grid_rows * together) * together
    number = gl.minimum(together, pairs - first)
    within = rest - first * grid_rows
    row = gl.where(is_dense, pid // pairs, dense_rows + within // number)
    pair = gl.where(is_dense, pid % pairs, first + within % number)
    return row, pair


@gluon.jit
def _visit(
    mask, shared, rings, parts, masks, score_scale, state, at,
    GROUP: gl.constexpr, SIZES: gl.constexpr, PARTIAL: gl.constexpr,
):  # fmt: skip
    """Add one query tile to dK and dV, and put this key tile's part of its dQ into shared memory.

    `state` are dK and dV; `at` is the slot and phase of the tile, and the number of the visit.
    """
    keys, values, queries, grads, q_ready, free, grad_ready = shared
    grad_scores_ring, part, scores_ready, part_ready, part_free = parts
    acc_k, acc_v = state
    slot, phase, number = at
    HEAD_DIM: gl.constexpr = SIZES[0]
    COLUMNS: gl.constexpr = SIZES[2]
    PIECES: gl.constexpr = HEAD_DIM // 64
    s_layout: gl.constexpr = product_layout(COLUMNS)
    p_layout: gl.constexpr = gl.DotOperandLayout(0, product_layout(HEAD_DIM), 2)
    part_layout: gl.constexpr = product_layout(HEAD_DIM // GROUPS)
    of_column: gl.constexpr = gl.SliceLayout(0, s_layout)
    shape: gl.constexpr = [GROUP_ROWS, COLUMNS]
    words = ()
    if PARTIAL:
        words = mask_bits(masks, mask, mask, GROUP * GROUP_ROWS, mask >= 0, COLUMNS, SIZES[1], 1)
    mbarrier.wait(q_ready.index(slot), phase)
    begin = rings[0].index(slot).load(of_column)[None, :].broadcast_to(shape)
    scores = warpgroup_mma(keys.index(GROUP), queries.index(slot).permute((1, 0)), begin, is_async=True)
    begin = rings[1].index(slot).load(of_column)[None, :].broadcast_to(shape)
    mbarrier.wait(grad_ready.index(slot), phase)
    grad_weights = warpgroup_mma(values.index(GROUP), grads.index(slot).permute((1, 0)), begin, is_async=True)
    scores = warpgroup_mma_wait(1, deps=[scores])
    if PARTIAL:
        if mask >= 0:
            scores = hide_masked(scores, words, s_layout)
    p = gl.exp2(scores * score_scale)
    weights = gl.convert_layout(p.to(keys.dtype), p_layout)
    acc_v = warpgroup_mma(weights, grads.index(slot), acc_v, is_async=True)
    grad_weights = warpgroup_mma_wait(1, deps=[grad_weights])
    changes = (p * grad_weights).to(keys.dtype)
    # Two slots: who writes into one has waited for the other group in the visit before, which reads the other slot.
    side = number & 1
    grad_scores_ring.index(side * GROUPS + GROUP).store(changes)
    fence_async_shared()
    wait_for_threads()
    mbarrier.arrive(scores_ready.index(side), count=1)
    grad_scores = gl.convert_layout(changes, p_layout)
    if SIZES[5] == 1:
        acc_k = warpgroup_mma(grad_scores, queries.index(slot), acc_k, is_async=True)
    mbarrier.wait(scores_ready.index(side), (number >> 1) & 1)
    halves = view(keys, [GROUPS * PIECES, GROUP_ROWS, 64], gl.NVMMASharedLayout(128, 16, rank=2))
    own = gl.zeros([GROUP_ROWS, HEAD_DIM // GROUPS], gl.float32, part_layout)
    for g in gl.static_range(GROUPS):
        if PIECES == 1:
            half = halves.index(g).slice(GROUP * 32, 32, 1)
        else:
            half = halves.index(g * PIECES + GROUP)
        changed = grad_scores_ring.index(side * GROUPS + g).permute((1, 0))
        own = warpgroup_mma(changed, half, own, use_acc=g > 0, is_async=True)
    if SIZES[5] == 0:
        acc_k = warpgroup_mma(grad_scores, queries.index(slot), acc_k, is_async=True)
        own = warpgroup_mma_wait(1, deps=[own])
    else:
        own, acc_k, acc_v, weights, grad_scores = warpgroup_mma_wait(0, deps=[own, acc_k, acc_v, weights, grad_scores])
        mbarrier.arrive(free.index(slot), count=1)
    mbarrier.wait(part_free, (number & 1) ^ 1)
    part.index(GROUP).store(own)
    fence_async_shared()
    wait_for_threads()
    mbarrier.arrive(part_ready, count=1)
    if SIZES[5] == 0:
        acc_k, acc_v, weights, grad_scores = warpgroup_mma_wait(0, deps=[acc_k, acc_v, weights, grad_scores])
        mbarrier.arrive(free.index(slot), count=1)
    slot, phase = following(slot, phase, SIZES[4])
    return (acc_k, acc_v), (slot, phase, number + 1)


@gluon.jit
def _consume(
    k, v, grad_k, grad_v, shared, rings, parts, lists, where, sizes,
    GROUP: gl.constexpr, SIZES: gl.constexpr, UNIT: gl.constexpr, PARTIAL: gl.constexpr, DENSE: gl.constexpr,
):  # fmt: skip
    """One group of four warps: its 64 keys and values against every query tile, and their gradients."""
    keys, values, _, _, _, _, _ = shared
    row, start, _, stop, dense = where
    tokens, masks, visits = lists
    k_token, v_token, grad_token, score_scale = sizes
    HEAD_DIM: gl.constexpr = SIZES[0]
    ROWS: gl.constexpr = SIZES[1]
    o_layout: gl.constexpr = product_layout(HEAD_DIM)

    load_rows(k, v, tokens + row * ROWS, k_token * UNIT, v_token * UNIT, keys, values, GROUP, HEAD_DIM)
    fence_async_shared()
    wait_for_threads()

    nothing = gl.zeros([GROUP_ROWS, HEAD_DIM], gl.float32, o_layout)
    state = (nothing, nothing)
    at = (0, 0, 0)
    mask = gl.load(visits + start * 4 + 2, mask=start < stop, other=-1)
    for i in range(start, stop):
        # A visit ahead, so that its bits are asked for in time.
        after = gl.load(visits + gl.minimum(i + 1, stop - 1) * 4 + 2)
        state, at = _visit(mask, shared, rings, parts, masks, score_scale, state, at, GROUP, SIZES, PARTIAL)
        mask = after
    slot, phase, _ = at
    ring = (slot, phase)
    if DENSE:
        for i in range(0, dense):
            state, ring = add_tile(i, shared, rings, lists, score_scale, state, ring, GROUP, SIZES, False)
    acc_k, acc_v = state

    # The other group may still read the keys of this one; the part that it then hands over has been taken.
    mbarrier.wait(parts[4], (at[2] & 1) ^ 1)
    store_rows(
        acc_k * (score_scale * LN2), acc_v, grad_k, grad_v, tokens, tokens + row * ROWS, grad_token, keys, values,
        GROUP, HEAD_DIM, False,
    )  # fmt: skip


@gluon.jit
def _add_parts(sum_tiles, visits, turns, parts, where, first_tile, SIZES: gl.constexpr):
    """The warp that adds parts of dQ to the sums of their query tiles, each when its turn has come."""
    _, start, _, stop, _ = where
    _, part, _, part_ready, part_free = parts
    HEAD_DIM: gl.constexpr = SIZES[0]
    COLUMNS: gl.constexpr = SIZES[2]
    PIECES: gl.constexpr = HEAD_DIM // PIECE
    pieces = view(part, [PIECES, COLUMNS, PIECE], gl.NVMMASharedLayout(128, 32, rank=2))
    lane = gl.arange(0, 32, gl.BlockedLayout([1], [32], [1], [0]))
    for i in range(start, stop):
        number = i - start
        tile = first_tile + gl.load(visits + i * 4)
        turn = gl.load(visits + i * 4 + 1)
        mbarrier.wait(part_ready, number & 1)
        seen = gl.load(turns + tile, volatile=True)
        while seen != turn:
            seen = gl.load(turns + tile, volatile=True)
        for piece in gl.static_range(PIECES):
            _add_copy(pieces.index(piece), [tile * COLUMNS, piece * PIECE], sum_tiles)
        # The memory has been read,
        tma.store_wait(0)
        mbarrier.arrive(part_free, count=1)
        # and what was added is there.
        gl.inline_asm_elementwise(
            "cp.async.bulk.wait_group 0; mov.b32 $0, $1;", "=r,r", [lane], dtype=gl.int32, is_pure=False, pack=1
        )
        wait_for_threads()
        gl.atomic_add(turns + tile, 1, sem="release")


@gluon.jit(do_not_specialize=[*RUNTIME_SIZES, "side_y", "side_x", "tiles", "together"])
def gradients(
    q_grid, grad_grid, q_runs, grad_runs, sum_tiles, k, v, lse, delta, grad_k, grad_v,
    tokens, bounds, bases, visits, turns, offsets, masks,
    k_batch, k_token, k_head, v_batch, v_token, v_head,
    scale, score_scale, heads, length, key_length, tiles, together,
    dense_rows, grid_rows, pairs, prefix_tiles, suffix_tiles, prefix, suffix_start, suffix, extra, side_y, side_x,
    HEAD_DIM: gl.constexpr, ROWS: gl.constexpr, COLUMNS: gl.constexpr,
    BOX: gl.constexpr, FOLDED: gl.constexpr, STAGES: gl.constexpr, UNIT: gl.constexpr,
    PARTIAL: gl.constexpr, DENSE: gl.constexpr, ORDER: gl.constexpr,
):  # fmt: skip
    """Compute dK and dV of one key tile of 128 tokens, and its part of dQ; see `hopper.key_grad.key_gradients`.

    Args (besides those of `hopper.key_grad.key_gradients`):
        sum_tiles: Descriptor of dQ without its scale, by query tiles: float32 [pairs * tiles * COLUMNS, HEAD_DIM], 0
            before.
        visits: Of each list entry its query tile, whose turn it is there, and its mask (-1 for none): int32 [., 4].
        turns: How many key tiles have added their part to a query tile: int32 [pairs, tiles], 0 before.
        tiles: Query tiles of the grid.
        together: Pairs of a sample and a head whose programs start together.
        ORDER: Whether the product into dK starts behind (0) or before (1) those of the part of dQ.
    """
    row, pair = _place(gl.program_id(0), dense_rows, grid_rows, pairs, together)
    sample, head = (pair // heads).to(gl.int64), (pair % heads).to(gl.int64)
    bound = bounds + row * 4
    start, split, stop, dense = gl.load(bound), gl.load(bound + 1), gl.load(bound + 2), gl.load(bound + 3)
    if FOLDED:
        outer, column = sample, head * HEAD_DIM
    else:
        outer, column = sample * heads + head, head * 0
    k += (sample * k_batch + head * k_head) * UNIT
    v += (sample * v_batch + head * v_head) * UNIT
    out = (sample * key_length * heads + head) * HEAD_DIM
    grad_k += out
    grad_v += out
    lse += pair.to(gl.int64) * length
    delta += pair.to(gl.int64) * length

    layout: gl.constexpr = gl.NVMMASharedLayout(128, 16, rank=2)
    plain: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    dtype: gl.constexpr = k.dtype.element_ty
    keys = gl.allocate_shared_memory(dtype, [GROUPS, GROUP_ROWS, HEAD_DIM], layout)
    values = gl.allocate_shared_memory(dtype, [GROUPS, GROUP_ROWS, HEAD_DIM], layout)
    queries = gl.allocate_shared_memory(dtype, [STAGES, COLUMNS, HEAD_DIM], layout)
    grads = gl.allocate_shared_memory(dtype, [STAGES, COLUMNS, HEAD_DIM], layout)
    grad_scores = gl.allocate_shared_memory(dtype, [2 * GROUPS, GROUP_ROWS, COLUMNS], layout)
    part = gl.allocate_shared_memory(
        gl.float32, [GROUPS, COLUMNS, HEAD_DIM // GROUPS], gl.NVMMASharedLayout(128, 32, rank=2)
    )
    lse_ring = gl.allocate_shared_memory(gl.float32, [STAGES, COLUMNS], plain)
    delta_ring = gl.allocate_shared_memory(gl.float32, [STAGES, COLUMNS], plain)
    q_ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    grad_ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    scores_ready = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    part_ready = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    part_free = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        # Queries and their statistics.
        mbarrier.init(q_ready.index(i), count=2)
        mbarrier.init(grad_ready.index(i), count=1)
        mbarrier.init(free.index(i), count=GROUPS)
    for i in gl.static_range(2):
        mbarrier.init(scores_ready.index(i), count=GROUPS)
    mbarrier.init(part_ready, count=GROUPS)
    mbarrier.init(part_free, count=1)
    fence_async_shared()

    SIZES: gl.constexpr = (HEAD_DIM, ROWS, COLUMNS, 1, STAGES, ORDER)
    shared = (keys, values, queries, grads, q_ready, free, grad_ready)
    rings = (lse_ring, delta_ring, q_ready, free)
    parts = (grad_scores, part, scores_ready, part_ready, part_free)
    copied = (queries, grads, q_ready, free, grad_ready, free)
    where = (row, start, split, stop, dense)
    runs = (prefix_tiles, suffix_tiles, prefix, suffix_start, suffix, extra)
    lists = (tokens, masks, visits)
    sizes = (k_token, v_token, heads * HEAD_DIM, score_scale)
    gl.warp_specialize(
        [
            (_consume, (k, v, grad_k, grad_v, shared, rings, parts, lists, where, sizes,
                        gl.constexpr(0), SIZES, UNIT, PARTIAL, DENSE)),
            (_consume, (k, v, grad_k, grad_v, shared, rings, parts, lists, where, sizes,
                        gl.constexpr(1), SIZES, UNIT, PARTIAL, DENSE)),
            (copy_columns, (q_grid, grad_grid, q_runs, grad_runs, copied, bases, where,
                             (outer.to(gl.int32), column.to(gl.int32), side_y, side_x), runs, BOX, SIZES)),
            (put_statistics, (lse, delta, bases, offsets, rings, where, runs, scale, length, COLUMNS, STAGES)),
            (_add_parts, (sum_tiles, visits, turns, parts, where, pair * tiles, SIZES)),
        ],
        [4, 1, 1, 1],
        [240, 24, 24, 24],
    )  # fmt: skip


@triton.jit(do_not_specialize=["scale", "tiles", "length"])
def finish(
    sums, tokens, grad_q, scale, tiles, length, heads,
    HEAD_DIM: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Write dQ of a query tile's tokens from its sum."""
    # All programs are in the first axis, the others have few.
    program = tl.program_id(0)
    tile, pair = program % tiles, (program // tiles).to(tl.int64)
    sample, head = pair // heads, pair % heads
    slots, d = tl.arange(0, COLUMNS), tl.arange(0, HEAD_DIM)
    token = tl.load(tokens + tile * COLUMNS + slots)
    row = program.to(tl.int64) * COLUMNS + slots
    total = tl.load(sums + row[:, None] * HEAD_DIM + d[None, :]) * scale
    to = ((sample * length + token) * heads + head)[:, None] * HEAD_DIM + d[None, :]
    tl.store(grad_q + to, total.to(grad_q.dtype.element_ty), mask=(token >= 0)[:, None])
