"""What is asked of q, k and v everywhere: the dtype of their sums, shared key heads, channels in rows, gradients."""

from __future__ import annotations

import torch


def wide_dtype(x: torch.Tensor) -> torch.dtype:
    """Where sums over many values of x are safe: float32, or x's own dtype where that is wider."""
    return torch.promote_types(x.dtype, torch.float32)


def widened(x: torch.Tensor) -> torch.Tensor:
    """X in its `wide_dtype`; x itself where it is wide already."""
    return x.to(wide_dtype(x))


def repeated(x: torch.Tensor, heads: int, dim: int = 2) -> torch.Tensor:
    """What key heads have, for each of the query heads that share them; x itself where there are equally many.

    Args:
        x: Any shape with a dimension of key heads, as [B, S, Hkv, D].
        heads: Query heads, a multiple of the key heads.
        dim: The dimension of the heads.
    """
    return x if x.shape[dim] == heads else x.repeat_interleave(heads // x.shape[dim], dim)


def is_in_rows(x: torch.Tensor) -> bool:
    """Whether the channels of a token lie one behind the other in memory, whatever the other strides."""
    return x.stride(-1) == 1 or x.shape[-1] == 1


def in_rows(x: torch.Tensor) -> torch.Tensor:
    """x, or a copy whose channels lie one behind the other."""
    return x if is_in_rows(x) else x.contiguous()


def wants_gradient(*tensors: torch.Tensor | None) -> bool:
    """Whether autograd records what is computed from some tensors; None stands for one that is not there."""
    # A loop: this is asked at every call, and a generator costs more than all its answers.
    if torch.is_grad_enabled():
        for t in tensors:
            if t is not None and t.requires_grad:
                return True
    return False
