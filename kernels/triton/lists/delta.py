"""Backward pre-pass: what the softmax gradient subtracts from each row."""

# What a kernel takes and returns exists on the GPU only: Python types would say nothing.
# ruff: noqa: ANN001, ANN201

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["length", "grad_lse_batch", "grad_lse_token", "grad_lse_head"])
def deltas(
    out, grad_out, grad_lse, delta,
    grad_batch, grad_token, grad_head, grad_lse_batch, grad_lse_token, grad_lse_head, length, heads,
    HEAD_DIM: tl.constexpr, BLOCK_DIM: tl.constexpr, ROWS: tl.constexpr, UNIT: tl.constexpr, LSE: tl.constexpr,
):  # fmt: skip
    """Delta = rowsum(out * grad_out) - grad_lse, float32 [B, H, S] (FlashAttention-2, algorithm 2, line 4)."""
    # All programs are in the first axis, the others have few.
    blocks = tl.cdiv(length, ROWS)
    pair, block = (tl.program_id(0) // blocks).to(tl.int64), (tl.program_id(0) % blocks).to(tl.int64)
    sample, head = pair // heads, pair % heads
    token = block * ROWS + tl.arange(0, ROWS)
    d = tl.arange(0, BLOCK_DIM)
    is_token = token < length
    here = is_token[:, None] & (d < HEAD_DIM)[None, :]
    row = (sample * length + token) * heads + head
    o = tl.load(out + row[:, None] * HEAD_DIM + d[None, :], mask=here, other=0.0).to(tl.float32)
    grad_row = (sample * grad_batch + token * grad_token + head * grad_head) * UNIT
    grad = tl.load(grad_out + grad_row[:, None] + d[None, :], mask=here, other=0.0).to(tl.float32)
    value = tl.sum(o * grad, 1)
    if LSE:
        lse_row = sample * grad_lse_batch + token * grad_lse_token + head * grad_lse_head
        value -= tl.load(grad_lse + lse_row, mask=is_token, other=0.0)
    tl.store(delta + (sample * heads + head) * length + token, value, mask=is_token)
