"""Scores of all pairs of blocks of some heads, from the means of their parts."""

# What a kernel takes and returns exists on the GPU only: Python types would say nothing.
# ruff: noqa: ANN001, ANN201

# The language of Triton kernels is not quite Python.
# pyright: reportArgumentType=false, reportGeneralTypeIssues=false, reportAttributeAccessIssue=false, reportCallIssue=false, reportIndexIssue=false, reportOptionalMemberAccess=false, reportAssignmentType=false, reportOperatorIssue=false
from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def pair_scores(
    mean_q, mean_k, count_q, count_k, scores,
    heads, first_head, some, group, rows, columns,
    HEAD_DIM: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, CHANNELS: tl.constexpr,
    QUERY_PARTS: tl.constexpr, KEY_PARTS: tl.constexpr,
):  # fmt: skip
    """Logarithm of the sum of the weights of all pairs of parts of two blocks; of single parts their product.

    Args:
        mean_q: Scaled means of queries: float32 [B, heads, rows * QUERY_PARTS, HEAD_DIM].
        mean_k: Means of keys: float32 [B, key heads, columns * KEY_PARTS, HEAD_DIM].
        count_q: Valid tokens of each part of queries: int32 [B, rows * QUERY_PARTS]; read where there are several.
        count_k: The same of keys.
        scores: float32 [B, some, rows, columns].
        heads: Query heads.
        first_head: The first of `some` heads.
        some: Heads whose scores are wanted.
        group: Query heads of a key head.
        rows: Query blocks.
        columns: Key blocks.
        HEAD_DIM: Channels.
        ROWS: Parts of queries of a program.
        COLUMNS: Parts of keys of a program.
        CHANNELS: Channels of a step.
        QUERY_PARTS: Parts of a query block.
        KEY_PARTS: Parts of a key block.
    """
    sample, own = (tl.program_id(2) // some).to(tl.int64), tl.program_id(2) % some
    head = first_head + own
    row, column = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    query_parts, key_parts = rows * QUERY_PARTS, columns * KEY_PARTS
    is_row, is_column = row < query_parts, column < key_parts
    left = mean_q + ((sample * heads + head) * query_parts + row)[:, None] * HEAD_DIM
    right = mean_k + ((sample * (heads // group) + head // group) * key_parts + column)[None, :] * HEAD_DIM
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    for start in range(0, HEAD_DIM, CHANNELS):
        d = start + tl.arange(0, CHANNELS)
        a = tl.load(left + d[None, :], mask=is_row[:, None] & (d < HEAD_DIM)[None, :], other=0.0)
        b = tl.load(right + d[:, None], mask=is_column[None, :] & (d < HEAD_DIM)[:, None], other=0.0)
        # Three products of halves: the accuracy of float32 on tensor cores.
        total = tl.dot(a, b, total, input_precision="tf32x3")
    if QUERY_PARTS * KEY_PARTS > 1:
        seen_row = tl.load(count_q + sample * query_parts + row, mask=is_row, other=0) > 0
        seen_column = tl.load(count_k + sample * key_parts + column, mask=is_column, other=0) > 0
        total = tl.where(seen_row[:, None] & seen_column[None, :], total, float("-inf"))
        pairs = tl.reshape(total, [ROWS // QUERY_PARTS, QUERY_PARTS, COLUMNS // KEY_PARTS, KEY_PARTS])
        top = tl.max(tl.max(pairs, 3), 1)
        base = tl.where(top == float("-inf"), 0.0, top)
        weights = tl.exp(pairs - base[:, None, :, None])
        total = base + tl.log(tl.sum(tl.sum(weights, 3), 1))
    r = tl.program_id(0) * (ROWS // QUERY_PARTS) + tl.arange(0, ROWS // QUERY_PARTS)
    c = tl.program_id(1) * (COLUMNS // KEY_PARTS) + tl.arange(0, COLUMNS // KEY_PARTS)
    place = scores + ((sample * some + own) * rows + r)[:, None] * columns + c[None, :]
    tl.store(place, total, mask=(r < rows)[:, None] & (c < columns)[None, :])
