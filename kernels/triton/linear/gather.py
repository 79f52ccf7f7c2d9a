"""Linear attention, first half: sums over tokens of phi(k) v^T and of phi(k), split over the tokens."""

# What a kernel takes and returns exists on the GPU only: Python types would say nothing.
# ruff: noqa: ANN001, ANN201

# The language of Triton kernels is not quite Python.
# pyright: reportArgumentType=false, reportGeneralTypeIssues=false
from __future__ import annotations

import triton
import triton.language as tl

from visattn.kernels.triton.linear.parts import RUNTIME_SIZES, featured, inverse


@triton.jit(do_not_specialize=RUNTIME_SIZES)
def gather(
    k, v, key_mask, den, delta, peak, states, sums,
    k_batch, k_token, k_head, v_batch, v_token, v_head,
    heads, length, chunk, splits, blocks, feature_blocks,
    FEATURES: tl.constexpr, CHANNELS: tl.constexpr,
    BLOCK_F: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr, UNIT: tl.constexpr,
    FEATURE: tl.constexpr, KEY_MASK: tl.constexpr, WEIGHTED: tl.constexpr, HALF: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Compute one block of the state of one split, sample and head.

    Every program adds up its own chunk of tokens and stores it: the splits are summed afterwards in a fixed order.

    Args (but for strides, which are in units of UNIT elements, and compile-time sizes):
        k: Features' inputs [B, S, H, FEATURES].
        v: Values [B, S, H, CHANNELS].
        key_mask: uint8 [B, S], read if KEY_MASK.
        den: Denominators [B, H, S]; if WEIGHTED, v is divided by them.
        delta: Row sums [B, H, S]; if WEIGHTED, phi(k) counts -delta / den times in the sums.
        peak: Largest feature of each token [B, H, S]; if WEIGHTED, phi(k) is divided by it.
        states: Result, float32 [B, H, splits, FEATURES, CHANNELS].
        sums: Result, float32 [B, H, splits, FEATURES].
        heads: H.
        length: S.
        chunk: Tokens of a split.
        splits: Number of splits.
        blocks: Blocks of a state.
        feature_blocks: Blocks of BLOCK_F features.
        HALF: Whether weights are rounded to the inputs' dtype and multiplied in it: bfloat16, of float32's range.
    """
    split, rest = tl.program_id(0) % splits, tl.program_id(0) // splits
    block, pair = rest % blocks, (rest // blocks).to(tl.int64)
    sample, head = pair // heads, pair % heads
    f = (block % feature_blocks) * BLOCK_F + tl.arange(0, BLOCK_F)
    d = (block // feature_blocks) * BLOCK_D + tl.arange(0, BLOCK_D)
    has_f, has_d = f < FEATURES, d < CHANNELS
    k += (sample * k_batch + head * k_head) * UNIT
    v += (sample * v_batch + head * v_head) * UNIT
    row_of = pair * length

    state = tl.zeros([BLOCK_F, BLOCK_D], tl.float32)
    total = tl.zeros([BLOCK_F], tl.float32)
    start = split * chunk
    for first in range(start, tl.minimum(start + chunk, length), ROWS):
        token = first + tl.arange(0, ROWS)
        is_token = token < tl.minimum(start + chunk, length)
        wide = token.to(tl.int64)[:, None]
        x = tl.load(k + wide * (k_token * UNIT) + f[None, :], mask=is_token[:, None] & has_f[None, :], other=0.0)
        value = tl.load(v + wide * (v_token * UNIT) + d[None, :], mask=is_token[:, None] & has_d[None, :], other=0.0)
        counts = is_token
        if KEY_MASK:
            counts &= tl.load(key_mask + sample * length + token, mask=is_token, other=0) != 0
        phi = featured(x, counts[:, None] & has_f[None, :], FEATURE)
        if HALF:
            # Rounded as the product takes it, so that state and sums are of the same weights.
            phi = phi.to(x.dtype)
        if WEIGHTED:
            scale = inverse(tl.load(den + row_of + token, mask=is_token, other=0.0))
            minus = tl.load(delta + row_of + token, mask=is_token, other=0.0) * scale
            phi = phi.to(tl.float32) * inverse(tl.load(peak + row_of + token, mask=is_token, other=0.0))[:, None]
            total -= tl.sum(phi * minus[:, None], 0)
            state = tl.dot(tl.trans(phi), value.to(tl.float32) * scale[:, None], state, input_precision=PRECISION)
        else:
            total += tl.sum(phi.to(tl.float32), 0)
            if HALF:
                state = tl.dot(tl.trans(phi), value, state)
            else:
                state = tl.dot(tl.trans(phi), value.to(tl.float32), state, input_precision=PRECISION)

    part = pair * splits + split
    where = states + (part * FEATURES + f[:, None]) * CHANNELS + d[None, :]
    tl.store(where, state, mask=has_f[:, None] & has_d[None, :])
    if block // feature_blocks == 0:
        tl.store(sums + part * FEATURES + f, total, mask=has_f)
