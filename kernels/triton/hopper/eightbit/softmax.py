"""The online softmax of Hopper's kernel in 8 bits: largest logits, weights as bytes in registers, their sums.

A row's columns lie in four threads. Sums stay apart per thread, [rows, 4], until a row tile is done; only largest
logits are exchanged in each step.
"""

# What a kernel takes and returns exists on the GPU only: Python types would say nothing.
# ruff: noqa: ANN001, ANN201, ANN202

# The language of Triton kernels is not quite Python.
# pyright: reportArgumentType=false, reportGeneralTypeIssues=false, reportAttributeAccessIssue=false, reportCallIssue=false, reportIndexIssue=false, reportOptionalMemberAccess=false, reportAssignmentType=false, reportOperatorIssue=false
from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

# Weights of a step reach from 0 to 2 to this power: 127, and 256 where they are e4m3, which reaches 448.
INT8_TOP, FP8_TOP = gl.constexpr(6.988684686772166), gl.constexpr(8.0)
# How far below the largest logit so far, in powers of 2, that of a step may lie whose weights are relative to it.
FALL = gl.constexpr(64.0)
# Added to a float of up to 2^22 it leaves the nearest integer in the lowest bits.
ROUND = gl.constexpr(12582912.0)
ROUND_BITS = gl.constexpr(0x4B400000)
# The sum of a register's four bytes.
SUM = gl.constexpr("dp4a.s32.s32 $0, $1, 0x01010101, 0;")
# The least half, as a power of 2: smaller halves than 2^-14 count by it, so that their bits are an integer.
LEAST = gl.constexpr(-24.0)
# Four floats up to 127 * 2^LEAST that become one register of integers.
PACK = gl.constexpr(
    "{ .reg .b32 a, b; cvt.rn.f16x2.f32 a, $2, $1; cvt.rn.f16x2.f32 b, $4, $3; prmt.b32 $0, a, b, 0x6420; }"
)
# Four floats that become one register of e4m3.
PACK_FP8 = gl.constexpr(
    "{ .reg .b16 a, b; cvt.rn.satfinite.e4m3x2.f32 a, $2, $1; cvt.rn.satfinite.e4m3x2.f32 b, $4, $3; "
    "mov.b32 $0, {a, b}; }"
)


@gluon.constexpr_function
def product_layout(columns: int) -> gl.NVMMADistributedLayout:
    """Where four warps keep a product [64, columns] of bytes."""
    return gl.NVMMADistributedLayout([3, 0], [4, 1], [16, int(columns), 32])


