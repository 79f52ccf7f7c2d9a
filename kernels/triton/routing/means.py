"""Means of the queries and keys of each region, and their products, head by head."""

# What a kernel takes and returns exists on the GPU only: Python types would say nothing.
# ruff: noqa: ANN001, ANN202, ANN201

# The language of Triton kernels is not quite Python.
# pyright: reportArgumentType=false, reportGeneralTypeIssues=false, reportAttributeAccessIssue=false, reportCallIssue=false, reportIndexIssue=false, reportOptionalMemberAccess=false, reportAssignmentType=false, reportOperatorIssue=false
from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _mean(x, out, tokens, step, slots, HEAD_DIM: tl.constexpr, BLOCK_DIM: tl.constexpr, SLOTS: tl.constexpr):
    """Mean of the tokens of one region, a channel vector of one head."""
    d = tl.arange(0, BLOCK_DIM)
    total = tl.zeros([BLOCK_DIM], tl.float32)
    number = 0
    for start in range(0, slots, SLOTS):
        slot = start + tl.arange(0, SLOTS)
        token = tl.load(tokens + slot, mask=slot < slots, other=-1)
        rows = x + token.to(tl.int64)[:, None] * step + d[None, :]
        total += tl.sum(
            tl.load(rows, mask=(token >= 0)[:, None] & (d < HEAD_DIM)[None, :], other=0.0).to(tl.float32), 0
        )
        number += tl.sum((token >= 0).to(tl.int32), 0)
    tl.store(out + d, total / number.to(tl.float32), mask=d < HEAD_DIM)


@triton.jit
def region_means(
    q, k, mean_q, mean_k, tokens,
    q_batch, q_token, q_head, k_batch, k_token, k_head, heads, kv_heads, regions, slots,
    HEAD_DIM: tl.constexpr, BLOCK_DIM: tl.constexpr, SLOTS: tl.constexpr,
):  # fmt: skip
    """Mean query and key of each region and head: float32 [B, regions, heads, HEAD_DIM].

    Programs of q's heads come first, then those of k's. `tokens` lists those of each region, [regions, slots], -1 where
    it has fewer.
    """
    region, head, sample = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    own = tokens + region * slots
    if head < heads:
        out = mean_q + ((sample * regions + region) * heads + head) * HEAD_DIM
        _mean(q + sample * q_batch + head.to(tl.int64) * q_head, out, own, q_token, slots, HEAD_DIM, BLOCK_DIM, SLOTS)
    else:
        head -= heads
        out = mean_k + ((sample * regions + region) * kv_heads + head) * HEAD_DIM
        _mean(k + sample * k_batch + head.to(tl.int64) * k_head, out, own, k_token, slots, HEAD_DIM, BLOCK_DIM, SLOTS)


@triton.jit
def head_products(
    mean_q, mean_k, products, heads, group, regions,
    HEAD_DIM: tl.constexpr, ROWS: tl.constexpr, BLOCK_REGIONS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """Products of mean queries and keys of one head, float32 [B, heads, regions, regions]."""
    head, sample = tl.program_id(1), tl.program_id(2).to(tl.int64)
    row, column = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, BLOCK_REGIONS)
    left = mean_q + ((sample * regions + row) * heads + head)[:, None] * HEAD_DIM
    right = mean_k + ((sample * regions + column) * (heads // group) + head // group)[None, :] * HEAD_DIM
    total = tl.zeros([ROWS, BLOCK_REGIONS], tl.float32)
    for start in range(0, HEAD_DIM, CHANNELS):
        d = start + tl.arange(0, CHANNELS)
        a = tl.load(left + d[None, :], mask=(row < regions)[:, None] & (d < HEAD_DIM)[None, :], other=0.0)
        b = tl.load(right + d[:, None], mask=(column < regions)[None, :] & (d < HEAD_DIM)[:, None], other=0.0)
        total = tl.dot(a, b, total, input_precision="ieee")
    place = products + ((sample * heads + head) * regions + row)[:, None] * regions + column[None, :]
    tl.store(place, total, mask=(row < regions)[:, None] & (column < regions)[None, :])
