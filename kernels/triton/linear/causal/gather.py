"""Causal linear attention, first half: what each chunk of positions leaves, and the decayed sums of that."""

# What a kernel takes and returns exists on the GPU only: Python types would say nothing.
# ruff: noqa: ANN001, ANN201

# The language of Triton kernels is not quite Python.
# pyright: reportArgumentType=false, reportGeneralTypeIssues=false
from __future__ import annotations

import triton
import triton.language as tl

from visattn.kernels.triton.linear.causal.parts import RUNTIME_SIZES, faded, placed
from visattn.kernels.triton.linear.parts import featured, inverse


@triton.jit(do_not_specialize=RUNTIME_SIZES)
def gather_chunks(
    k, v, key_mask, den, delta, peak, rates, states,
    k_batch, k_token, k_head, v_batch, v_token, v_head,
    heads, group, length, positions, each, inner, size, chunks, part, splits, blocks, feature_blocks,
    FEATURES: tl.constexpr, CHANNELS: tl.constexpr,
    BLOCK_F: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr, UNIT: tl.constexpr,
    FEATURE: tl.constexpr, DECAY: tl.constexpr, KEY_MASK: tl.constexpr, REVERSE: tl.constexpr,
    HALF: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Compute one block of the state that one part of a chunk leaves, decayed to the chunk's last position.

    With REVERSE it is the state's gradient that is gathered, of queries: decayed to the chunk's first position, and
    weighted as in `visattn.kernels.triton.linear.gather`.

    Args (but for strides, which are in units of UNIT elements, and compile-time sizes):
        k: Features' inputs [B, S, H / group, FEATURES].
        v: Values [B, S, H / group, CHANNELS].
        key_mask: uint8 [B, S], read if KEY_MASK.
        den: Denominators [B, H, S], read if REVERSE.
        delta: Row sums [B, H, S], read if REVERSE.
        peak: Largest feature of each token [B, H, S], read if REVERSE.
        rates: Exponents of the decay, float32 [H].
        states: Result, float32 [B, H, chunks, splits, FEATURES * CHANNELS + FEATURES]: states, then sums of features.
        heads: H.
        group: Heads that share keys.
        length: S.
        positions: Of the axis.
        each: Tokens of a position.
        inner: Tokens of a position that lie in a row.
        size: Positions of a chunk.
        chunks: Number of chunks.
        part: Tokens that a program adds up.
        splits: Parts of a chunk.
        blocks: Blocks of a state.
        feature_blocks: Blocks of BLOCK_F features.
    """
    split, rest = tl.program_id(0) % splits, tl.program_id(0) // splits
    block, rest = rest % blocks, rest // blocks
    chunk, pair = rest % chunks, (rest // chunks).to(tl.int64)
    sample, head = pair // heads, pair % heads
    f = (block % feature_blocks) * BLOCK_F + tl.arange(0, BLOCK_F)
    d = (block // feature_blocks) * BLOCK_D + tl.arange(0, BLOCK_D)
    has_f, has_d = f < FEATURES, d < CHANNELS
    k += (sample * k_batch + head // group * k_head) * UNIT
    v += (sample * v_batch + head // group * v_head) * UNIT
    rate = tl.load(rates + head)
    row_of = pair * length

    state = tl.zeros([BLOCK_F, BLOCK_D], tl.float32)
    total = tl.zeros([BLOCK_F], tl.float32)
    begin = chunk * size * each
    end = tl.minimum(tl.minimum(begin + size * each, begin + (split + 1) * part), length)
    for first in range(begin + split * part, end, ROWS):
        index = first + tl.arange(0, ROWS)
        position, token = placed(index, positions, each, inner)
        is_token = index < end
        wide = token.to(tl.int64)[:, None]
        x = tl.load(k + wide * (k_token * UNIT) + f[None, :], mask=is_token[:, None] & has_f[None, :], other=0.0)
        value = tl.load(v + wide * (v_token * UNIT) + d[None, :], mask=is_token[:, None] & has_d[None, :], other=0.0)
        counts = is_token
        if KEY_MASK:
            counts &= tl.load(key_mask + sample * length + token, mask=is_token, other=0) != 0
        phi = featured(x, counts[:, None] & has_f[None, :], FEATURE)
        at = position - chunk * size
        phi *= faded(tl.maximum(at if REVERSE else size - 1 - at, 0), rate, DECAY)[:, None]
        if REVERSE:
            scale = inverse(tl.load(den + row_of + token, mask=is_token, other=0.0))
            minus = tl.load(delta + row_of + token, mask=is_token, other=0.0) * scale
            phi *= inverse(tl.load(peak + row_of + token, mask=is_token, other=0.0))[:, None]
            total -= tl.sum(phi * minus[:, None], 0)
            state = tl.dot(tl.trans(phi), value.to(tl.float32) * scale[:, None], state, input_precision=PRECISION)
        elif HALF:
            # Rounded as the product takes it, so that state and sums are of the same weights.
            rounded = phi.to(value.dtype)
            total += tl.sum(rounded.to(tl.float32), 0)
            state = tl.dot(tl.trans(rounded), value, state)
        else:
            total += tl.sum(phi, 0)
            state = tl.dot(tl.trans(phi), value.to(tl.float32), state, input_precision=PRECISION)

    states += ((pair * chunks + chunk) * splits + split) * (FEATURES * CHANNELS + FEATURES)
    tl.store(states + f[:, None] * CHANNELS + d[None, :], state, mask=has_f[:, None] & has_d[None, :])
    if block // feature_blocks == 0:
        tl.store(states + FEATURES * CHANNELS + f, total, mask=has_f)


@triton.jit(do_not_specialize=("heads", "size", "chunks", "width", "blocks"))
def run_states(
    states, dense, rates, heads, size, chunks, width, blocks,
    BLOCK: tl.constexpr, DECAY: tl.constexpr, REVERSE: tl.constexpr, INCLUSIVE: tl.constexpr, DENSE: tl.constexpr,
):  # fmt: skip
    """Replace what chunks leave by what was left before each of them, or behind it if REVERSE.

    Args:
        states: float32 [B, H, chunks, width].
        dense: float32 [B, H, width]; if DENSE, added to all results without decay.
        rates: Exponents of the decay, float32 [H].
        heads: H.
        size: Positions of a chunk.
        chunks: Number of chunks.
        width: Numbers of a state.
        blocks: Blocks of a state.
        BLOCK: Numbers of a block.
        DECAY: Whether states fade.
        REVERSE: Whether what is left behind is summed.
        DENSE: Whether there are dense keys.
        INCLUSIVE: Whether a chunk, of one position then, reads what it leaves itself.
    """
    pair = (tl.program_id(0) // blocks).to(tl.int64)
    at = (tl.program_id(0) % blocks) * BLOCK + tl.arange(0, BLOCK)
    is_there = at < width
    factor = tl.exp(-tl.load(rates + pair % heads) * size) if DECAY else 1.0
    always = tl.zeros([BLOCK], tl.float32)
    if DENSE:
        always = tl.load(dense + pair * width + at, mask=is_there, other=0.0)
    carried = tl.zeros([BLOCK], tl.float32)
    for step in tl.range(0, chunks, num_stages=3):
        chunk = chunks - 1 - step if REVERSE else step
        where = states + (pair * chunks + chunk) * width + at
        own = tl.load(where, mask=is_there, other=0.0)
        if INCLUSIVE:
            carried = own + factor * carried
            tl.store(where, carried + always, mask=is_there)
        else:
            tl.store(where, carried + always, mask=is_there)
            carried = own + factor * carried
