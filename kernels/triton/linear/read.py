"""Linear attention, second half: every query reads the state, phi(q) state / (phi(q) sums)."""

# What a kernel takes and returns exists on the GPU only: Python types would say nothing.
# ruff: noqa: ANN001, ANN201

# The language of Triton kernels is not quite Python.
# pyright: reportArgumentType=false, reportGeneralTypeIssues=false
from __future__ import annotations

import triton
import triton.language as tl

from visattn.kernels.triton.linear.parts import featured, inverse, rows_of


@triton.jit(do_not_specialize=["length"])
def read(
    q, state, sums, key_mask, out, den, peak,
    q_batch, q_token, q_head, heads, group, length,
    FEATURES: tl.constexpr, CHANNELS: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_D: tl.constexpr,
    ROWS: tl.constexpr, UNIT: tl.constexpr,
    FEATURE: tl.constexpr, KEY_MASK: tl.constexpr, NORMALISE: tl.constexpr,
    HALF: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Compute ROWS tokens of one head: phi(q) state, divided by phi(q) sums if NORMALISE.

    Without the division it is the gradient of the values, with k for q and the state's gradient for the state.

    Args (but for strides, which are in units of UNIT elements, and compile-time sizes):
        q: Features' inputs [B, S, H, FEATURES].
        state: float32 [B, H / group, FEATURES, CHANNELS].
        sums: float32 [B, H / group, FEATURES].
        key_mask: uint8 [B, S]; if KEY_MASK, masked tokens give zeros.
        out: Result [B, S, H, CHANNELS], contiguous.
        den: Result if NORMALISE: the denominators, float32 [B, H, S].
        peak: Result if NORMALISE: each token's largest feature, float32 [B, H, S]. Features are divided by it, which
            changes no result and keeps products of small features in float32's range.
        heads: H.
        group: Heads that share a state.
        length: S.
    """
    pair, token = rows_of(tl.program_id(0), length, ROWS)
    sample, head = pair // heads, pair % heads
    is_token = token < length
    d = tl.arange(0, BLOCK_D)
    has_d = d < CHANNELS
    rows = q + (sample * q_batch + head * q_head) * UNIT + token.to(tl.int64)[:, None] * (q_token * UNIT)
    shared = sample * (heads // group) + head // group
    state += shared * FEATURES * CHANNELS
    sums += shared * FEATURES

    top = tl.zeros([ROWS], tl.float32)
    if NORMALISE:
        for first in range(0, FEATURES, BLOCK_F):
            f = first + tl.arange(0, BLOCK_F)
            here = is_token[:, None] & (f < FEATURES)[None, :]
            x = tl.load(rows + f[None, :], mask=here, other=0.0)
            top = tl.maximum(top, tl.max(featured(x, here, FEATURE), 1))
        tl.store(peak + pair * length + token, top, mask=is_token)
    unpeak = inverse(top)

    acc = tl.zeros([ROWS, BLOCK_D], tl.float32)
    weight = tl.zeros([ROWS], tl.float32)
    for first in range(0, FEATURES, BLOCK_F):
        f = first + tl.arange(0, BLOCK_F)
        has_f = f < FEATURES
        here = is_token[:, None] & has_f[None, :]
        x = tl.load(rows + f[None, :], mask=here, other=0.0)
        phi = featured(x, here, FEATURE)
        if HALF:
            phi = phi.to(x.dtype).to(tl.float32)
        phi *= unpeak[:, None]
        # float32 also beside half precision inputs: sums over many tokens leave the range of float16.
        part = tl.load(state + f[:, None] * CHANNELS + d[None, :], mask=has_f[:, None] & has_d[None, :], other=0.0)
        acc = tl.dot(phi, part, acc, input_precision=PRECISION)
        if NORMALISE:
            weight += tl.sum(phi * tl.load(sums + f, mask=has_f, other=0.0)[None, :], 1)
    if NORMALISE:
        acc *= inverse(weight)[:, None]
        tl.store(den + pair * length + token, weight, mask=is_token)
    if KEY_MASK:
        kept = tl.load(key_mask + sample * length + token, mask=is_token, other=0) != 0
        acc = tl.where(kept[:, None], acc, 0.0)
    row = ((sample * length + token) * heads + head)[:, None] * CHANNELS + d[None, :]
    tl.store(out + row, acc.to(out.dtype.element_ty), mask=is_token[:, None] & has_d[None, :])
