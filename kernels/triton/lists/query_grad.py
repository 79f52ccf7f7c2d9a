"""Backward kernel for queries: one query tile per program, over its key tiles."""

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
def _accumulate(acc, grad, k, v, weights, delta, PRECISION: tl.constexpr):
    """Add grad_scores @ k, with grad_scores = weights * (grad @ v^T - delta)."""
    grad_weights = tl.dot(grad, tl.trans(v), input_precision=PRECISION)
    grad_scores = weights * (grad_weights - delta[:, None])
    return tl.dot(grad_scores.to(k.dtype), k, acc, input_precision=PRECISION)


@triton.jit(do_not_specialize=RUNTIME_SIZES)
def query_gradients(
    q, k, v, grad_out, lse, delta, grad_q, key_mask, rpb,
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
    """Compute dQ of one query tile; arguments as in `forward.attend`, score_scale gives logits in base 2."""
    row, pair = place(tl.program_id(0), dense_rows, grid_rows, pairs)
    sample, head = (pair // heads).to(tl.int64), (pair % heads).to(tl.int64)
    kv_head = head // group
    row_slots, column_slots, d = tl.arange(0, ROWS), tl.arange(0, COLUMNS), tl.arange(0, BLOCK_DIM)
    has_d = d < HEAD_DIM
    token = tl.load(tokens + row * ROWS + row_slots)
    is_token = token >= 0
    row_mask = is_token[:, None] & has_d[None, :]
    q += (sample * q_batch + head * q_head) * UNIT
    k += (sample * k_batch + kv_head * k_head) * UNIT
    v += (sample * v_batch + kv_head * v_head) * UNIT
    grad_out += (sample * grad_batch + head * grad_head) * UNIT
    wide = token.to(tl.int64)
    q_rows = q + wide[:, None] * (q_token * UNIT) + d[None, :]
    grad_rows = grad_out + wide[:, None] * (grad_token * UNIT) + d[None, :]
    query = tl.load(q_rows, mask=row_mask, other=0.0)
    grad = tl.load(grad_rows, mask=row_mask, other=0.0)
    row_of = (sample * heads + head) * length + token
    row_lse = tl.load(lse + row_of, mask=is_token, other=0.0)
    # A row that saw no key has weight 0 everywhere.
    row_lse = tl.where(row_lse == float("-inf"), float("inf"), row_lse * LOG2E)
    row_delta = tl.load(delta + row_of, mask=is_token, other=0.0)

    acc = tl.zeros([ROWS, BLOCK_DIM], tl.float32)
    owner = pair // list_heads
    start, split, stop, dense, bases, mask_ids = list_of(bounds, bases, mask_ids, bounds_batch, list_batch, owner, row)
    key_mask += sample * key_length
    if MERGED:
        words += owner.to(tl.int64) * list_batch
        bit = tl.load(bits + row_slots)
    offset = tl.load(offsets + column_slots % (COLUMNS // TILES))
    k_box, v_box = boxes_of(offset, k_token * UNIT, v_token * UNIT, d, WIDE, ALIKE)
    if RPB:
        row_position = tl.load(positions + token, mask=is_token, other=0)
        box_position = tl.load(position_offsets + column_slots % (COLUMNS // TILES))
    else:
        row_position, box_position = 0, 0
    placed = (rpb + head * rpb_entries, positions, box_position, row_position, centre, rpb_entries)

    if FULL:
        for i in range(start, split, TILES):
            base = bases_at(bases, i, column_slots, COLUMNS, TILES)
            key = tl.load(rows_at(k, base, k_token * UNIT, k_box, TILES), mask=has_d[None, :], other=0.0)
            scores = scores_of(query, key, score_scale, base, placed, RPB, False, PRECISION)
            weights = tl.exp2(scores - row_lse[:, None])
            if KEY_MASK:
                weights = tl.where(tl.load(key_mask + base + offset)[None, :] != 0, weights, 0.0)
            value = tl.load(rows_at(v, base, v_token * UNIT, v_box, TILES), mask=has_d[None, :], other=0.0)
            acc = _accumulate(acc, grad, key, value, weights, row_delta, PRECISION)
    if PARTIAL:
        for i in range(split, stop, TILES):
            base = bases_at(bases, i, column_slots, COLUMNS, TILES)
            inside = base + offset < key_length
            key = tl.load(
                rows_at(k, base, k_token * UNIT, k_box, TILES), mask=inside[:, None] & has_d[None, :], other=0.0
            )
            scores = scores_of(query, key, score_scale, base, placed, RPB, False, PRECISION)
            visible = see(masks, mask_ids, i, row_slots, column_slots, ROWS, COLUMNS, TILES)
            if MERGED:
                visible &= listed_by(words, i, bit)[:, None]
            if KEY_MASK:
                visible &= tl.load(key_mask + base + offset, mask=inside, other=0)[None, :] != 0
            weights = tl.where(visible, tl.exp2(scores - row_lse[:, None]), 0.0)
            value = tl.load(
                rows_at(v, base, v_token * UNIT, v_box, TILES), mask=inside[:, None] & has_d[None, :], other=0.0
            )
            acc = _accumulate(acc, grad, key, value, weights, row_delta, PRECISION)
    if DENSE:
        k_run, v_run = boxes_of(column_slots, k_token * UNIT, v_token * UNIT, d, WIDE, ALIKE)
        for i in range(0, dense):
            first, end = dense_run(i, prefix_tiles, suffix_tiles, prefix, suffix_start, suffix, extra, COLUMNS)
            inside = first + column_slots < end
            here = inside[:, None] & has_d[None, :]
            base = first.to(tl.int64)
            key = tl.load(k + base * (k_token * UNIT) + k_run, mask=here, other=0.0)
            scores = tl.dot(query, tl.trans(key), input_precision=PRECISION) * score_scale
            visible = inside
            if KEY_MASK:
                visible &= tl.load(key_mask + base + column_slots, mask=inside, other=0) != 0
            weights = tl.where(visible[None, :], tl.exp2(scores - row_lse[:, None]), 0.0)
            value = tl.load(v + base * (v_token * UNIT) + v_run, mask=here, other=0.0)
            acc = _accumulate(acc, grad, key, value, weights, row_delta, PRECISION)

    out_row = (sample * length + token) * heads + head
    tl.store(grad_q + out_row[:, None] * HEAD_DIM + d[None, :], (acc * scale).to(grad_q.dtype.element_ty),
             mask=row_mask)  # fmt: skip
