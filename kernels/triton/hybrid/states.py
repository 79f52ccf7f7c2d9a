"""States of groups of keys: sums over their tokens of f(k) v^T and of f(k)."""

# What a kernel takes and returns exists on the GPU only: Python types would say nothing.
# ruff: noqa: ANN001, ANN201

# The language of Triton kernels is not quite Python.
# pyright: reportArgumentType=false, reportGeneralTypeIssues=false, reportOptionalMemberAccess=false, reportOperatorIssue=false, reportCallIssue=false, reportIndexIssue=false
from __future__ import annotations

import triton
import triton.language as tl

# Exponentials are of base 2.
LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def raised(x, has_f, FEATURE: tl.constexpr):
    """Features of tokens [ROWS, F] in float32, 0 where there is no channel; "softmax" is not divided by its sum."""
    x = x.to(tl.float32)
    if FEATURE == "softmax":
        shown = tl.where(has_f[None, :], x * LOG2E, float("-inf"))
        x = tl.exp2(shown - tl.max(shown, 1)[:, None])
    elif FEATURE == "elu":
        # The exponential is of min(x, 0), so that the branch not taken cannot overflow.
        x = tl.where(x > 0.0, x + 1.0, tl.exp2(tl.minimum(x, 0.0) * LOG2E))
    else:
        x = tl.maximum(x, 0.0)
    return tl.where(has_f[None, :], x, 0.0)


@triton.jit
def group_states(
    k, v, tokens, valid, states, sums,
    k_batch, k_token, k_head, v_batch, v_token, v_head, valid_batch, heads, groups, slots, length,
    FEATURES: tl.constexpr, CHANNELS: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr,
    FEATURE: tl.constexpr, RUNS: tl.constexpr, VALID: tl.constexpr, HALF: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Compute the state of one group of keys of one head.

    Args:
        k: Keys [B, tokens, heads, FEATURES]; channels are contiguous.
        v: Values [B, tokens, heads, CHANNELS]; likewise.
        tokens: Tokens of each group, -1 where it has fewer than others: int32 [groups, slots]; not read with RUNS.
        valid: Which tokens take part: uint8 [B, tokens]; all without VALID.
        states: Result [B, heads, groups, FEATURES, CHANNELS].
        sums: Result, float32 [B, heads, groups, FEATURES].
        k_batch: Distance of two samples; the others of tokens, heads and masks likewise.
        k_token: See k_batch.
        k_head: See k_batch.
        v_batch: See k_batch.
        v_token: See k_batch.
        v_head: See k_batch.
        valid_batch: See k_batch.
        heads: Key heads.
        groups: Groups of tokens.
        slots: Tokens of a group at most.
        length: Tokens of all groups.
        FEATURES: Channels of keys.
        CHANNELS: Channels of values.
        BLOCK_F: A power of two that is at least FEATURES.
        BLOCK_D: A power of two that is at least CHANNELS.
        ROWS: Tokens that are read at once.
        FEATURE: f: "softmax", "elu" or "relu".
        RUNS: Whether groups are runs of `slots` tokens.
        VALID: Whether some tokens take no part.
        HALF: Whether features are rounded to the values' dtype and multiplied in it.
        PRECISION: Of float32 products.
    """
    group, head, sample = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    k += sample * k_batch + head * k_head
    v += sample * v_batch + head * v_head
    f, d = tl.arange(0, BLOCK_F), tl.arange(0, BLOCK_D)
    has_f, has_d = f < FEATURES, d < CHANNELS
    # Values lie as the product takes them on its left, features on its right.
    state = tl.zeros([BLOCK_D, BLOCK_F], tl.float32)
    # Kept apart by row until the end: a sum over rows in each step would be one over threads.
    total = tl.zeros([ROWS, BLOCK_F], tl.float32)
    for start in range(0, slots, ROWS):
        slot = start + tl.arange(0, ROWS)
        if RUNS:
            token = group * slots + slot
            here = (slot < slots) & (token < length)
        else:
            token = tl.load(tokens + group * slots + slot, mask=slot < slots, other=-1)
            here = token >= 0
        if VALID:
            here &= tl.load(valid + sample * valid_batch + token, mask=here, other=0) != 0
        wide = token.to(tl.int64)[:, None]
        x = tl.load(k + wide * k_token + f[None, :], mask=here[:, None] & has_f[None, :], other=0.0)
        value = tl.load(v + wide * v_token + d[None, :], mask=here[:, None] & has_d[None, :], other=0.0)
        phi = raised(x, has_f, FEATURE)
        if FEATURE == "softmax":
            phi *= tl.where(here, 1.0 / tl.sum(phi, 1), 0.0)[:, None]
        else:
            phi = tl.where(here[:, None], phi, 0.0)
        total += phi
        if HALF:
            state = tl.dot(tl.trans(value), phi.to(value.dtype), state)
        else:
            state = tl.dot(tl.trans(value.to(tl.float32)), phi, state, input_precision=PRECISION)
    at = (sample * heads + head) * groups + group
    where = states + (at * FEATURES + f[None, :]) * CHANNELS + d[:, None]
    tl.store(where, state.to(states.dtype.element_ty), mask=has_f[None, :] & has_d[:, None])
    tl.store(sums + at * FEATURES + f, tl.sum(total, 0), mask=has_f)
