"""Causal linear attention, backward: gradients of what the features are made of, queries or keys."""

# What a kernel takes and returns exists on the GPU only: Python types would say nothing.
# ruff: noqa: ANN001, ANN201

# The language of Triton kernels is not quite Python.
# pyright: reportArgumentType=false, reportGeneralTypeIssues=false
from __future__ import annotations

import triton
import triton.language as tl

from visattn.kernels.triton.linear.causal.parts import RUNTIME_SIZES, faded, placed, related
from visattn.kernels.triton.linear.parts import featured, inverse, slope


@triton.jit(do_not_specialize=RUNTIME_SIZES)
def chunk_gradients(
    x, rows, others, values, states, dense, key_mask, den, delta, peak, rates, grad_x,
    x_batch, x_token, x_head, rows_batch, rows_token, rows_head,
    others_batch, others_token, others_head, values_batch, values_token, values_head,
    heads, x_group, group, length, positions, each, inner, size, chunks, tiles,
    FEATURES: tl.constexpr, CHANNELS: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_D: tl.constexpr,
    ROWS: tl.constexpr, UNIT: tl.constexpr, FEATURE: tl.constexpr, DECAY: tl.constexpr,
    KEY_MASK: tl.constexpr, REVERSE: tl.constexpr, PRODUCTS: tl.constexpr, DENSE: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Compute BLOCK_F features' gradients of ROWS tokens of one head.

    Of queries: phi'(q) (sum over keys so far of decay (g . v - delta) phi(k)) / den, with g the output's gradient and
    delta = rowsum(g * out). With REVERSE of keys: phi'(k) (sum over queries from there on of decay (g . v - delta)
    phi(q) / den). What is of other chunks is in the states.

    Args (but for strides, which are in units of UNIT elements, and compile-time sizes):
        x: What the features of the rows are made of, [B, S, H / x_group, FEATURES]: queries or keys.
        rows: g or v of the rows, [B, S, H / x_group, CHANNELS].
        others: v or g of the others, [B, S, H / group, CHANNELS].
        values: What the features of the others are made of, [B, S, H / group, FEATURES]: keys or queries.
        states: float32 [B, H, chunks, FEATURES * CHANNELS + FEATURES]: before each chunk, or gradients behind it.
        dense: float32 [B, H, FEATURES * CHANNELS + FEATURES], read without decay if DENSE.
        key_mask: uint8 [B, S]; if KEY_MASK, masked keys are left out and have no gradient.
        den: Denominators, float32 [B, H, S].
        delta: float32 [B, H, S].
        peak: What the queries' features were divided by, float32 [B, H, S].
        rates: Exponents of the decay, float32 [H].
        grad_x: Result [B, S, H, FEATURES], contiguous.
        tiles: Blocks of ROWS tokens of a chunk.

    The other sizes are those of `visattn.kernels.triton.linear.causal.gather`.
    """
    feature_blocks = tl.cdiv(FEATURES, BLOCK_F)
    block, rest = tl.program_id(0) % feature_blocks, tl.program_id(0) // feature_blocks
    tile, rest = rest % tiles, rest // tiles
    chunk, pair = rest % chunks, (rest // chunks).to(tl.int64)
    sample, head = pair // heads, pair % heads
    begin = chunk * size * each
    end = tl.minimum(begin + size * each, length)
    index = begin + tile * ROWS + tl.arange(0, ROWS)
    is_row = index < end
    position, token = placed(index, positions, each, inner)
    f = block * BLOCK_F + tl.arange(0, BLOCK_F)
    has_f = f < FEATURES
    rate = tl.load(rates + head)
    wide_row = token.to(tl.int64)[:, None]
    x += (sample * x_batch + head // x_group * x_head) * UNIT + wide_row * (x_token * UNIT)
    rows += (sample * rows_batch + head // x_group * rows_head) * UNIT + wide_row * (rows_token * UNIT)
    others += (sample * others_batch + head // group * others_head) * UNIT
    values += (sample * values_batch + head // group * values_head) * UNIT
    row_of = pair * length

    WIDTH: tl.constexpr = FEATURES * CHANNELS + FEATURES
    states += (pair * chunks + chunk) * WIDTH
    dense += pair * WIDTH
    reach = tl.full([ROWS], 1.0, tl.float32)
    if PRODUCTS:
        at = position - chunk * size
        reach = faded(tl.maximum(size - at if REVERSE else at + 1, 0), rate, DECAY)
    grad = tl.zeros([ROWS, BLOCK_F], tl.float32)
    for first in range(0, CHANNELS, BLOCK_D):
        d = first + tl.arange(0, BLOCK_D)
        has_d = d < CHANNELS
        row = tl.load(rows + d[None, :], mask=is_row[:, None] & has_d[None, :], other=0.0).to(tl.float32)
        cells, is_cell = f[:, None] * CHANNELS + d[None, :], has_f[:, None] & has_d[None, :]
        part = tl.load(states + cells, mask=is_cell, other=0.0)
        grad = tl.dot(row * reach[:, None], tl.trans(part), grad, input_precision=PRECISION)
        if DENSE:
            part = tl.load(dense + cells, mask=is_cell, other=0.0)
            grad = tl.dot(row, tl.trans(part), grad, input_precision=PRECISION)
    total = reach[:, None] * tl.load(states + FEATURES * CHANNELS + f, mask=has_f, other=0.0)[None, :]
    if DENSE:
        total += tl.load(dense + FEATURES * CHANNELS + f, mask=has_f, other=0.0)[None, :]
    minus = tl.load(delta + row_of + token, mask=is_row, other=0.0)
    grad += total if REVERSE else -minus[:, None] * total

    if PRODUCTS:
        # Tokens of one position see each other: whole positions, from the first or up to the last of the rows.
        near_end = tl.minimum(((begin + tile * ROWS + ROWS - 1) // each + 1) * each, end)
        far = (begin + tile * ROWS) // each * each
        for start in range(far if REVERSE else begin, end if REVERSE else near_end, ROWS):
            numbers = start + tl.arange(0, ROWS)
            is_other = numbers < end
            other, other_token = placed(numbers, positions, each, inner)
            wide = other_token.to(tl.int64)[:, None]
            product = tl.zeros([ROWS, ROWS], tl.float32)
            for first in range(0, CHANNELS, BLOCK_D):
                d = first + tl.arange(0, BLOCK_D)
                has_d = d < CHANNELS
                row = tl.load(rows + d[None, :], mask=is_row[:, None] & has_d[None, :], other=0.0).to(tl.float32)
                there = is_other[:, None] & has_d[None, :]
                y = tl.load(others + wide * (others_token * UNIT) + d[None, :], mask=there, other=0.0).to(tl.float32)
                product = tl.dot(row, tl.trans(y), product, input_precision=PRECISION)
            counts = is_other
            shrink = tl.full([ROWS], 1.0, tl.float32)
            if REVERSE:
                less = tl.load(delta + row_of + other_token, mask=is_other, other=0.0)
                scale = inverse(tl.load(den + row_of + other_token, mask=is_other, other=0.0))
                product = (product - less[None, :]) * scale[None, :]
                shrink = inverse(tl.load(peak + row_of + other_token, mask=is_other, other=0.0))
            else:
                product -= minus[:, None]
                if KEY_MASK:
                    counts &= tl.load(key_mask + sample * length + other_token, mask=is_other, other=0) != 0
            product *= related(position, other, rate, REVERSE, DECAY)
            there = counts[:, None] & has_f[None, :]
            phi = featured(
                tl.load(values + wide * (values_token * UNIT) + f[None, :], mask=there, other=0.0), there, FEATURE
            )
            grad = tl.dot(product, phi * shrink[:, None], grad, input_precision=PRECISION)

    here = is_row[:, None] & has_f[None, :]
    steep = slope(tl.load(x + f[None, :], mask=here, other=0.0), FEATURE)
    if not REVERSE:
        scale = inverse(tl.load(den + row_of + token, mask=is_row, other=0.0))
        grad *= scale[:, None]
        # Multiplied in this order a small slope and a large factor do not leave float32's range.
        steep *= inverse(tl.load(peak + row_of + token, mask=is_row, other=0.0))[:, None]
    elif KEY_MASK:
        kept = tl.load(key_mask + sample * length + token, mask=is_row, other=0) != 0
        grad = tl.where(kept[:, None], grad, 0.0)
    where = ((sample * length + token) * heads + head)[:, None] * FEATURES + f[None, :]
    tl.store(grad_x + where, (grad * steep).to(grad_x.dtype.element_ty), mask=here)
