"""Backward kernel for keys and values: one key tile per program, over the query tiles that visit it."""

# What a kernel takes and returns exists on the GPU only: Python types would say nothing.
# ruff: noqa: ANN001, ANN201, ANN202

# The language of Triton kernels is not quite Python.
# pyright: reportArgumentType=false
from __future__ import annotations

import triton
import triton.language as tl

from visattn.kernels.triton.parts import (
    RUNTIME_SIZES,
    bases_at,
    boxes_of,
    dense_run,
    list_of,
    listed_by,
    place,
    rows_at,
    scores_of,
    see,
)

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def _load_rows(pointer, tokens, mask):
    """Softmax statistics of query slots: 0 where a slot is empty."""
    return tl.load(pointer + tokens, mask=mask, other=0.0)


@triton.jit
def _weights(scores, row_lse):
    # A query that saw no key has lse -inf and weight 0 everywhere.
    return tl.exp2(scores - tl.where(row_lse == float("-inf"), float("inf"), row_lse * LOG2E)[None, :])


@triton.jit
def _accumulate(acc_k, acc_v, q, grad, v, weights, delta, PRECISION: tl.constexpr):
    """Add weights^T @ grad to dV and grad_scores^T @ q to dK; everything is transposed: [keys, queries]."""
    acc_v = tl.dot(weights.to(grad.dtype), grad, acc_v, input_precision=PRECISION)
    grad_weights = tl.dot(v, tl.trans(grad), input_precision=PRECISION)
    grad_scores = weights * (grad_weights - delta[None, :])
    acc_k = tl.dot(grad_scores.to(q.dtype), q, acc_k, input_precision=PRECISION)
    return acc_k, acc_v


