"""Swapped attention of timm's models on token sequences: ViT and its kin, EVA-02, DINOv3, rope ViTs.

Each class is mixed into the class of a module in place, so parameters, hooks and the names of the state dict stay.
"""

from __future__ import annotations

from typing import Any

import torch
from timm.layers import apply_rot_embed_cat
from torch.nn import functional as F

from visattn.models.swap.flexible import attend_samples, foreign_mask
from visattn.models.swap.runtime import Swapped

Heads = tuple[torch.Tensor, torch.Tensor, torch.Tensor, float]


class TokenAttention:
    """timm's `Attention`, `AttentionRope` and `EvaAttention` with the scaled dot product replaced."""

    visattn_site: Swapped

    def forward(
        self: Any, x: torch.Tensor, attn_mask: torch.Tensor | None = None, is_causal: bool = False
    ) -> torch.Tensor:
        """As the module's own forward."""
        return self._visattn_forward(x, None, attn_mask, is_causal)

    def _visattn_forward(
        self: Any, x: torch.Tensor, rope: torch.Tensor | None, attn_mask: torch.Tensor | None, is_causal: bool
    ) -> torch.Tensor:
        y = self._visattn_attend(x, rope, attn_mask, is_causal)
        if y is None:
            return self._visattn_stock(x, rope, attn_mask, is_causal)
        y = y.transpose(1, 2).flatten(2)
        y = self.norm(y) if getattr(self, "norm", None) is not None else y
        gate = self.gate(x).sigmoid() if getattr(self, "gate", None) is not None else None
        y = y if gate is None else y * gate
        return self.proj_drop(self.proj(y))

    def _visattn_attend(
        self: Any, x: torch.Tensor, given: Any, attn_mask: torch.Tensor | None, is_causal: bool
    ) -> torch.Tensor | None:
        """The pattern's result [B, heads, S, head_dim], None where the module's own attention is to run."""
        site: Swapped = self.visattn_site
        site.enter(x)
        key_mask, refusal = _key_mask(attn_mask, x, is_causal, self)
        samples = site.samples(x.shape[1])
        if samples:
            layout = None if site.keeps_stock(refusal) else samples[0]
        else:
            layout = site.stays_stock(refusal, x.shape[1])
        if layout is None:
            return None
        if not samples and site.runs_own(layout, self._visattn_shape(), x, key_mask is not None):
            return None
        q, k, v, scale = self._visattn_heads(x, given)
        # Without autocast's knowledge of SDPA a norm in float32 leaves q and k wider than v.
        q, k = q.to(v.dtype), k.to(v.dtype)
        if samples:
            return attend_samples(site, q, k, v, samples, scale)
        return site.attend(q, k, v, layout, scale, key_mask)

    def _visattn_shape(self: Any) -> tuple[int, int]:
        """Number and width of the heads."""
        return self.num_heads, self.proj.in_features // self.num_heads

    def _visattn_heads(self: Any, x: torch.Tensor, given: Any) -> Heads:
        """Queries, keys, values [B, heads, S, head_dim], and the factor on the logits.

        Args:
            x: What the module got.
            given: What the class needs beside that, here a rotary embedding or None.
        """
        q, k, v = project(self, x)
        q, k = self.q_norm(q), self.k_norm(k)
        if given is not None:
            q, k = (_rotate(self, t, given).type_as(v) for t in (q, k))
        return q, k, v, self.scale

    def _visattn_stock(
        self: Any, x: torch.Tensor, rope: torch.Tensor | None, attn_mask: torch.Tensor | None, is_causal: bool
    ) -> torch.Tensor:
        return super().forward(x, attn_mask=attn_mask, is_causal=is_causal)  # type: ignore[misc]


class RotaryAttention(TokenAttention):
    """The same for classes whose forward takes rotary embeddings."""

    def forward(
        self: Any,
        x: torch.Tensor,
        rope: torch.Tensor | None = None,
        attn_mask: torch.Tensor | None = None,
        is_causal: bool = False,
    ) -> torch.Tensor:
        """As the module's own forward."""
        return self._visattn_forward(x, rope, attn_mask, is_causal)

    def _visattn_stock(
        self: Any, x: torch.Tensor, rope: torch.Tensor | None, attn_mask: torch.Tensor | None, is_causal: bool
    ) -> torch.Tensor:
        return super(TokenAttention, self).forward(x, rope=rope, attn_mask=attn_mask, is_causal=is_causal)  # type: ignore[misc]


def _key_mask(
    attn_mask: torch.Tensor | None, x: torch.Tensor, is_causal: bool, module: Any
) -> tuple[torch.Tensor | None, str | None]:
    """The mask as one of keys [B, S], and why the call cannot run a pattern."""
    dropout = getattr(module.attn_drop, "p", 0.0) if module.training else 0.0
    if is_causal:
        return None, "is_causal is set"
    if dropout > 0:
        return None, f"attention dropout {dropout} is on in training"
    samples = module.visattn_site.padded(x.shape[1])
    if samples and attn_mask is not None:
        return None, "attn_mask hides more than padding" if foreign_mask(attn_mask, samples) else None
    if attn_mask is None:
        return None, None
    if attn_mask.dtype == torch.bool and attn_mask.ndim == 4 and attn_mask.shape[1:3] == (1, 1):
        return attn_mask[:, 0, 0].expand(x.shape[0], -1), None
    return None, f"attn_mask is {attn_mask.dtype} {list(attn_mask.shape)}, not a bool mask of keys [B, 1, 1, S]"


def project(module: Any, x: torch.Tensor, heads: int | None = None) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """q, k, v [B, heads, S, head_dim] of any of the classes; its `num_heads` unless their number is given."""
    if getattr(module, "qkv", None) is None:
        own = module.num_heads, getattr(module, "num_kv_heads", module.num_heads)
        parts = zip((module.q_proj, module.k_proj, module.v_proj), (own[0], own[1], own[1]), strict=True)
        q, k, v = (part(x).unflatten(2, (n, -1)).transpose(1, 2) for part, n in parts)
        return q, k, v
    if getattr(module, "q_bias", None) is None:
        qkv = module.qkv(x)
    else:
        bias = torch.cat((module.q_bias, module.k_bias, module.v_bias))
        separate = getattr(module, "qkv_bias_separate", False)
        qkv = module.qkv(x) + bias if separate else F.linear(x, module.qkv.weight, bias)
    q, k, v = qkv.unflatten(2, (3, heads or module.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
    return q, k, v


def _rotate(module: Any, x: torch.Tensor, rope: torch.Tensor) -> torch.Tensor:
    """Rotary embedding of the grid tokens."""
    first = module.num_prefix_tokens
    grid = apply_rot_embed_cat(x[:, :, first:], rope, half=getattr(module, "rotate_half", False))
    return torch.cat([x[:, :, :first], grid], dim=2)
