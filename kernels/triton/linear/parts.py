"""Pieces that the kernels of linear attention share: feature maps and their derivatives."""

# What a kernel takes and returns exists on the GPU only: Python types would say nothing.
# ruff: noqa: ANN001, ANN201

from __future__ import annotations

import triton
import triton.language as tl

# Sizes that differ from call to call: kernels are not compiled again for their values.
RUNTIME_SIZES = ("length", "chunk", "splits", "blocks", "feature_blocks")


@triton.jit
def rows_of(pid, length, ROWS: tl.constexpr):
    """(sample, head) pair and tokens of a program; all programs are in the first axis, the others have few."""
    blocks = tl.cdiv(length, ROWS)
    return (pid // blocks).to(tl.int64), (pid % blocks) * ROWS + tl.arange(0, ROWS)


@triton.jit
def featured(x, here, FEATURE: tl.constexpr):
    """phi(x) in float32, 0 where there is no value: elu(x) + 1, relu(x), or x as it is ("given")."""
    x = x.to(tl.float32)
    if FEATURE == "elu":
        # The exponential is of min(x, 0), so that the branch not taken cannot overflow.
        x = tl.where(x > 0.0, x + 1.0, tl.exp(tl.minimum(x, 0.0)))
    elif FEATURE == "relu":
        x = tl.maximum(x, 0.0)
    return tl.where(here, x, 0.0)


@triton.jit
def slope(x, FEATURE: tl.constexpr):
    """Derivative of phi at x in float32; that of relu at 0 is 0, that of elu + 1 is 1."""
    x = x.to(tl.float32)
    if FEATURE == "elu":
        x = tl.exp(tl.minimum(x, 0.0))
    elif FEATURE == "relu":
        x = tl.where(x > 0.0, 1.0, 0.0)
    else:
        x = tl.full(x.shape, 1.0, tl.float32)
    return x


@triton.jit
def inverse(x):
    """1 / x, or 1 where x is 0: a query without weight on any key gives zeros."""
    return 1.0 / tl.where(x == 0.0, 1.0, x)
