"""Attention to a run of keys without lists, split where queries are few: both halves of agent attention."""

# What a kernel takes and returns exists on the GPU only: Python types would say nothing.
# ruff: noqa: ANN001, ANN201

# The language of Triton kernels is not quite Python.
# pyright: reportArgumentType=false, reportGeneralTypeIssues=false
from __future__ import annotations

import triton
import triton.language as tl

# Sizes that differ from call to call: kernels are not compiled again for their values.
RUNTIME_SIZES = ("queries", "keys", "chunk", "splits")


@triton.jit(do_not_specialize=RUNTIME_SIZES)
def attend_run(
    q, k, v, key_mask, out, lse,
    q_batch, q_token, q_head, k_batch, k_token, k_head, v_batch, v_token, v_head,
    scale, heads, group, queries, keys, chunk, splits,
    HEAD_DIM: tl.constexpr, BLOCK_DIM: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, UNIT: tl.constexpr,
    KEY_MASK: tl.constexpr, SPLIT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Compute ROWS queries of one head over one chunk of the keys, by online softmax (FlashAttention-2, algorithm 1).

    Args (but for strides, which are in units of UNIT elements, and compile-time sizes):
        q: Queries [B, queries, H, D].
        k: Keys [B, keys, H / group, D].
        v: Values [B, keys, H / group, D].
        key_mask: uint8 [B, keys], read if KEY_MASK.
        out: Result. If SPLIT float32 [B, H, splits, queries, D], else [B, queries, H, D] in q's dtype.
        lse: Result if SPLIT: log-sum-exp in base 2, float32 [B, H, splits, queries].
        scale: Factor on the logits, in base 2.
        heads: H.
        group: Query heads that share keys.
        chunk: Keys of a split.
        splits: Number of splits.
    """
    split, rest = tl.program_id(0) % splits, tl.program_id(0) // splits
    blocks = tl.cdiv(queries, ROWS)
    pair, row = (rest // blocks).to(tl.int64), (rest % blocks) * ROWS + tl.arange(0, ROWS)
    sample, head = pair // heads, pair % heads
    kv_head = head // group
    d, column = tl.arange(0, BLOCK_DIM), tl.arange(0, COLUMNS)
    has_d, is_row = d < HEAD_DIM, row < queries
    row_mask = is_row[:, None] & has_d[None, :]
    rows = (sample * q_batch + head * q_head) * UNIT + row.to(tl.int64)[:, None] * (q_token * UNIT) + d[None, :]
    query = tl.load(q + rows, mask=row_mask, other=0.0)
    k += (sample * k_batch + kv_head * k_head) * UNIT
    v += (sample * v_batch + kv_head * v_head) * UNIT
    key_mask += sample * keys

    top = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, BLOCK_DIM], tl.float32)
    end = tl.minimum((split + 1) * chunk, keys)
    for first in range(split * chunk, end, COLUMNS):
        token = first + column
        inside = token < end
        here, wide = inside[:, None] & has_d[None, :], token.to(tl.int64)[:, None]
        key = tl.load(k + wide * (k_token * UNIT) + d[None, :], mask=here, other=0.0)
        scores = tl.dot(query, tl.trans(key), input_precision=PRECISION) * scale
        seen = inside
        if KEY_MASK:
            seen &= tl.load(key_mask + token, mask=inside, other=0) != 0
        scores = tl.where(seen[None, :], scores, float("-inf"))
        value = tl.load(v + wide * (v_token * UNIT) + d[None, :], mask=here, other=0.0)
        new = tl.maximum(top, tl.max(scores, 1))
        # A row that has seen no key yet has new = -inf: 0 instead keeps exp2 free of nan.
        base = tl.where(new == float("-inf"), 0.0, new)
        p = tl.exp2(scores - base[:, None])
        alpha = tl.exp2(top - base)
        total = total * alpha + tl.sum(p, 1)
        acc = tl.dot(p.to(v.dtype.element_ty), value, acc * alpha[:, None], input_precision=PRECISION)
        top = new

    acc = acc / tl.where(total == 0.0, 1.0, total)[:, None]
    if SPLIT:
        part = (pair * splits + split) * queries + row
        tl.store(out + part[:, None] * HEAD_DIM + d[None, :], acc, mask=row_mask)
        # total = 0 gives -inf, as it should be.
        tl.store(lse + part, top + tl.log2(total), mask=is_row)
    else:
        row_of = (sample * queries + row) * heads + head
        tl.store(out + row_of[:, None] * HEAD_DIM + d[None, :], acc.to(out.dtype.element_ty), mask=row_mask)
