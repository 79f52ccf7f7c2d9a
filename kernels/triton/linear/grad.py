"""Linear attention, backward: gradients of what the features are made of, queries or keys."""

# What a kernel takes and returns exists on the GPU only: Python types would say nothing.
# ruff: noqa: ANN001, ANN201

# The language of Triton kernels is not quite Python.
# pyright: reportArgumentType=false, reportGeneralTypeIssues=false
from __future__ import annotations

import triton
import triton.language as tl

from visattn.kernels.triton.linear.parts import inverse, rows_of, slope


@triton.jit(do_not_specialize=["length"])
def feature_gradients(
    x, rows, state, sums, key_mask, den, delta, peak, grad_x,
    x_batch, x_token, x_head, rows_batch, rows_token, rows_head, heads, group, length,
    FEATURES: tl.constexpr, CHANNELS: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_D: tl.constexpr,
    ROWS: tl.constexpr, UNIT: tl.constexpr,
    FEATURE: tl.constexpr, KEY_MASK: tl.constexpr, QUERIES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Compute BLOCK_F features' gradients of ROWS tokens of one head.

    Of queries: phi'(q) (state g - sums delta) / den, with g the output's gradient and delta = rowsum(g * out).
    Of keys: phi'(k) (grad_state v + grad_sums).

    Args (but for strides, which are in units of UNIT elements, and compile-time sizes):
        x: What the features are made of, [B, S, H, FEATURES]: queries or keys.
        rows: g or v, [B, S, H, CHANNELS].
        state: float32 [B, H / group, FEATURES, CHANNELS]: the state, or its gradient.
        sums: float32 [B, H / group, FEATURES]: likewise.
        key_mask: uint8 [B, S]; if KEY_MASK, masked tokens have no gradient.
        den: Denominators, float32 [B, H, S], read if QUERIES.
        delta: float32 [B, H, S], read if QUERIES.
        peak: What the queries' features were divided by, float32 [B, H, S], read if QUERIES.
        grad_x: Result [B, S, H, FEATURES], contiguous.
        heads: H.
        group: Heads that share a state.
        length: S.
    """
    blocks = tl.cdiv(FEATURES, BLOCK_F)
    pair, token = rows_of(tl.program_id(0) // blocks, length, ROWS)
    sample, head = pair // heads, pair % heads
    is_token = token < length
    f = (tl.program_id(0) % blocks) * BLOCK_F + tl.arange(0, BLOCK_F)
    has_f = f < FEATURES
    wide = token.to(tl.int64)[:, None]
    x += (sample * x_batch + head * x_head) * UNIT
    rows += (sample * rows_batch + head * rows_head) * UNIT
    shared = sample * (heads // group) + head // group
    state += shared * FEATURES * CHANNELS

    grad = tl.zeros([ROWS, BLOCK_F], tl.float32)
    for first in range(0, CHANNELS, BLOCK_D):
        d = first + tl.arange(0, BLOCK_D)
        has_d = d < CHANNELS
        here = is_token[:, None] & has_d[None, :]
        row = tl.load(rows + wide * (rows_token * UNIT) + d[None, :], mask=here, other=0.0).to(tl.float32)
        part = tl.load(state + f[:, None] * CHANNELS + d[None, :], mask=has_f[:, None] & has_d[None, :], other=0.0)
        grad = tl.dot(row, tl.trans(part), grad, input_precision=PRECISION)
    total = tl.load(sums + shared * FEATURES + f, mask=has_f, other=0.0)
    if QUERIES:
        minus = tl.load(delta + pair * length + token, mask=is_token, other=0.0)
        scale = inverse(tl.load(den + pair * length + token, mask=is_token, other=0.0))
        unpeak = inverse(tl.load(peak + pair * length + token, mask=is_token, other=0.0))
        grad = (grad - minus[:, None] * total[None, :]) * scale[:, None]
    else:
        grad += total[None, :]
    here = is_token[:, None] & has_f[None, :]
    steep = slope(tl.load(x + wide * (x_token * UNIT) + f[None, :], mask=here, other=0.0), FEATURE)
    # Multiplied in this order a small slope and a large factor do not leave float32's range.
    grad *= steep * unpeak[:, None] if QUERIES else steep
    if KEY_MASK:
        kept = tl.load(key_mask + sample * length + token, mask=is_token, other=0) != 0
        grad = tl.where(kept[:, None], grad, 0.0)
    where = grad_x + ((sample * length + token) * heads + head)[:, None] * FEATURES + f[None, :]
    tl.store(where, grad.to(grad_x.dtype.element_ty), mask=here)
