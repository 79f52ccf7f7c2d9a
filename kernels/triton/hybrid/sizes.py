"""Sizes of programs that second branches have in common."""

from __future__ import annotations

from typing import Any

import torch

from visattn.kernels.triton.hybrid.given import narrow
from visattn.kernels.triton.linear.attention import power

# Tokens of a step.
ROWS = 64


def half(dtype: torch.dtype) -> bool:
    """Whether states are products of half precision factors."""
    return narrow(dtype) != torch.float32


def precision(dtype: torch.dtype) -> str:
    """Of float32 products, as in linear attention."""
    return "tf32" if torch.backends.cuda.matmul.allow_tf32 or dtype != torch.float32 else "tf32x3"


def sizes(features: int, channels: int, dtype: torch.dtype) -> dict[str, Any]:
    """Compile-time arguments of all kernels."""
    return {
        "FEATURES": features, "CHANNELS": channels, "BLOCK_F": power(features), "BLOCK_D": power(channels),
        "ROWS": ROWS if dtype != torch.float32 else ROWS // 2, "HALF": half(dtype), "PRECISION": precision(dtype),
    }  # fmt: skip


def warps(given: dict[str, Any]) -> int:
    """Warps of a program, by the size of what it holds."""
    return 8 if max(given["BLOCK_F"], given["BLOCK_D"]) > 64 else 4


def strides(name: str, x: torch.Tensor) -> dict[str, int]:
    """Distances of two samples, tokens and heads of a tensor [B, tokens, heads, D]."""
    return {f"{name}_{axis}": x.stride(i) for i, axis in enumerate(("batch", "token", "head"))}
