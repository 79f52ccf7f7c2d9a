"""Causal linear attention, second half: rows of tokens read what was left before their chunk, and its other tokens."""

# What a kernel takes and returns exists on the GPU only: Python types would say nothing.
# ruff: noqa: ANN001, ANN201

# The language of Triton kernels is not quite Python.
# pyright: reportArgumentType=false, reportGeneralTypeIssues=false
from __future__ import annotations

import triton
import triton.language as tl

from visattn.kernels.triton.linear.causal.parts import RUNTIME_SIZES, faded, placed, related
from visattn.kernels.triton.linear.parts import featured, inverse


@triton.jit(do_not_specialize=RUNTIME_SIZES)
def read_chunks(
    q, k, v, states, dense, key_mask, den, peak, rates, out,
    q_batch, q_token, q_head, k_batch, k_token, k_head, v_batch, v_token, v_head,
    heads, q_group, group, length, positions, each, inner, size, chunks, tiles,
    FEATURES: tl.constexpr, CHANNELS: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_D: tl.constexpr,
    ROWS: tl.constexpr, UNIT: tl.constexpr, FEATURE: tl.constexpr, DECAY: tl.constexpr,
    KEY_MASK: tl.constexpr, REVERSE: tl.constexpr, PRODUCTS: tl.constexpr, DENSE: tl.constexpr,
    HALF: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Compute ROWS tokens of one head: outputs, or with REVERSE the gradients of values.

    Outputs are phi(q) times the state before the chunk and, if PRODUCTS, times the products of the chunk's keys and
    values so far, over the same of the sums. Gradients of values are the same of keys for q, queries for k and the
    output's gradient over the denominators for v, in reverse and not divided.

    Args (but for strides, which are in units of UNIT elements, and compile-time sizes):
        q: Features' inputs of the rows [B, S, H / q_group, FEATURES].
        k: Those of the others [B, S, H / group, FEATURES].
        v: Values of the others [B, S, H / group, CHANNELS].
        states: float32 [B, H, chunks, FEATURES * CHANNELS + FEATURES], before each chunk, or behind it.
        dense: float32 [B, H, FEATURES * CHANNELS + FEATURES], read without decay if DENSE.
        key_mask: uint8 [B, S]; if KEY_MASK, masked keys are left out, as rows they give zeros.
        den: Denominators, float32 [B, H, S]: a result, with REVERSE what the others' values are divided by.
        peak: Largest feature of each query, float32 [B, H, S], by which its features are divided: a result, or given.
        rates: Exponents of the decay, float32 [H].
        out: Result [B, S, H, CHANNELS], contiguous.
        tiles: Blocks of ROWS tokens of a chunk.

    The other sizes are those of `visattn.kernels.triton.linear.causal.gather`.
    """
    tile, rest = tl.program_id(0) % tiles, tl.program_id(0) // tiles
    chunk, pair = rest % chunks, (rest // chunks).to(tl.int64)
    sample, head = pair // heads, pair % heads
    begin = chunk * size * each
    end = tl.minimum(begin + size * each, length)
    index = begin + tile * ROWS + tl.arange(0, ROWS)
    is_row = index < end
    position, token = placed(index, positions, each, inner)
    d = tl.arange(0, BLOCK_D)
    has_d = d < CHANNELS
    rate = tl.load(rates + head)
    rows = q + (sample * q_batch + head // q_group * q_head) * UNIT + token.to(tl.int64)[:, None] * (q_token * UNIT)
    k += (sample * k_batch + head // group * k_head) * UNIT
    v += (sample * v_batch + head // group * v_head) * UNIT
    row_of = pair * length

    unpeak = tl.full([ROWS], 1.0, tl.float32)
    if not REVERSE:
        top = tl.zeros([ROWS], tl.float32)
        for first in range(0, FEATURES, BLOCK_F):
            f = first + tl.arange(0, BLOCK_F)
            here = is_row[:, None] & (f < FEATURES)[None, :]
            x = tl.load(rows + f[None, :], mask=here, other=0.0)
            top = tl.maximum(top, tl.max(featured(x, here, FEATURE), 1))
        tl.store(peak + row_of + token, top, mask=is_row)
        unpeak = inverse(top)

    acc = tl.zeros([ROWS, BLOCK_D], tl.float32)
    weight = tl.zeros([ROWS], tl.float32)
    reach = tl.full([ROWS], 1.0, tl.float32)
    if PRODUCTS:
        at = position - chunk * size
        reach = faded(tl.maximum(size - at if REVERSE else at + 1, 0), rate, DECAY)
    WIDTH: tl.constexpr = FEATURES * CHANNELS + FEATURES
    states += (pair * chunks + chunk) * WIDTH
    dense += pair * WIDTH
    for first in range(0, FEATURES, BLOCK_F):
        f = first + tl.arange(0, BLOCK_F)
        has_f = f < FEATURES
        here = is_row[:, None] & has_f[None, :]
        phi = featured(tl.load(rows + f[None, :], mask=here, other=0.0), here, FEATURE) * unpeak[:, None]
        cells, is_cell = f[:, None] * CHANNELS + d[None, :], has_f[:, None] & has_d[None, :]
        near = phi * reach[:, None]
        acc = tl.dot(near, tl.load(states + cells, mask=is_cell, other=0.0), acc, input_precision=PRECISION)
        weight += tl.sum(near * tl.load(states + FEATURES * CHANNELS + f, mask=has_f, other=0.0)[None, :], 1)
        if DENSE:
            acc = tl.dot(phi, tl.load(dense + cells, mask=is_cell, other=0.0), acc, input_precision=PRECISION)
            weight += tl.sum(phi * tl.load(dense + FEATURES * CHANNELS + f, mask=has_f, other=0.0)[None, :], 1)

    if PRODUCTS:
        # Tokens of one position see each other: whole positions, from the first or up to the last of the rows.
        near_end = tl.minimum(((begin + tile * ROWS + ROWS - 1) // each + 1) * each, end)
        far = (begin + tile * ROWS) // each * each
        for first in range(far if REVERSE else begin, end if REVERSE else near_end, ROWS):
            numbers = first + tl.arange(0, ROWS)
            is_other = numbers < end
            other, other_token = placed(numbers, positions, each, inner)
            wide = other_token.to(tl.int64)[:, None]
            counts = is_other
            if KEY_MASK and not REVERSE:
                counts &= tl.load(key_mask + sample * length + other_token, mask=is_other, other=0) != 0
            shrink = tl.full([ROWS], 1.0, tl.float32)
            if REVERSE:
                shrink = inverse(tl.load(peak + row_of + other_token, mask=is_other, other=0.0))
            product = tl.zeros([ROWS, ROWS], tl.float32)
            for start in range(0, FEATURES, BLOCK_F):
                f = start + tl.arange(0, BLOCK_F)
                here = is_row[:, None] & (f < FEATURES)[None, :]
                phi = featured(tl.load(rows + f[None, :], mask=here, other=0.0), here, FEATURE) * unpeak[:, None]
                here = counts[:, None] & (f < FEATURES)[None, :]
                x = tl.load(k + wide * (k_token * UNIT) + f[None, :], mask=here, other=0.0)
                others = featured(x, here, FEATURE) * shrink[:, None]
                if HALF:
                    product = tl.dot(phi.to(q.dtype.element_ty), tl.trans(others.to(q.dtype.element_ty)), product)
                else:
                    product = tl.dot(phi, tl.trans(others), product, input_precision=PRECISION)
            product *= related(position, other, rate, REVERSE, DECAY)
            value = tl.load(
                v + wide * (v_token * UNIT) + d[None, :], mask=is_other[:, None] & has_d[None, :], other=0.0
            )
            if REVERSE:
                product *= inverse(tl.load(den + row_of + other_token, mask=is_other, other=0.0))[None, :]
            if HALF:
                product = product.to(value.dtype).to(tl.float32)
                acc = tl.dot(product.to(value.dtype), value, acc)
            else:
                acc = tl.dot(product, value.to(tl.float32), acc, input_precision=PRECISION)
            weight += tl.sum(product, 1)

    if not REVERSE:
        acc *= inverse(weight)[:, None]
        tl.store(den + row_of + token, weight, mask=is_row)
    elif KEY_MASK:
        kept = tl.load(key_mask + sample * length + token, mask=is_row, other=0) != 0
        acc = tl.where(kept[:, None], acc, 0.0)
    where = ((sample * length + token) * heads + head)[:, None] * CHANNELS + d[None, :]
    tl.store(out + where, acc.to(out.dtype.element_ty), mask=is_row[:, None] & has_d[None, :])