@gluon.jit
def _peaks_of(x):
    """Scores [rows, columns] as [rows, 2 halves, 4 threads]: the largest of what a thread has of each half.

    They are positive or -inf: their bits as integers have the same order, and of those Hopper compares three at once.
    """
    rows: gl.constexpr = x.shape[0]
    eighths: gl.constexpr = x.shape[1] // 8
    bits = x.to(gl.int32, bitcast=True).reshape([rows, 2, eighths // 2, 4, 2]).permute([0, 1, 3, 2, 4])
    return gl.max(bits.reshape([rows, 2, 4, eighths]), 3).to(gl.float32, bitcast=True)


@gluon.jit
def _fours(x):
    """What becomes one register of bytes: columns 2c, 2c + 1, 2c + 8 and 2c + 9 of each 16 (see `quantise.woven`)."""
    rows: gl.constexpr = x.shape[0]
    columns: gl.constexpr = x.shape[1]
    x = x.reshape([rows, columns // 16, 2, 4, 2]).permute([0, 1, 3, 2, 4])
    even, odd = gl.split(x)
    first, third = gl.split(even)
    second, fourth = gl.split(odd)
    return first, second, third, fourth


@gluon.jit
def bytes_of(words, layout: gl.constexpr, FP8: gl.constexpr):
    """Weights as a product reads them, from registers of four."""
    small: gl.constexpr = gl.float8e4nv if FP8 else gl.int8
    rows: gl.constexpr = words.shape[0]
    columns: gl.constexpr = words.shape[1] * 16
    low = gl.join(words.to(gl.int8), (words >> 8).to(gl.int8))
    high = gl.join((words >> 16).to(gl.int8), (words >> 24).to(gl.int8))
    x = gl.join(low, high).permute([0, 1, 2, 4, 3]).reshape([rows, columns])
    return gl.convert_layout(x, layout, assert_trivial=True).to(small, bitcast=True)


@gluon.jit
def level_of(scores, k_scales, q_scale, level):
    """The level that weights of a step are relative to, with a scale for each half of the scores' columns.

    `level` is the largest logit of each row so far, base 2, and what the weights of the step before are relative to:
    the largest of their step, or what lies `FALL` below the largest so far.

    Returns:
        The level; by what what was added so far is to be multiplied.
    """
    peaks = _peaks_of(scores) - ROUND
    of_halves: gl.constexpr = gl.SliceLayout(2, peaks.type.layout)
    halves = gl.arange(0, 2, gl.SliceLayout(0, of_halves))
    k_scale = gl.where(halves == 0, k_scales[0], k_scales[1])[None, :]
    own = gl.max(gl.max(peaks * k_scale[:, :, None], 1), 1)
    own = gl.convert_layout(own, q_scale.type.layout) * q_scale
    top = gl.maximum(level[0], own)
    unit = gl.maximum(own, top - FALL)
    return (top, unit), gl.exp2(level[1] - _finite(unit))


@gluon.jit
def _finite(unit):
    """A row that has seen no key yet has -inf: 0 instead keeps exp2 free of nan."""
    return gl.where(unit == float("-inf"), 0.0, unit)


@gluon.jit
def logits_of(scores, k_scales, q_scale, unit, FP8: gl.constexpr):
    """Exponents, base 2, of the weights of a step relative to `unit`; integers are to count by 2^LEAST."""
    rows: gl.constexpr = scores.shape[0]
    columns: gl.constexpr = scores.shape[1]
    scores = scores.reshape([rows, 2, columns // 2])
    of_factor: gl.constexpr = gl.SliceLayout(2, scores.type.layout)
    of_rows: gl.constexpr = gl.SliceLayout(1, of_factor)
    halves = gl.arange(0, 2, gl.SliceLayout(0, of_factor))
    k_scale = gl.where(halves == 0, k_scales[0], k_scales[1])[None, :]
    factor = gl.convert_layout(q_scale, of_rows)[:, None] * k_scale
    base = _finite(unit) - (FP8_TOP if FP8 else INT8_TOP + LEAST)
    base = gl.convert_layout(base, of_rows)[:, None] + ROUND * factor
    scores = scores * factor[:, :, None] - base[:, :, None]
    return scores.reshape([rows, columns])


@gluon.jit
def weights_of(logits, FP8: gl.constexpr):
    """Weights in 8 bits, four a register, and their sums per row and thread."""
    p = gl.exp2(logits)
    if FP8:
        words = gl.inline_asm_elementwise(PACK_FP8, "=r,f,f,f,f", _fours(p), dtype=gl.int32, is_pure=True, pack=1)
        return words, gl.sum(gl.sum(p.reshape([p.shape[0], p.shape[1] // 8, 4, 2]), 3), 1)
    else:
        words = gl.inline_asm_elementwise(PACK, "=r,f,f,f,f", _fours(p), dtype=gl.int32, is_pure=True, pack=1)
        sums = gl.inline_asm_elementwise(SUM, "=r,r", [words], dtype=gl.int32, is_pure=True, pack=1)
        return words, gl.sum(sums, 1).to(gl.float32)


@gluon.jit
def no_sums(products):
    """Sums of no weights."""
    rows: gl.constexpr = products.shape[0]
    shape: gl.constexpr = products.reshape([rows, products.shape[1] // 8, 4, 2]).type.layout
    return gl.zeros([rows, 4], gl.float32, gl.SliceLayout(1, gl.SliceLayout(3, shape)))
