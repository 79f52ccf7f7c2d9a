"""Attention to splits of the keys put together by their log-sum-exps."""

# What a kernel takes and returns exists on the GPU only: Python types would say nothing.
# ruff: noqa: ANN001, ANN201

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["queries", "splits"])
def combine(
    parts, lse, out, heads, queries, splits,
    HEAD_DIM: tl.constexpr, BLOCK_DIM: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Compute ROWS queries of one head: the splits' results weighted by their share of the sum of exponentials.

    Splits are added one after the other, so the sum has one order. A query that saw no key in any gives zeros.

    Args (but for compile-time sizes):
        parts: float32 [B, H, splits, queries, D].
        lse: In base 2, float32 [B, H, splits, queries].
        out: Result [B, queries, H, D].
        heads: H.
    """
    blocks = tl.cdiv(queries, ROWS)
    pair, row = (tl.program_id(0) // blocks).to(tl.int64), (tl.program_id(0) % blocks) * ROWS + tl.arange(0, ROWS)
    sample, head = pair // heads, pair % heads
    d = tl.arange(0, BLOCK_DIM)
    is_row = row < queries
    here = is_row[:, None] & (d < HEAD_DIM)[None, :]
    top = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, BLOCK_DIM], tl.float32)
    for split in range(0, splits):
        part = (pair * splits + split) * queries + row
        level = tl.load(lse + part, mask=is_row, other=float("-inf"))
        new = tl.maximum(top, level)
        base = tl.where(new == float("-inf"), 0.0, new)
        old, share = tl.exp2(top - base), tl.exp2(level - base)
        acc = acc * old[:, None] + share[:, None] * tl.load(parts + part[:, None] * HEAD_DIM + d[None, :], mask=here)
        total = total * old + share
        top = new
    acc = acc / tl.where(total == 0.0, 1.0, total)[:, None]
    row_of = (sample * queries + row) * heads + head
    tl.store(out + row_of[:, None] * HEAD_DIM + d[None, :], acc.to(out.dtype.element_ty), mask=here)
