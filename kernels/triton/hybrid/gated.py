"""Adding what query blocks have to the outputs of their queries, behind a gate."""

# What a kernel takes and returns exists on the GPU only: Python types would say nothing.
# ruff: noqa: ANN001, ANN201

# The language of Triton kernels is not quite Python.
# pyright: reportArgumentType=false, reportGeneralTypeIssues=false, reportOptionalMemberAccess=false, reportOperatorIssue=false
from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def add_gated(
    q, coarse, gate, gate_map, out, tokens,
    q_batch, q_token, q_head, out_batch, out_token, out_head, heads, groups, slots,
    FEATURES: tl.constexpr, CHANNELS: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr,
    MAP: tl.constexpr, HALF: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Add (q gate_map + gate) * coarse to the outputs of ROWS queries of one block and head.

    Args:
        q: Queries [B, tokens, heads, FEATURES]; channels are contiguous.
        coarse: What each block has: [B, heads, groups, CHANNELS].
        gate: float32 [heads, CHANNELS].
        gate_map: [heads, FEATURES, CHANNELS], read with MAP.
        out: The softmax branch [B, tokens, heads, CHANNELS], then the result; channels are contiguous.
        tokens: Queries of each block, -1 where it has fewer than others: int32 [groups, slots].
        q_batch: Distance of two samples; the others of tokens and heads likewise.
        q_token: See q_batch.
        q_head: See q_batch.
        out_batch: See q_batch.
        out_token: See q_batch.
        out_head: See q_batch.
        heads: Query heads.
        groups: Blocks of queries.
        slots: Queries of a block at most.
        FEATURES: Channels of queries.
        CHANNELS: Channels of values.
        BLOCK_F: A power of two that is at least FEATURES.
        BLOCK_D: A power of two that is at least CHANNELS.
        ROWS: Queries of a program.
        MAP: Whether the gate is a map of the queries.
        HALF: Whether queries and map are multiplied in their own dtype.
        PRECISION: Of float32 products.
    """
    parts = tl.cdiv(slots, ROWS)
    number, part = tl.program_id(0) // parts, tl.program_id(0) % parts
    head, sample = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    slot = part * ROWS + tl.arange(0, ROWS)
    token = tl.load(tokens + number * slots + slot, mask=slot < slots, other=-1)
    here = token >= 0
    wide = token.to(tl.int64)[:, None]
    d = tl.arange(0, BLOCK_D)
    has_d = d < CHANNELS
    # All that is read is asked for before anything waits for it.
    rows = out + sample * out_batch + head * out_head + wide * out_token + d[None, :]
    mask = here[:, None] & has_d[None, :]
    soft = tl.load(rows, mask=mask, other=0.0)
    block = tl.load(coarse + ((sample * heads + head) * groups + number) * CHANNELS + d, mask=has_d, other=0.0)
    by = tl.zeros([ROWS, BLOCK_D], tl.float32)
    if MAP:
        f = tl.arange(0, BLOCK_F)
        has_f = f < FEATURES
        x = tl.load(
            q + sample * q_batch + head * q_head + wide * q_token + f[None, :],
            mask=here[:, None] & has_f[None, :],
            other=0.0,
        )
        weight = tl.load(
            gate_map + (head * FEATURES + f[:, None]) * CHANNELS + d[None, :],
            mask=has_f[:, None] & has_d[None, :],
            other=0.0,
        )
        if HALF:
            by = tl.dot(x, weight, by)
        else:
            by = tl.dot(x.to(tl.float32), weight.to(tl.float32), by, input_precision=PRECISION)
    by += tl.load(gate + head * CHANNELS + d, mask=has_d, other=0.0)[None, :]
    tl.store(rows, (soft.to(tl.float32) + by * block.to(tl.float32)[None, :]).to(out.dtype.element_ty), mask=mask)
