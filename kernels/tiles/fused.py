"""Softmax attention of a batch of small problems: torch's fused CPU kernel, and plain operators for the rest."""

from __future__ import annotations

from typing import NamedTuple

import torch

from visattn.operands import wide_dtype


class Gradients(NamedTuple):
    """Gradients of one batch of problems; `scores` only where a bias wants it."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    scores: torch.Tensor | None


def forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bias: torch.Tensor | None, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention and log-sum-exp of n problems.

    Args:
        q: [n, H, T, D].
        k: [n, H, L, D].
        v: [n, H, L, D].
        bias: Added to the scaled scores, -inf where a key is not visible: [1 or n, 1 or H, 1 or T, L].
        scale: Factor on the scores.

    Returns:
        Output [n, H, T, D]; log-sum-exp [n, H, T], float32 at least. A row without a visible key gives zeros, and
        any finite log-sum-exp or -inf.
    """
    if q.device.type == "cpu":
        mask = None if bias is None else _expanded(bias, q)
        # Not by torch.ops, which looks for the overload in each call.
        return torch._scaled_dot_product_flash_attention_for_cpu(q, k, v, attn_mask=mask, scale=scale)
    return plain_forward(q, k, v, bias, scale)


def plain_forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bias: torch.Tensor | None, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """`forward` in plain operators, for devices other than CPUs."""
    scores = _scores(q, k, bias, scale)
    lse = scores.logsumexp(-1)
    weights = torch.exp(scores - finite(lse)[..., None])
    return (weights @ v.to(weights.dtype)).to(q.dtype), lse


def backward(
    grad: torch.Tensor,
    grad_lse: torch.Tensor | None,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    bias: torch.Tensor | None,
    scale: float,
    want_scores: bool,
) -> Gradients:
    """Gradients of `forward`; shapes as there, `lse` finite, `scores` [n, H, T, L] if wanted."""
    if q.device.type == "cpu" and grad_lse is None and not want_scores:
        mask = None if bias is None else _expanded(bias, q)
        found = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default(
            grad, q, k, v, out, lse, 0.0, False, attn_mask=mask, scale=scale
        )
        return Gradients(*found, scores=None)
    weights = torch.exp(_scores(q, k, bias, scale) - lse[..., None])
    wide = weights.dtype
    grad = grad.to(wide)
    delta = (grad * out).sum(-1)
    if grad_lse is not None:
        delta = delta - grad_lse
    scores = weights * (grad @ v.to(wide).transpose(-1, -2) - delta[..., None])
    found = (
        scores @ k.to(wide) * scale,
        scores.transpose(-1, -2) @ q.to(wide) * scale,
        weights.transpose(-1, -2) @ grad,
    )
    return Gradients(*(g.to(q.dtype) for g in found), scores=scores if want_scores else None)


def finite(lse: torch.Tensor) -> torch.Tensor:
    """The log-sum-exp with 0 for rows without visible keys, where exp(-inf - 0) is the right 0."""
    return lse.masked_fill(lse == float("-inf"), 0)


def _scores(q: torch.Tensor, k: torch.Tensor, bias: torch.Tensor | None, scale: float) -> torch.Tensor:
    wide = wide_dtype(q)
    scores = q.to(wide) @ k.to(wide).transpose(-1, -2) * scale
    return scores if bias is None else scores + bias


def _expanded(bias: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    """The fused kernel takes one row of bias per query; broadcasting costs no memory."""
    return bias.expand(-1, -1, q.shape[2], -1)
