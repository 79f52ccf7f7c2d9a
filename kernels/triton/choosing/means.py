"""Means of the queries or keys of each part of each block."""

# What a kernel takes and returns exists on the GPU only: Python types would say nothing.
# ruff: noqa: ANN001, ANN201

# The language of Triton kernels is not quite Python.
# pyright: reportArgumentType=false, reportGeneralTypeIssues=false, reportAttributeAccessIssue=false, reportCallIssue=false, reportIndexIssue=false, reportOptionalMemberAccess=false, reportAssignmentType=false, reportOperatorIssue=false
from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def part_means(
    x, out, rounded, counts, tokens, valid,
    x_batch, x_token, x_head, valid_batch, scale, heads, parts, slots,
    HEAD_DIM: tl.constexpr, BLOCK_DIM: tl.constexpr, SLOTS: tl.constexpr, VALID: tl.constexpr,
    ROUNDED: tl.constexpr,
):  # fmt: skip
    """Mean of the valid tokens of one part for one head, times `scale`: float32 [B, heads, parts, HEAD_DIM].

    Args:
        x: Tokens [B, tokens, heads, HEAD_DIM]; channels are contiguous.
        out: The means; zeros for a part without valid tokens.
        rounded: The same in another dtype, written with ROUNDED.
        counts: Valid tokens of each part: int32 [B, parts].
        tokens: Tokens of each part, -1 where it has fewer than others: int32 [parts, slots].
        valid: Which tokens take part: uint8 [B, tokens]; all without VALID.
        x_batch: Distance of two samples; x_token of two tokens, x_head of two heads, valid_batch of two masks.
        x_token: See x_batch.
        x_head: See x_batch.
        valid_batch: See x_batch.
        scale: Factor on the means.
        heads: Heads.
        parts: Parts of all blocks.
        slots: Tokens of a part at most.
        HEAD_DIM: Channels.
        BLOCK_DIM: A power of two that is at least HEAD_DIM.
        SLOTS: Tokens that are read at once.
        VALID: Whether some tokens take no part.
        ROUNDED: Whether somebody reads means of another dtype too.
    """
    part, head, sample = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    x += sample * x_batch + head.to(tl.int64) * x_head
    d = tl.arange(0, BLOCK_DIM)
    total = tl.zeros([BLOCK_DIM], tl.float32)
    number = 0
    for start in range(0, slots, SLOTS):
        slot = start + tl.arange(0, SLOTS)
        token = tl.load(tokens + part * slots + slot, mask=slot < slots, other=-1)
        here = token >= 0
        if VALID:
            here &= tl.load(valid + sample * valid_batch + token, mask=here, other=0) != 0
        rows = tl.load(
            x + token.to(tl.int64)[:, None] * x_token + d[None, :],
            mask=here[:, None] & (d < HEAD_DIM)[None, :],
            other=0.0,
        )
        total += tl.sum(rows.to(tl.float32), 0)
        number += tl.sum(here.to(tl.int32), 0)
    mean = total / tl.maximum(number, 1).to(tl.float32) * scale
    at = (sample * heads + head) * parts + part
    tl.store(out + at * HEAD_DIM + d, mean, mask=d < HEAD_DIM)
    if ROUNDED:
        tl.store(rounded + at * HEAD_DIM + d, mean.to(rounded.dtype.element_ty), mask=d < HEAD_DIM)
    if head == 0:
        tl.store(counts + sample * parts + part, number)
