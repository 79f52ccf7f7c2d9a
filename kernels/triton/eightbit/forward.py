"""Forward kernel in 8 bits for any NVIDIA GPU from Ampere on: `lists.forward` on what `quantise` wrote.

Products are of int8; where weights and values are e4m3 (from sm_89 on), that product is of those. Weights of a step are
relative to its largest one, and each step's product is added up in float32 with a factor of its own.
"""

# What a kernel takes and returns exists on the GPU only: Python types would say nothing.
# ruff: noqa: ANN001, ANN201

# The language of Triton kernels is not quite Python.
# pyright: reportArgumentType=false, reportGeneralTypeIssues=false
from __future__ import annotations

import triton
import triton.language as tl

from visattn.kernels.triton.eightbit.quantise import ROUND, SIZES
from visattn.kernels.triton.lists.forward import LN2
from visattn.kernels.triton.parts import RUNTIME_SIZES, dense_run, list_of, place, see

# Weights of a step reach from 0 to 2 to this power: 127, and 256 where they are e4m3, which reaches 448.
INT8_TOP, FP8_TOP = tl.constexpr(6.988684686772166), tl.constexpr(8.0)


@triton.jit
def absorb(acc, total, top, scores, value, FP8: tl.constexpr):
    """One step of the online softmax, base 2, with weights in 8 bits; `value` is [dim, columns]."""
    own = tl.max(scores, 1)
    new = tl.maximum(top, own)
    # A row that has seen no key yet has -inf: 0 instead keeps exp2 free of nan.
    base = tl.where(new == float("-inf"), 0.0, new)
    alpha, beta = tl.exp2(top - base), tl.exp2(own - base)
    own = tl.where(own == float("-inf"), 0.0, own) - (FP8_TOP if FP8 else INT8_TOP)
    p = tl.exp2(scores - own[:, None])
    if FP8:
        part = tl.dot(p.to(tl.float8e4nv), tl.trans(value))
        sums = tl.sum(p, 1)
    else:
        p = (p + ROUND) - ROUND
        part = tl.dot(p.to(tl.int8), tl.trans(value), out_dtype=tl.int32).to(tl.float32)
        sums = tl.sum(p, 1)
    acc = acc * alpha[:, None] + part * beta[:, None]
    return acc, total * alpha + sums * beta, new


@triton.jit
def scores_of(query, q_scale, k8, k_scale, tile, column_slots, d, SLOTS: tl.constexpr, BLOCK_DIM: tl.constexpr):
    """Logits, base 2, of a row tile and the column tiles `tile`, one number per column."""
    at = tile.to(tl.int64) * SLOTS + column_slots % SLOTS
    key = tl.load(k8 + at[:, None] * BLOCK_DIM + d[None, :])
    scores = tl.dot(query, tl.trans(key), out_dtype=tl.int32).to(tl.float32)
    return scores * tl.load(k_scale + tile)[None, :] * q_scale[:, None]


@triton.jit
def values_of(v8, tile, column_slots, d, SLOTS: tl.constexpr, BLOCK_DIM: tl.constexpr):
    """Values [dim, columns] of the column tiles `tile`."""
    at = tile.to(tl.int64) * (SLOTS * BLOCK_DIM) + column_slots % SLOTS
    return tl.load(v8 + at[None, :] + d[:, None] * SLOTS)


