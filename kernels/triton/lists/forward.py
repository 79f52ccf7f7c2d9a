"""Forward kernel: one query tile per program, online softmax over its key tiles."""

# What a kernel takes and returns exists on the GPU only: Python types would say nothing.
# ruff: noqa: ANN001, ANN201

# The language of Triton kernels is not quite Python.
# pyright: reportArgumentType=false, reportGeneralTypeIssues=false
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

LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def absorb(acc, total, top, scores, v, PRECISION: tl.constexpr, GUARD: tl.constexpr):
    """One step of the online softmax (Milakov and Gimelshein 2018; FlashAttention-2, algorithm 1), base 2."""
    new = tl.maximum(top, tl.max(scores, 1))
    # A row that has seen no key yet has new = -inf: 0 instead keeps exp2 free of nan.
    base = tl.where(new == float("-inf"), 0.0, new) if GUARD else new
    p = tl.exp2(scores - base[:, None])
    alpha = tl.exp2(top - base)
    total = total * alpha + tl.sum(p, 1)
    acc = tl.dot(p.to(v.dtype), v, acc * alpha[:, None], input_precision=PRECISION)
    return acc, total, new


@triton.jit(do_not_specialize=RUNTIME_SIZES)
def attend(
    q, k, v, out, lse, key_mask, rpb,
    tokens, bounds, bases, mask_ids, offsets, masks, positions, position_offsets,
    q_batch, q_token, q_head, k_batch, k_token, k_head, v_batch, v_token, v_head, bounds_batch, list_batch, list_heads,
    scale, heads, group, length, key_length,
    dense_rows, grid_rows, pairs, prefix_tiles, suffix_tiles, prefix, suffix_start, suffix, extra,
    centre, rpb_entries,
    HEAD_DIM: tl.constexpr, BLOCK_DIM: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, TILES: tl.constexpr,
    UNIT: tl.constexpr, WIDE: tl.constexpr, ALIKE: tl.constexpr,
    FULL: tl.constexpr, PARTIAL: tl.constexpr, DENSE: tl.constexpr,
    KEY_MASK: tl.constexpr, RPB: tl.constexpr, LSE: tl.constexpr, PRECISION: tl.constexpr,
    words=None, bits=None, MERGED: tl.constexpr = False,
):  # fmt: skip
    """Attention of one query tile; see `program.Program` for the lists and `launch` for the arguments.

    Strides are in units of UNIT elements, so that the compiler knows how far loads are aligned.
    """
    row, pair = place(tl.program_id(0), dense_rows, grid_rows, pairs)
    sample, head = (pair // heads).to(tl.int64), (pair % heads).to(tl.int64)
    kv_head = head // group
    row_slots, column_slots, d = tl.arange(0, ROWS), tl.arange(0, COLUMNS), tl.arange(0, BLOCK_DIM)
    has_d = d < HEAD_DIM
    token = tl.load(tokens + row * ROWS + row_slots)
    is_token = token >= 0
    q += (sample * q_batch + head * q_head) * UNIT
    k += (sample * k_batch + kv_head * k_head) * UNIT
    v += (sample * v_batch + kv_head * v_head) * UNIT
    q_rows = q + token.to(tl.int64)[:, None] * (q_token * UNIT) + d[None, :]
    row_mask = is_token[:, None] & has_d[None, :]
    query = tl.load(q_rows, mask=row_mask, other=0.0)

    top = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
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
            scores = scores_of(query, key, scale, base, placed, RPB, False, PRECISION)
            if KEY_MASK:
                scores = tl.where(tl.load(key_mask + base + offset)[None, :] != 0, scores, float("-inf"))
            value = tl.load(rows_at(v, base, v_token * UNIT, v_box, TILES), mask=has_d[None, :], other=0.0)
            acc, total, top = absorb(acc, total, top, scores, value, PRECISION, KEY_MASK)
    if PARTIAL:
        for i in range(split, stop, TILES):
            base = bases_at(bases, i, column_slots, COLUMNS, TILES)
            # A short tile's empty slots may lie behind the last token.
            inside = base + offset < key_length
            key = tl.load(
                rows_at(k, base, k_token * UNIT, k_box, TILES), mask=inside[:, None] & has_d[None, :], other=0.0
            )
            scores = scores_of(query, key, scale, base, placed, RPB, False, PRECISION)
            visible = see(masks, mask_ids, i, row_slots, column_slots, ROWS, COLUMNS, TILES)
            if MERGED:
                visible &= listed_by(words, i, bit)[:, None]
            if KEY_MASK:
                visible &= tl.load(key_mask + base + offset, mask=inside, other=0)[None, :] != 0
            scores = tl.where(visible, scores, float("-inf"))
            value = tl.load(
                rows_at(v, base, v_token * UNIT, v_box, TILES), mask=inside[:, None] & has_d[None, :], other=0.0
            )
            acc, total, top = absorb(acc, total, top, scores, value, PRECISION, True)
    if DENSE:
        k_run, v_run = boxes_of(column_slots, k_token * UNIT, v_token * UNIT, d, WIDE, ALIKE)
        for i in range(0, dense):
            first, end = dense_run(i, prefix_tiles, suffix_tiles, prefix, suffix_start, suffix, extra, COLUMNS)
            inside = first + column_slots < end
            here = inside[:, None] & has_d[None, :]
            base = first.to(tl.int64)
            key = tl.load(k + base * (k_token * UNIT) + k_run, mask=here, other=0.0)
            scores = tl.dot(query, tl.trans(key), input_precision=PRECISION) * scale
            visible = inside
            if KEY_MASK:
                visible &= tl.load(key_mask + base + column_slots, mask=inside, other=0) != 0
            scores = tl.where(visible[None, :], scores, float("-inf"))
            value = tl.load(v + base * (v_token * UNIT) + v_run, mask=here, other=0.0)
            acc, total, top = absorb(acc, total, top, scores, value, PRECISION, True)

    # Loaded again (volatile: not merged with the first load) to hold fewer registers in the loops.
    token = tl.load(tokens + row * ROWS + row_slots, volatile=True)
    is_token = token >= 0
    acc = acc / tl.where(total == 0.0, 1.0, total)[:, None]
    row_of = (sample * length + token) * heads + head
    tl.store(out + row_of[:, None] * HEAD_DIM + d[None, :], acc.to(out.dtype.element_ty),
             mask=is_token[:, None] & has_d[None, :])  # fmt: skip
    if LSE:
        # total = 0 gives log2 -inf, as it should be.
        tl.store(lse + (sample * heads + head) * length + token, (top + tl.log2(total)) * LN2, mask=is_token)
