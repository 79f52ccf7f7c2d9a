"""Kernels that turn q, k and v into 8 bits, in the order in which the tiles of a plan are read.

Softmax does not change when all keys of a row are shifted alike, and a shift of the values shifts the output: so keys
lose their mean per head and channel, values the middle of their range, which makes the most of integers, or their mean
where they become floats of 8 bits, whose errors grow with what they are. Queries then have a scale each, keys one per
tile, values one per channel. Tiles lie one behind the other, values with channels as rows, as products of bytes want
them.
"""

# What a kernel takes and returns exists on the GPU only: Python types would say nothing.
# ruff: noqa: ANN001, ANN201

# The language of Triton kernels is not quite Python.
# pyright: reportArgumentType=false, reportGeneralTypeIssues=false, reportOperatorIssue=false
from __future__ import annotations

import triton
import triton.language as tl

# Sizes that differ from call to call: kernels are not compiled again for their values.
SIZES = ("heads", "group", "length", "chunk", "chunks", "tiles", "row_tiles", "block", "every")
# Rounds a float of up to 2^22 to the nearest integer when added and taken away again.
ROUND = tl.constexpr(12582912.0)
# The largest number of each kind.
INT8_MAX = tl.constexpr(127.0)
FP8_MAX = tl.constexpr(448.0)
# Loads of the statistics that are under way together.
AT_ONCE = tl.constexpr(4)


