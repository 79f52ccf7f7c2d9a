"""Pieces that the causal kernels share: where tokens lie, and how weights fade."""

# What a kernel takes and returns exists on the GPU only: Python types would say nothing.
# ruff: noqa: ANN001, ANN201

from __future__ import annotations

import triton
import triton.language as tl

# Sizes that differ from call to call: kernels are not compiled again for their values.
RUNTIME_SIZES = (
    "length", "positions", "each", "inner", "size", "chunks", "part", "splits", "blocks", "feature_blocks", "tiles",
)  # fmt: skip


@triton.jit
def placed(index, positions, each, inner):
    """Position and token of numbers that count position by position; `each` tokens of one, runs of `inner` together."""
    position, rest = index // each, index % each
    return position, (rest // inner * positions + position) * inner + rest % inner


@triton.jit
def faded(steps, rate, DECAY: tl.constexpr):
    """What weights are multiplied by over some steps, at least 0."""
    steps = steps.to(tl.float32)
    return tl.exp(-rate * steps) if DECAY else tl.full(steps.shape, 1.0, tl.float32)


@triton.jit
def related(row, other, rate, REVERSE: tl.constexpr, DECAY: tl.constexpr):
    """What the product of tokens at these positions counts; queries are rows, or keys if REVERSE."""
    steps = other[None, :] - row[:, None] if REVERSE else row[:, None] - other[None, :]
    return tl.where(steps >= 0, faded(tl.maximum(steps, 0), rate, DECAY), 0.0)
