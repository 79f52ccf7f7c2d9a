"""Backward kernel for the relative position bias: one bias entry per program, over all queries."""

# What a kernel takes and returns exists on the GPU only: Python types would say nothing.
# ruff: noqa: ANN001, ANN201

from __future__ import annotations

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit(do_not_specialize=["grid_tokens", "prefix", "length", "key_length", "rpb_entries"])
def bias_gradients(
    q, k, v, grad_out, lse, delta, grad_rpb, key_mask, rpb,
    partner, q_batch, q_token, q_head, k_batch, k_token, k_head, v_batch, v_token, v_head,
    grad_batch, grad_token, grad_head,
    scale, heads, group, length, key_length, grid_tokens, prefix, rpb_entries,
    HEAD_DIM: tl.constexpr, BLOCK_DIM: tl.constexpr, ROWS: tl.constexpr, UNIT: tl.constexpr,
    KEY_MASK: tl.constexpr,
):  # fmt: skip
    """Sum of the score gradients of all (query, key) pairs that share one bias entry: grad_rpb [B, H, entries].

    Nothing is scattered, so the sum has one order and no atomics.

    Args (besides those of the other kernels):
        partner: Key token of each grid query for each bias entry, -1 where it sees none there:
            int32 [entries, grid tokens].
    """
    # All programs are in the first axis, the others have few.
    entry, pair = tl.program_id(0) % rpb_entries, (tl.program_id(0) // rpb_entries).to(tl.int64)
    sample, head = pair // heads, pair % heads
    kv_head = head // group
    d = tl.arange(0, BLOCK_DIM)
    has_d = d < HEAD_DIM
    bias = tl.load(rpb + head * rpb_entries + entry)
    q += (sample * q_batch + head * q_head) * UNIT
    k += (sample * k_batch + kv_head * k_head) * UNIT
    v += (sample * v_batch + kv_head * v_head) * UNIT
    grad_out += (sample * grad_batch + head * grad_head) * UNIT
    partner += entry.to(tl.int64) * grid_tokens
    row_of = (sample * heads + head) * length + prefix
    sums = tl.zeros([ROWS], tl.float32)
    for first in range(0, grid_tokens, ROWS):
        index = first + tl.arange(0, ROWS)
        key = tl.load(partner + index, mask=index < grid_tokens, other=-1).to(tl.int64)
        seen = key >= 0
        if KEY_MASK:
            seen &= tl.load(key_mask + sample * key_length + key, mask=seen, other=0) != 0
        query = (index + prefix).to(tl.int64)
        here = seen[:, None] & has_d[None, :]
        q_row = tl.load(q + query[:, None] * (q_token * UNIT) + d[None, :], mask=here, other=0.0).to(tl.float32)
        k_row = tl.load(k + key[:, None] * (k_token * UNIT) + d[None, :], mask=here, other=0.0).to(tl.float32)
        v_row = tl.load(v + key[:, None] * (v_token * UNIT) + d[None, :], mask=here, other=0.0).to(tl.float32)
        grad = tl.load(grad_out + query[:, None] * (grad_token * UNIT) + d[None, :], mask=here, other=0.0)
        score = tl.sum(q_row * k_row, 1) * scale + bias
        row_lse = tl.load(lse + row_of + index, mask=seen, other=float("inf"))
        row_delta = tl.load(delta + row_of + index, mask=seen, other=0.0)
        weight = tl.where(seen, tl.exp2((score - row_lse) * LOG2E), 0.0)
        sums += weight * (tl.sum(grad.to(tl.float32) * v_row, 1) - row_delta)
    tl.store(grad_rpb + (sample * heads + head) * rpb_entries + entry, tl.sum(sums, 0))