@triton.jit(do_not_specialize=RUNTIME_SIZES)
def key_gradients(
    q, k, v, grad_out, lse, delta, grad_k, grad_v, key_mask, rpb,
    tokens, bounds, bases, mask_ids, offsets, masks, positions, position_offsets,
    q_batch, q_token, q_head, k_batch, k_token, k_head, v_batch, v_token, v_head,
    grad_batch, grad_token, grad_head, bounds_batch, list_batch, list_heads,
    scale, score_scale, heads, group, length, key_length,
    dense_rows, grid_rows, pairs, prefix_tiles, suffix_tiles, prefix, suffix_start, suffix, extra,
    centre, rpb_entries,
    HEAD_DIM: tl.constexpr, BLOCK_DIM: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, TILES: tl.constexpr,
    UNIT: tl.constexpr, WIDE: tl.constexpr, ALIKE: tl.constexpr,
    FULL: tl.constexpr, PARTIAL: tl.constexpr, DENSE: tl.constexpr,
    KEY_MASK: tl.constexpr, RPB: tl.constexpr, PRECISION: tl.constexpr,
    words=None, bits=None, MERGED: tl.constexpr = False,
):  # fmt: skip
    """Compute dK and dV of one key tile and KV head, summed over the query heads that share it.

    Rows are keys, columns are queries; `pairs` counts (sample, KV head).
    """
    row, pair = place(tl.program_id(0), dense_rows, grid_rows, pairs)
    kv_heads = heads // group
    sample, kv_head = (pair // kv_heads).to(tl.int64), (pair % kv_heads).to(tl.int64)
    row_slots, column_slots, d = tl.arange(0, ROWS), tl.arange(0, COLUMNS), tl.arange(0, BLOCK_DIM)
    has_d = d < HEAD_DIM
    token = tl.load(tokens + row * ROWS + row_slots)
    is_token = token >= 0
    row_mask = is_token[:, None] & has_d[None, :]
    k += (sample * k_batch + kv_head * k_head) * UNIT
    v += (sample * v_batch + kv_head * v_head) * UNIT
    wide = token.to(tl.int64)
    k_rows = k + wide[:, None] * (k_token * UNIT) + d[None, :]
    v_rows = v + wide[:, None] * (v_token * UNIT) + d[None, :]
    key = tl.load(k_rows, mask=row_mask, other=0.0)
    value = tl.load(v_rows, mask=row_mask, other=0.0)

    acc_k = tl.zeros([ROWS, BLOCK_DIM], tl.float32)
    acc_v = tl.zeros([ROWS, BLOCK_DIM], tl.float32)
    offset = tl.load(offsets + column_slots % (COLUMNS // TILES))
    if MERGED:
        bit = tl.load(bits + column_slots)
    q_box, grad_box = boxes_of(offset, q_token * UNIT, grad_token * UNIT, d, WIDE, ALIKE)
    if RPB:
        row_position = tl.load(positions + token, mask=is_token, other=0)
        box_position = tl.load(position_offsets + column_slots % (COLUMNS // TILES))
    else:
        row_position, box_position = 0, 0

    for member in range(0, group):
        head = kv_head * group + member
        owner = (sample * heads + head) // list_heads
        start, split, stop, dense, own_bases, own_masks = list_of(
            bounds, bases, mask_ids, bounds_batch, list_batch, owner, row
        )
        q_of = q + (sample * q_batch + head * q_head) * UNIT
        grad_of = grad_out + (sample * grad_batch + head * grad_head) * UNIT
        lse_of = lse + (sample * heads + head) * length
        delta_of = delta + (sample * heads + head) * length
        placed = (rpb + head * rpb_entries, positions, box_position, row_position, centre, rpb_entries)
        if FULL:
            for i in range(start, split, TILES):
                base = bases_at(own_bases, i, column_slots, COLUMNS, TILES)
                query = tl.load(rows_at(q_of, base, q_token * UNIT, q_box, TILES), mask=has_d[None, :], other=0.0)
                scores = scores_of(key, query, score_scale, base, placed, RPB, True, PRECISION)
                weights = _weights(scores, tl.load(lse_of + base + offset))
                grad = tl.load(
                    rows_at(grad_of, base, grad_token * UNIT, grad_box, TILES), mask=has_d[None, :], other=0.0
                )
                delta_now = tl.load(delta_of + base + offset)
                acc_k, acc_v = _accumulate(acc_k, acc_v, query, grad, value, weights, delta_now, PRECISION)
        if PARTIAL:
            for i in range(split, stop, TILES):
                base = bases_at(own_bases, i, column_slots, COLUMNS, TILES)
                # A short tile's empty slots may lie behind the last token.
                inside = base + offset < length
                here = inside[:, None] & has_d[None, :]
                query = tl.load(rows_at(q_of, base, q_token * UNIT, q_box, TILES), mask=here, other=0.0)
                scores = scores_of(key, query, score_scale, base, placed, RPB, True, PRECISION)
                visible = see(masks, own_masks, i, row_slots, column_slots, ROWS, COLUMNS, TILES)
                if MERGED:
                    visible &= listed_by(words + owner.to(tl.int64) * list_batch, i, bit)[None, :]
                weights = tl.where(visible, _weights(scores, _load_rows(lse_of, base + offset, inside)), 0.0)
                grad = tl.load(rows_at(grad_of, base, grad_token * UNIT, grad_box, TILES), mask=here, other=0.0)
                delta_now = _load_rows(delta_of, base + offset, inside)
                acc_k, acc_v = _accumulate(acc_k, acc_v, query, grad, value, weights, delta_now, PRECISION)
        if DENSE:
            q_run, grad_run = boxes_of(column_slots, q_token * UNIT, grad_token * UNIT, d, WIDE, ALIKE)
            for i in range(0, dense):
                first, end = dense_run(i, prefix_tiles, suffix_tiles, prefix, suffix_start, suffix, extra, COLUMNS)
                inside = first + column_slots < end
                here = inside[:, None] & has_d[None, :]
                base = first.to(tl.int64)
                query = tl.load(q_of + base * (q_token * UNIT) + q_run, mask=here, other=0.0)
                scores = tl.dot(key, tl.trans(query), input_precision=PRECISION) * score_scale
                row_lse = _load_rows(lse_of, base + column_slots, inside)
                weights = tl.where(inside[None, :], _weights(scores, row_lse), 0.0)
                grad = tl.load(grad_of + base * (grad_token * UNIT) + grad_run, mask=here, other=0.0)
                delta_now = _load_rows(delta_of, base + column_slots, inside)
                acc_k, acc_v = _accumulate(acc_k, acc_v, query, grad, value, weights, delta_now, PRECISION)

    if KEY_MASK:
        # Rows do not mix, so masked keys are dropped only here.
        kept = tl.load(key_mask + sample * key_length + token, mask=is_token, other=0) != 0
        acc_k = tl.where(kept[:, None], acc_k, 0.0)
        acc_v = tl.where(kept[:, None], acc_v, 0.0)
    out_row = ((sample * key_length + token) * kv_heads + kv_head)[:, None] * HEAD_DIM + d[None, :]
    tl.store(grad_k + out_row, (acc_k * scale).to(grad_k.dtype.element_ty), mask=row_mask)
    tl.store(grad_v + out_row, acc_v.to(grad_v.dtype.element_ty), mask=row_mask)