@triton.jit
def tiles_at(bases, tile_of, i, column_slots, SLOTS: tl.constexpr, TILES: tl.constexpr):
    """Column tile of each column of a step from list entry i."""
    tile = tl.zeros_like(column_slots) + tl.load(tile_of + tl.load(bases + i))
    for t in tl.static_range(1, TILES):
        tile = tl.where(column_slots // SLOTS == t, tl.load(tile_of + tl.load(bases + i + t)), tile)
    return tile


@triton.jit(do_not_specialize=[*RUNTIME_SIZES, *SIZES, "run_tiles"])
def attend_8bit(
    q8, k8, v8, q_scale, q_offset, k_scale, v_shift, v_scale, out, lse, key_mask,
    tokens, bounds, bases, tile_of, key_tokens, mask_ids, masks, bounds_batch, list_batch, list_heads,
    heads, group, length, key_length, tiles, run_tiles, row_tiles,
    dense_rows, grid_rows, pairs, prefix_tiles, suffix_tiles, prefix, suffix_start, suffix, extra,
    HEAD_DIM: tl.constexpr, BLOCK_DIM: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, TILES: tl.constexpr,
    FULL: tl.constexpr, PARTIAL: tl.constexpr, DENSE: tl.constexpr,
    KEY_MASK: tl.constexpr, LSE: tl.constexpr, FP8: tl.constexpr,
):  # fmt: skip
    """Attention of one query tile; see `program.Program` for the lists and `quantise` for the numbers.

    Args (besides those of `lists.forward.attend`):
        q8: int8 [pairs, row tiles, ROWS, BLOCK_DIM].
        k8: int8 [pairs of keys, tiles, slots, BLOCK_DIM].
        v8: int8 or e4m3 [pairs of keys, tiles, BLOCK_DIM, slots].
        q_scale: See `quantise`, as q_offset, k_scale, v_shift and v_scale.
        tile_of: Which column tile begins at a token: int32 [tokens].
        key_tokens: Token of each slot of a column tile, -1 if empty: int32 [tiles, slots].
        tiles: Column tiles, those of runs of dense tokens behind those of the grid.
        run_tiles: Number of the first of those.
        row_tiles: Row tiles.
        FP8: Whether weights and values are e4m3.
    """
    SLOTS: tl.constexpr = COLUMNS // TILES
    row, pair = place(tl.program_id(0), dense_rows, grid_rows, pairs)
    sample, head = (pair // heads).to(tl.int64), (pair % heads).to(tl.int64)
    row_slots, column_slots, d = tl.arange(0, ROWS), tl.arange(0, COLUMNS), tl.arange(0, BLOCK_DIM)
    own_row = (pair.to(tl.int64) * row_tiles + row) * ROWS + row_slots
    query = tl.load(q8 + own_row[:, None] * BLOCK_DIM + d[None, :])
    scale = tl.load(q_scale + own_row)
    # Query heads of a sample are a multiple of key heads.
    kv = (pair // group).to(tl.int64)
    k8 += kv * tiles * (SLOTS * BLOCK_DIM)
    v8 += kv * tiles * (SLOTS * BLOCK_DIM)
    k_scale += kv * tiles
    key_mask += sample * key_length

    top = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, BLOCK_DIM], tl.float32)
    owner = pair // list_heads
    start, split, stop, dense, bases, mask_ids = list_of(bounds, bases, mask_ids, bounds_batch, list_batch, owner, row)

    if FULL:
        for i in range(start, split, TILES):
            tile = tiles_at(bases, tile_of, i, column_slots, SLOTS, TILES)
            scores = scores_of(query, scale, k8, k_scale, tile, column_slots, d, SLOTS, BLOCK_DIM)
            if KEY_MASK:
                token = tl.load(key_tokens + tile * SLOTS + column_slots % SLOTS)
                scores = tl.where(tl.load(key_mask + token)[None, :] != 0, scores, float("-inf"))
            value = values_of(v8, tile, column_slots, d, SLOTS, BLOCK_DIM)
            acc, total, top = absorb(acc, total, top, scores, value, FP8)
    if PARTIAL:
        for i in range(split, stop, TILES):
            tile = tiles_at(bases, tile_of, i, column_slots, SLOTS, TILES)
            scores = scores_of(query, scale, k8, k_scale, tile, column_slots, d, SLOTS, BLOCK_DIM)
            visible = see(masks, mask_ids, i, row_slots, column_slots, ROWS, COLUMNS, TILES)
            if KEY_MASK:
                token = tl.load(key_tokens + tile * SLOTS + column_slots % SLOTS)
                visible &= tl.load(key_mask + token, mask=token >= 0, other=0)[None, :] != 0
            scores = tl.where(visible, scores, float("-inf"))
            value = values_of(v8, tile, column_slots, d, SLOTS, BLOCK_DIM)
            acc, total, top = absorb(acc, total, top, scores, value, FP8)
    if DENSE:
        for i in range(0, dense):
            first, end = dense_run(i, prefix_tiles, suffix_tiles, prefix, suffix_start, suffix, extra, COLUMNS)
            tile = run_tiles + i * TILES + column_slots // SLOTS
            visible = first + column_slots < end
            if KEY_MASK:
                visible &= tl.load(key_mask + first + column_slots, mask=visible, other=0) != 0
            scores = scores_of(query, scale, k8, k_scale, tile, column_slots, d, SLOTS, BLOCK_DIM)
            scores = tl.where(visible[None, :], scores, float("-inf"))
            value = values_of(v8, tile, column_slots, d, SLOTS, BLOCK_DIM)
            acc, total, top = absorb(acc, total, top, scores, value, FP8)

    token = tl.load(tokens + row * ROWS + row_slots)
    is_token = token >= 0
    has_d = d < HEAD_DIM
    scale_of = tl.load(v_scale + kv * BLOCK_DIM + d)[None, :]
    shift = tl.load(v_shift + kv * BLOCK_DIM + d)[None, :]
    acc = tl.where(total[:, None] == 0.0, 0.0, acc / tl.where(total == 0.0, 1.0, total)[:, None] * scale_of + shift)
    row_of = (sample * length + token) * heads + head
    tl.store(out + row_of[:, None] * HEAD_DIM + d[None, :], acc.to(out.dtype.element_ty),
             mask=is_token[:, None] & has_d[None, :])  # fmt: skip
    if LSE:
        # total = 0 gives log2 -inf, as it should be; weights count in units of the largest.
        unit = FP8_TOP if FP8 else INT8_TOP
        logits = top + tl.log2(total) - unit + tl.load(q_offset + own_row)
        tl.store(lse + (sample * heads + head) * length + token, logits * LN2, mask=is_token)
