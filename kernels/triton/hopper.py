"""Forward kernel for Hopper: tiles come by the tensor memory accelerator, products and softmax overlap.

The work of `forward.attend`, in Gluon (Triton's lower level), with the schedule of FlashAttention-3 (Shah et al.
2024, sections 3.1 and 3.2): one warp copies column tiles into a ring of shared memory, and two groups of four warps
each hold half of the row tile. A group starts the scores of the next column tile, then adds the current one to its
output, so that the tensor cores work while it computes the softmax of the scores that are ready.
"""

# What a kernel takes and returns exists on the GPU only: Python types would say nothing. Conditions known to the
# compiler stand apart from those that are not.
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

from visattn.kernels.triton.hopper_copy import produce
from visattn.kernels.triton.hopper_fill import put_masks
from visattn.kernels.triton.hopper_parts import (
    GROUP_ROWS,
    GROUPS,
    LN2,
    dense_run,
    following,
    hide_masked,
    mask_words,
    place,
    product_layout,
    row_layout,
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
def _hide_behind(scores, i, runs, layout: gl.constexpr):
    """Scores with -inf behind the end of the i-th run of dense tokens."""
    prefix_tiles, suffix_tiles, prefix, suffix_start, suffix, extra = runs
    columns: gl.constexpr = scores.shape[1]
    first, end = dense_run(i, prefix_tiles, suffix_tiles, prefix, suffix_start, suffix, extra, columns)
    column = gl.arange(0, columns, gl.SliceLayout(0, layout))
    return gl.where((first + column < end)[None, :], scores, float("-inf"))


@gluon.jit
def _start_scores(mine, shared, slot, SIZES: gl.constexpr, s_layout: gl.constexpr):
    """Start the product of queries and the keys of a slot; scores of masked keys begin, and so remain, at -inf."""
    keys, visible = shared[1], shared[8]
    KEY_MASK: gl.constexpr = SIZES[6]
    shape: gl.constexpr = [GROUP_ROWS, SIZES[2]]
    if KEY_MASK:
        begin = visible.index(slot).load(gl.SliceLayout(0, s_layout))[None, :].broadcast_to(shape)
    else:
        begin = gl.zeros(shape, gl.float32, s_layout)
    return warpgroup_mma(mine, keys.index(slot).permute((1, 0)), begin, use_acc=KEY_MASK, is_async=True)


@gluon.jit
def _step(
    i, mine, shared, lists, scale, runs, first_row, state, at, more,
    KIND: gl.constexpr, SIZES: gl.constexpr, s_layout: gl.constexpr, p_layout: gl.constexpr,
):  # fmt: skip
    """Scores and softmax of one column tile, while the tile before it is added to the output.

    `i` is the list entry of the tile, or the number of the run; `state` the output without the tile before this one,
    that tile's weights, and top and total of each row; `at` slot and phase of this tile's keys, which are there, and of
    the values of the tile before; `more` whether a tile follows. KIND: 0 for a tile without mask, 1 with one, 2 for a
    run of dense tokens.
    """
    _, keys, values, k_ready, k_free, v_ready, v_free, turns, _ = shared
    acc, p, top, total = state
    k_slot, k_phase, v_slot, v_phase, turn = at
    group: gl.constexpr = first_row // GROUP_ROWS
    STAGES: gl.constexpr = SIZES[4]
    TURNS: gl.constexpr = SIZES[5]
    o_layout: gl.constexpr = p_layout.parent
    if KIND == 1:
        # Their loads are done by the time that the scores are.
        words = mask_words(lists[1], lists[2], i, first_row, s_layout, SIZES)
    if TURNS:
        mbarrier.wait(turns.index(group), turn)
    scores = _start_scores(mine, shared, k_slot, SIZES, s_layout)
    mbarrier.wait(v_ready.index(v_slot), v_phase)
    acc = warpgroup_mma(p, values.index(v_slot), acc, is_async=True)
    if TURNS:
        mbarrier.arrive(turns.index(1 - group), count=1)
    scores = warpgroup_mma_wait(1, deps=[scores])
    mbarrier.arrive(k_free.index(k_slot), count=1)
    if KIND == 1:
        scores = hide_masked(scores, words, s_layout)
    if KIND == 2:
        scores = _hide_behind(scores, i, runs, s_layout)
    weights, top, total, alpha = _softmax(scores, top, total, scale)
    weights = gl.convert_layout(weights.to(keys.dtype), p_layout)
    # Waiting here for the next keys keeps the assembler from moving the softmax behind the wait for the product.
    k_slot, k_phase = following(k_slot, k_phase, STAGES)
    mbarrier.wait(k_ready.index(k_slot), k_phase, pred=more)
    acc, p = warpgroup_mma_wait(0, deps=[acc, p])
    mbarrier.arrive(v_free.index(v_slot), count=1)
    acc = acc * gl.convert_layout(alpha, gl.SliceLayout(1, o_layout))[:, None]
    v_slot, v_phase = following(v_slot, v_phase, STAGES)
    return (acc, weights, top, total), (k_slot, k_phase, v_slot, v_phase, turn ^ 1)


@gluon.jit
def _consume(
    q, out, lse, shared, lists, where, sizes, runs,
    GROUP: gl.constexpr, SIZES: gl.constexpr, UNIT: gl.constexpr, PARTIAL: gl.constexpr, DENSE: gl.constexpr,
    LSE: gl.constexpr,
):  # fmt: skip
    """One group of four warps: its 64 rows against every column tile, and their results."""
    queries, keys, values, k_ready, k_free, v_ready, _, _, _ = shared
    row, start, split, stop, dense = where
    q_token, out_token, scale = sizes
    HEAD_DIM: gl.constexpr = SIZES[0]
    ROWS: gl.constexpr = SIZES[1]
    COLUMNS: gl.constexpr = SIZES[2]
    TILES: gl.constexpr = SIZES[3]
    STAGES: gl.constexpr = SIZES[4]
    s_layout: gl.constexpr = product_layout(COLUMNS)
    o_layout: gl.constexpr = product_layout(HEAD_DIM)
    p_layout: gl.constexpr = gl.DotOperandLayout(0, o_layout, 2)
    io: gl.constexpr = row_layout(HEAD_DIM)
    first_row: gl.constexpr = GROUP * GROUP_ROWS
    dtype: gl.constexpr = keys.dtype

    slots = first_row + gl.arange(0, GROUP_ROWS, gl.SliceLayout(1, io))
    d = gl.arange(0, HEAD_DIM, gl.SliceLayout(0, io))
    token = gl.load(lists[0] + row * ROWS + slots)
    q_rows = q + token.to(gl.int64)[:, None] * (q_token * UNIT) + d[None, :]
    query = gl.load(q_rows, mask=(token >= 0)[:, None], other=0.0)
    mine = queries.index(GROUP)
    mine.store(query)
    fence_async_shared()

    top = gl.full([GROUP_ROWS], float("-inf"), gl.float32, gl.SliceLayout(1, s_layout))
    total = gl.zeros([GROUP_ROWS], gl.float32, gl.SliceLayout(1, s_layout))
    acc = gl.zeros([GROUP_ROWS, HEAD_DIM], gl.float32, o_layout)
    if stop - start + dense > 0:
        # The first tile, of whatever kind.
        mbarrier.wait(k_ready.index(0), 0)
        scores = _start_scores(mine, shared, 0, SIZES, s_layout)
        scores = warpgroup_mma_wait(0, deps=[scores])
        mbarrier.arrive(k_free.index(0), count=1)
        if PARTIAL:
            if (start == split) & (split < stop):
                words = mask_words(lists[1], lists[2], split, first_row, s_layout, SIZES)
                scores = hide_masked(scores, words, s_layout)
        if DENSE:
            if start == stop:
                scores = _hide_behind(scores, 0, runs, s_layout)
        p, top, total, _alpha = _softmax(scores, top, total, scale)
        p = gl.convert_layout(p.to(dtype), p_layout)
        state = (acc, p, top, total)
        steps = (stop - start) // TILES + dense
        k_slot, k_phase = following(0, 0, STAGES)
        mbarrier.wait(k_ready.index(k_slot), k_phase, pred=steps > 1)
        at = (k_slot, k_phase, 0, 0, 0)
        # What comes next in each list.
        second_full = gl.where(start < split, start + TILES, split)
        second_partial = gl.where((start == split) & (split < stop), split + TILES, split)
        second_run = gl.where(start == stop, 1, 0)
        last = split - TILES
        for i in range(second_full, split, TILES):
            more = (i < last) | (split < stop) | (dense > 0)
            state, at = _step(
                i, mine, shared, lists, scale, runs, first_row, state, at, more, 0, SIZES, s_layout, p_layout
            )
        if PARTIAL:
            last = stop - TILES
            for i in range(second_partial, stop, TILES):
                more = (i < last) | (dense > 0)
                state, at = _step(
                    i, mine, shared, lists, scale, runs, first_row, state, at, more, 1, SIZES, s_layout, p_layout
                )
        if DENSE:
            last = dense - 1
            for i in range(second_run, dense):
                state, at = _step(
                    i, mine, shared, lists, scale, runs, first_row, state, at, i < last, 2, SIZES, s_layout, p_layout
                )
        acc, p, top, total = state
        mbarrier.wait(v_ready.index(at[2]), at[3])
        acc = warpgroup_mma(p, values.index(at[2]), acc, is_async=True)
        acc = warpgroup_mma_wait(0, deps=[acc])

    # Through the queries' memory to a layout whose stores are whole lines.
    divisor = gl.convert_layout(gl.where(total == 0.0, 1.0, total), gl.SliceLayout(1, o_layout))
    mine.store((acc / divisor[:, None]).to(dtype))
    result = mine.load(io)
    # Loaded again (volatile: not merged with the first load) to hold fewer registers in the loops.
    token = gl.load(lists[0] + row * ROWS + slots, volatile=True)
    gl.store(out + token.to(gl.int64)[:, None] * out_token + d[None, :], result, mask=(token >= 0)[:, None])
    if LSE:
        row_slots = first_row + gl.arange(0, GROUP_ROWS, gl.SliceLayout(1, s_layout))
        row_token = gl.load(lists[0] + row * ROWS + row_slots)
        # total = 0 gives log2 -inf, as it should be.
        peak = gl.where(total == 0.0, 0.0, top * scale)
        gl.store(lse + row_token, (peak + gl.log2(total)) * LN2, mask=row_token >= 0)


@gluon.jit(do_not_specialize=[*RUNTIME_SIZES, "side_y", "side_x"])
def attend(
    k_grid, v_grid, k_runs, v_runs, q, out, lse, key_mask,
    tokens, bounds, bases, mask_ids, offsets, masks,
    q_batch, q_token, q_head, bounds_batch, list_batch,
    scale, heads, group, length, key_length,
    dense_rows, grid_rows, pairs, prefix_tiles, suffix_tiles, prefix, suffix_start, suffix, extra, side_y, side_x,
    HEAD_DIM: gl.constexpr, ROWS: gl.constexpr, COLUMNS: gl.constexpr, TILES: gl.constexpr,
    BOX: gl.constexpr, FOLDED: gl.constexpr, STAGES: gl.constexpr, UNIT: gl.constexpr, LSE: gl.constexpr,
    PARTIAL: gl.constexpr, DENSE: gl.constexpr, KEY_MASK: gl.constexpr, TURNS: gl.constexpr,
):  # fmt: skip
    """Attention of one query tile of 128 tokens; see `forward.attend` for what the arguments share with it.

    Args (besides those of `forward.attend`):
        k_grid: Descriptor of the grid's keys as [outer, t, y, x, channels]; `v_grid` of its values.
        k_runs: Descriptor of all keys as [outer, 1, 1, tokens, channels]; `v_runs` of all values.
        side_y: Length of the grid's second last axis.
        side_x: Length of its last axis.
        BOX: Tokens of a column tile per axis (t, y, x).
        FOLDED: Whether heads lie in the channels of the descriptors; else in `outer`, behind the samples.
        TURNS: Whether the two groups of warps take turns in starting their products.
    """
    row, pair = place(gl.program_id(0), dense_rows, grid_rows, pairs)
    sample, head = (pair // heads).to(gl.int64), (pair % heads).to(gl.int64)
    kv_head = head // group
    bound = bounds + sample * bounds_batch + row * 4
    start, split, stop, dense = gl.load(bound), gl.load(bound + 1), gl.load(bound + 2), gl.load(bound + 3)
    bases += sample * list_batch
    mask_ids += sample * list_batch
    if FOLDED:
        outer, column = sample, kv_head * HEAD_DIM
    else:
        outer, column = sample * (heads // group) + kv_head, kv_head * 0
    q += (sample * q_batch + head * q_head) * UNIT
    key_mask += sample * key_length
    out += (sample * length * heads + head) * HEAD_DIM
    lse += pair.to(gl.int64) * length

    layout: gl.constexpr = gl.NVMMASharedLayout(128, 16, rank=2)
    dtype: gl.constexpr = q.dtype.element_ty
    queries = gl.allocate_shared_memory(dtype, [GROUPS, GROUP_ROWS, HEAD_DIM], layout)
    keys = gl.allocate_shared_memory(dtype, [STAGES, COLUMNS, HEAD_DIM], layout)
    values = gl.allocate_shared_memory(dtype, [STAGES, COLUMNS, HEAD_DIM], layout)
    k_ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    k_free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    # A barrier that nothing waits for would share its memory with what the warps are handed, and spoil it.
    turns = k_free
    if TURNS:
        turns = gl.allocate_shared_memory(gl.int64, [GROUPS, 1], mbarrier.MBarrierLayout())
        for i in gl.static_range(GROUPS):
            mbarrier.init(turns.index(i), count=1)
    visible = keys
    if KEY_MASK:
        plain: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
        visible = gl.allocate_shared_memory(gl.float32, [STAGES, COLUMNS], plain)
    for i in gl.static_range(STAGES):
        # Keys, and what their scores begin with.
        mbarrier.init(k_ready.index(i), count=2 if KEY_MASK else 1)
        mbarrier.init(v_ready.index(i), count=1)
        mbarrier.init(k_free.index(i), count=GROUPS)
        mbarrier.init(v_free.index(i), count=GROUPS)
    fence_async_shared()
    if TURNS:
        mbarrier.arrive(turns.index(0), count=1)

    SIZES: gl.constexpr = (HEAD_DIM, ROWS, COLUMNS, TILES, STAGES, TURNS, KEY_MASK)
    shared = (queries, keys, values, k_ready, k_free, v_ready, v_free, turns, visible)
    copied = (queries, keys, values, k_ready, k_free, v_ready, v_free, turns)
    where = (row, start, split, stop, dense)
    runs = (prefix_tiles, suffix_tiles, prefix, suffix_start, suffix, extra)
    lists = (tokens, masks, mask_ids)
    sizes = (q_token, heads * HEAD_DIM, scale)
    gl.warp_specialize(
        [
            (_consume, (q, out, lse, shared, lists, where, sizes, runs,
                        gl.constexpr(0), SIZES, UNIT, PARTIAL, DENSE, LSE)),
            (_consume, (q, out, lse, shared, lists, where, sizes, runs,
                        gl.constexpr(1), SIZES, UNIT, PARTIAL, DENSE, LSE)),
            (produce, (k_grid, v_grid, k_runs, v_runs, copied, bases, where,
                       (outer.to(gl.int32), column.to(gl.int32), side_y, side_x), runs,
                       BOX, COLUMNS, TILES, HEAD_DIM, STAGES)),
            (put_masks, (key_mask, bases, offsets, shared, where, runs, key_length, SIZES)),
        ],
        [4, 1, 1],
        [240, 24, 24],
    )  # fmt: skip