@triton.jit(do_not_specialize=SIZES)
def column_statistics(
    k, v, found, k_batch, k_token, k_head, v_batch, v_token, v_head, heads, length, chunk, chunks, block, every,
    HEAD_DIM: tl.constexpr, BLOCK_DIM: tl.constexpr, ROWS: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    """Sums of some keys and of all values, and the least and the largest value, of a run of tokens.

    They go to `found` [pairs, chunks, 4, dim].

    Args:
        k: Keys [B, N, H, D], as v; strides are in units of UNIT elements.
        v: Values.
        found: float32.
        k_batch: Stride.
        k_token: Stride.
        k_head: Stride.
        v_batch: Stride.
        v_token: Stride.
        v_head: Stride.
        heads: Of k and v.
        length: Tokens.
        chunk: Tokens of a program, a multiple of `block * every`.
        chunks: Programs of a (sample, head) pair.
        block: A multiple of AT_ONCE * ROWS.
        every: Keys of one block of `block` tokens in so many are added up: any shift of all keys leaves softmax as it
            is, and the mean of some is near that of all.
        HEAD_DIM: Channels per head.
        BLOCK_DIM: The next power of two.
        ROWS: Tokens of a load.
        UNIT: Of strides.
    """
    part, pair = tl.program_id(0), tl.program_id(1)
    sample, head = (pair // heads).to(tl.int64), (pair % heads).to(tl.int64)
    rows, d = tl.arange(0, ROWS), tl.arange(0, BLOCK_DIM)
    has_d = d < HEAD_DIM
    k += (sample * k_batch + head * k_head) * UNIT + d[None, :]
    v += (sample * v_batch + head * v_head) * UNIT + d[None, :]
    # Kept apart by row until the end: a maximum over rows in each step would be one over threads.
    total = tl.zeros([ROWS, BLOCK_DIM], tl.float32)
    values = tl.zeros([ROWS, BLOCK_DIM], tl.float32)
    least = tl.full([ROWS, BLOCK_DIM], float("inf"), tl.float32)
    most = tl.full([ROWS, BLOCK_DIM], float("-inf"), tl.float32)
    begin = part * chunk
    end = tl.minimum(begin + chunk, length)
    # Several loads at a time, whose latency is the time that this takes.
    for first in range(begin, end, AT_ONCE * ROWS):
        for i in tl.static_range(AT_ONCE):
            token = first + i * ROWS + rows
            inside = (token < end)[:, None] & has_d[None, :]
            value = tl.load(v + token.to(tl.int64)[:, None] * (v_token * UNIT), mask=inside, other=0.0).to(tl.float32)
            values += value
            least = tl.minimum(least, tl.where(inside, value, float("inf")))
            most = tl.maximum(most, tl.where(inside, value, float("-inf")))
    for first in range(begin, end, block * every):
        for row in range(first, tl.minimum(first + block, end), AT_ONCE * ROWS):
            for i in tl.static_range(AT_ONCE):
                token = row + i * ROWS + rows
                inside = (token < end)[:, None] & has_d[None, :]
                at = k + token.to(tl.int64)[:, None] * (k_token * UNIT)
                total += tl.load(at, mask=inside, other=0.0).to(tl.float32)
    total, values, least, most = tl.sum(total, 0), tl.sum(values, 0), tl.min(least, 0), tl.max(most, 0)
    to = found + ((pair * chunks + part) * 4).to(tl.int64) * BLOCK_DIM + d
    tl.store(to, total)
    tl.store(to + BLOCK_DIM, least)
    tl.store(to + 2 * BLOCK_DIM, most)
    tl.store(to + 3 * BLOCK_DIM, values)


@triton.jit(do_not_specialize=SIZES)
def column_scales(
    found, k_shift, v_shift, v_scale, summed, length, chunks,
    HEAD_DIM: tl.constexpr, BLOCK_DIM: tl.constexpr, PARTS: tl.constexpr, FP8: tl.constexpr,
):  # fmt: skip
    """What keys and values are shifted by, and the scale of the values, of one pair, from `column_statistics`.

    Args:
        found: See there.
        k_shift: Mean of the keys: float32 [pairs, BLOCK_DIM], as the two behind it.
        v_shift: Middle of the values' range, or their mean where FP8.
        v_scale: What their numbers of 8 bits are to be multiplied by.
        summed: Keys that were added up.
        length: Tokens.
        chunks: See there.
        HEAD_DIM: Channels per head.
        BLOCK_DIM: The next power of two.
        PARTS: Chunks that are read at once.
        FP8: Whether values become floats of 8 bits.
    """
    pair, d = tl.program_id(0), tl.arange(0, BLOCK_DIM)
    parts = tl.arange(0, PARTS)
    own = found + (pair * chunks * 4).to(tl.int64) * BLOCK_DIM + d[None, :]
    total = tl.zeros([PARTS, BLOCK_DIM], tl.float32)
    values = tl.zeros([PARTS, BLOCK_DIM], tl.float32)
    least = tl.full([PARTS, BLOCK_DIM], float("inf"), tl.float32)
    most = tl.full([PARTS, BLOCK_DIM], float("-inf"), tl.float32)
    for i in range(0, chunks, PARTS):
        at = own + (i + parts)[:, None] * (4 * BLOCK_DIM)
        there = (i + parts < chunks)[:, None]
        total += tl.load(at, mask=there, other=0.0)
        least = tl.minimum(least, tl.load(at + BLOCK_DIM, mask=there, other=float("inf")))
        most = tl.maximum(most, tl.load(at + 2 * BLOCK_DIM, mask=there, other=float("-inf")))
        values += tl.load(at + 3 * BLOCK_DIM, mask=there, other=0.0)
    total, values, least, most = tl.sum(total, 0), tl.sum(values, 0), tl.min(least, 0), tl.max(most, 0)
    has = d < HEAD_DIM
    middle = tl.where(has, values / length if FP8 else 0.5 * (least + most), 0.0)
    half = tl.where(has, tl.maximum(most - middle, middle - least), 0.0)
    to = pair * BLOCK_DIM + d
    tl.store(k_shift + to, tl.where(has, total / summed, 0.0))
    tl.store(v_shift + to, middle)
    tl.store(v_scale + to, tl.where(half > 0.0, half, 1.0) / (FP8_MAX if FP8 else INT8_MAX))


@triton.jit
def rounded(x):
    """The nearest integers (ties to even) of floats up to 2^22, as int8."""
    return ((x + ROUND) - ROUND).to(tl.int8)


@triton.jit
def bytes_of(x):
    """Rows [rows, dim] as int8 with one scale for all, and that scale."""
    most = tl.max(tl.max(tl.abs(x), 1), 0)
    scale = tl.where(most > 0.0, most, 1.0) / INT8_MAX
    return rounded(x / scale), scale


@triton.jit(do_not_specialize=SIZES)
def quantise_columns(
    k, v, tokens, k_shift, v_shift, v_scale, k8, v8, k_scale,
    k_batch, k_token, k_head, v_batch, v_token, v_head, heads, tiles,
    HEAD_DIM: tl.constexpr, BLOCK_DIM: tl.constexpr, SLOTS: tl.constexpr, UNIT: tl.constexpr, FP8: tl.constexpr,
    WOVEN: tl.constexpr,
):  # fmt: skip
    """Keys and values of one column tile in 8 bits; empty slots are zeros.

    Args:
        k: Keys [B, N, H, D], as v; strides are in units of UNIT elements.
        v: Values.
        tokens: Token of each slot, -1 if empty: int32 [tiles, SLOTS].
        k_shift: See `column_scales`, as the two behind it.
        v_shift: Likewise.
        v_scale: Likewise.
        k8: int8 [pairs, tiles, SLOTS, BLOCK_DIM].
        v8: int8, or floats of 8 bits: [pairs, tiles, BLOCK_DIM, SLOTS].
        k_scale: float32 [pairs, tiles].
        k_batch: Stride.
        k_token: Stride.
        k_head: Stride.
        v_batch: Stride.
        v_token: Stride.
        v_head: Stride.
        heads: Of k and v.
        tiles: Column tiles.
        HEAD_DIM: Channels per head.
        BLOCK_DIM: The next power of two.
        SLOTS: Of a column tile.
        UNIT: Of strides.
        FP8: Whether values become floats of 8 bits.
        WOVEN: Whether the slots of the values are in the order of `woven`.
    """
    tile, pair = tl.program_id(0), tl.program_id(1)
    sample, head = (pair // heads).to(tl.int64), (pair % heads).to(tl.int64)
    slots, d = tl.arange(0, SLOTS), tl.arange(0, BLOCK_DIM)
    has_d = d < HEAD_DIM
    token = tl.load(tokens + tile * SLOTS + slots)
    here = (token >= 0)[:, None] & has_d[None, :]
    rows = (sample * k_batch + head * k_head + token.to(tl.int64) * k_token) * UNIT
    key = tl.load(k + rows[:, None] + d[None, :], mask=here, other=0.0).to(tl.float32)
    key = tl.where(here, key - tl.load(k_shift + pair * BLOCK_DIM + d)[None, :], 0.0)
    key, scale = bytes_of(key)
    number = (pair * tiles + tile).to(tl.int64)
    to = number * (SLOTS * BLOCK_DIM)
    tl.store(k8 + to + slots[:, None] * BLOCK_DIM + d[None, :], key)
    tl.store(k_scale + number, scale)

    order = woven(slots) if WOVEN else slots
    token = tl.load(tokens + tile * SLOTS + order)
    here = (token >= 0)[:, None] & has_d[None, :]
    rows = (sample * v_batch + head * v_head + token.to(tl.int64) * v_token) * UNIT
    value = tl.load(v + rows[:, None] + d[None, :], mask=here, other=0.0).to(tl.float32)
    shift, step = tl.load(v_shift + pair * BLOCK_DIM + d), tl.load(v_scale + pair * BLOCK_DIM + d)
    value = tl.where(here, (value - shift[None, :]) / step[None, :], 0.0)
    small = value.to(tl.float8e4nv) if FP8 else rounded(value)
    tl.store(v8 + to + d[:, None] * SLOTS + slots[None, :], tl.trans(small))


@triton.jit
def woven(place):
    """The slot whose value is at a place, so that Hopper's weights need not move between two products.

    A thread has columns 2c, 2c + 1, 2c + 8 and 2c + 9 of a product's 16, and reads 4c to 4c + 3 of the next one's.
    """
    return (place & ~15) | ((place & 2) << 2) | ((place & 12) >> 1) | (place & 1)


@triton.jit(do_not_specialize=SIZES)
def quantise_rows(
    q, tokens, k_shift, q8, q_scale, q_offset, q_batch, q_token, q_head, scale, heads, group, row_tiles,
    HEAD_DIM: tl.constexpr, BLOCK_DIM: tl.constexpr, ROWS: tl.constexpr, UNIT: tl.constexpr, LSE: tl.constexpr,
):  # fmt: skip
    """Queries of one row tile as int8 with a scale each; empty slots are zeros.

    Args:
        q: Queries [B, S, H, D]; strides are in units of UNIT elements.
        tokens: Token of each slot, -1 if empty: int32 [row tiles, ROWS].
        k_shift: See `column_scales`.
        q8: int8 [pairs, row tiles, ROWS, BLOCK_DIM].
        q_scale: What scores are to be multiplied by for logits of base 2: float32 [pairs, row tiles, ROWS].
        q_offset: What the shift of the keys took from all logits of a query: likewise, where LSE.
        q_batch: Stride.
        q_token: Stride.
        q_head: Stride.
        scale: Factor on the logits, of base 2.
        heads: Of q.
        group: Heads of q that share one of the keys.
        row_tiles: Row tiles.
        HEAD_DIM: Channels per head.
        BLOCK_DIM: The next power of two.
        ROWS: Slots of a row tile.
        UNIT: Of strides.
        LSE: Whether the log-sum-exp is wanted.
    """
    tile, pair = tl.program_id(0), tl.program_id(1)
    sample, head = (pair // heads).to(tl.int64), (pair % heads).to(tl.int64)
    slots, d = tl.arange(0, ROWS), tl.arange(0, BLOCK_DIM)
    token = tl.load(tokens + tile * ROWS + slots)
    here = (token >= 0)[:, None] & (d < HEAD_DIM)[None, :]
    rows = (sample * q_batch + head * q_head + token.to(tl.int64) * q_token) * UNIT
    query = tl.load(q + rows[:, None] + d[None, :], mask=here, other=0.0).to(tl.float32)
    most = tl.max(tl.abs(query), 1)
    step = tl.where(most > 0.0, most, 1.0) / INT8_MAX
    to = (pair * row_tiles + tile).to(tl.int64) * ROWS + slots
    tl.store(q8 + to[:, None] * BLOCK_DIM + d[None, :], rounded(query / step[:, None]))
    tl.store(q_scale + to, step * scale)
    if LSE:
        # Query heads of a sample are a multiple of key heads.
        shift = tl.load(k_shift + (pair // group) * BLOCK_DIM + d)
        tl.store(q_offset + to, tl.sum(query * shift[None, :], 1) * scale)
