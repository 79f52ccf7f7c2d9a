"""Reading states for every query, and joining what comes out to the softmax branch, in place."""

# What a kernel takes and returns exists on the GPU only: Python types would say nothing.
# ruff: noqa: ANN001, ANN201

# The language of Triton kernels is not quite Python.
# pyright: reportArgumentType=false, reportGeneralTypeIssues=false, reportOptionalMemberAccess=false, reportOperatorIssue=false
from __future__ import annotations

import triton
import triton.language as tl

from visattn.kernels.triton.hybrid.states import raised


@triton.jit
def join_states(
    q, state, sums, bias, share, odds, out, tokens,
    q_batch, q_token, q_head, out_batch, out_token, out_head, heads, group, groups, states, slots, length, least,
    FEATURES: tl.constexpr, CHANNELS: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr,
    FEATURE: tl.constexpr, RUNS: tl.constexpr, SHARE: tl.constexpr, ODDS: tl.constexpr, HALF: tl.constexpr,
    PRECISION: tl.constexpr, WIDE: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Compute the queries of one group of one head: lin = f(q) state / (f(q) sums + least).

    out becomes out + lin + bias, or with SHARE lin + share * (out - lin).

    Args:
        q: Queries [B, tokens, heads, FEATURES]; channels are contiguous.
        state: [B, heads / group, states, FEATURES, CHANNELS].
        sums: float32 [B, heads / group, states, FEATURES].
        bias: float32 [CHANNELS], read without SHARE.
        share: float32 [B, heads, groups], read with SHARE.
        odds: Where these are infinite the share is 1: float32 [B, heads, groups], read with ODDS.
        out: The softmax branch [B, tokens, heads, CHANNELS], then the result; channels are contiguous.
        tokens: Queries of each group, -1 where it has fewer than others: int32 [groups, slots]; not read with RUNS.
        q_batch: Distance of two samples; the others of tokens and heads likewise.
        q_token: See q_batch.
        q_head: See q_batch.
        out_batch: See q_batch.
        out_token: See q_batch.
        out_head: See q_batch.
        heads: Query heads.
        group: Query heads that share a state.
        groups: Groups of queries.
        states: Their states: 1 for all groups together, or one each.
        slots: Queries of a group at most.
        length: Queries of all groups.
        least: What is added to denominators.
        FEATURES: Channels of queries.
        CHANNELS: Channels of values.
        BLOCK_F: A power of two that is at least FEATURES.
        BLOCK_D: A power of two that is at least CHANNELS.
        ROWS: Queries that are read at once.
        FEATURE: f: "softmax", "elu" or "relu".
        RUNS: Whether groups are runs of `slots` queries.
        SHARE: Whether the two are mixed.
        ODDS: Whether some shares are 1 whatever they are.
        HALF: Whether features are rounded to the state's dtype and multiplied in it.
        PRECISION: Of float32 products.
        WIDE: Whether queries are float32.
        STAGES: Steps whose queries and outputs are on their way at once.
    """
    number = tl.program_id(0)
    head, sample = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    f, d = tl.arange(0, BLOCK_F), tl.arange(0, BLOCK_D)
    has_f, has_d = f < FEATURES, d < CHANNELS
    at = (sample * (heads // group) + head // group) * states + tl.where(states == 1, 0, number)
    entries = state + (at * FEATURES + f[:, None]) * CHANNELS + d[None, :]
    has_both = has_f[:, None] & has_d[None, :]
    if not WIDE:
        # Read once for all queries of the group.
        block = tl.load(entries, mask=has_both, other=0.0)
    total = tl.load(sums + at * FEATURES + f, mask=has_f, other=0.0)
    if FEATURE == "softmax":
        # What its features are to be divided by cancels, but for `least`, which it is the sum of so often.
        total += least
    if SHARE:
        part = tl.load(share + (sample * heads + head) * groups + number)
        if ODDS:
            part = tl.where(
                tl.abs(tl.load(odds + (sample * heads + head) * groups + number)) == float("inf"), 1.0, part
            )
    else:
        added = tl.load(bias + d, mask=has_d, other=0.0)[None, :]
    # Said of the loop: a launch's number of stages is for what products read, which outputs are not.
    for start in tl.range(0, slots, ROWS, num_stages=STAGES):
        slot = start + tl.arange(0, ROWS)
        if RUNS:
            token = number * slots + slot
            here = (slot < slots) & (token < length)
        else:
            token = tl.load(tokens + number * slots + slot, mask=slot < slots, other=-1)
            here = token >= 0
        wide = token.to(tl.int64)[:, None]
        x = tl.load(
            q + sample * q_batch + head * q_head + wide * q_token + f[None, :],
            mask=here[:, None] & has_f[None, :],
            other=0.0,
        )
        # All that is read is asked for before anything waits for it.
        rows = out + sample * out_batch + head * out_head + wide * out_token + d[None, :]
        mask = here[:, None] & has_d[None, :]
        soft = tl.load(rows, mask=mask, other=0.0).to(tl.float32)
        phi = raised(x, has_f, FEATURE)
        if WIDE:
            # Its parts of tf32 would fill the shared memory of small GPUs if they stayed there.
            block = tl.load(entries, mask=has_both, other=0.0)
        if HALF:
            found = tl.dot(phi.to(block.dtype), block)
        else:
            found = tl.dot(phi, block.to(tl.float32), input_precision=PRECISION)
        divisor = tl.sum(phi * total[None, :], 1)
        if FEATURE != "softmax":
            divisor += least
        found = found * (1.0 / divisor)[:, None]
        if SHARE:
            found += part * (soft - found)
        else:
            found += soft + added
        tl.store(rows, found.to(out.dtype.element_ty), mask=mask)
