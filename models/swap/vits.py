"""Swapped attention of timm's further models on sequences: what their forwards do around the scaled dot product.

ViT-22B's parallel blocks, differential attention, Gemma 4's encoder, MetaFormers, TNT and EfficientFormer.
"""

from __future__ import annotations

import math
from typing import Any

import torch

from visattn.models.swap.bias import symmetric
from visattn.models.swap.runtime import Swapped
from visattn.models.swap.tokens import Heads, TokenAttention, project
from visattn.offsets import offsets_of


class SequenceAttention(TokenAttention):
    """MetaFormer's `Attention`, whose forward takes the tokens alone."""

    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        """As the module's own forward."""
        y = self._visattn_attend(x, None, None, False)
        if y is None:
            return super(TokenAttention, self).forward(x)  # type: ignore[misc]
        return self.proj_drop(self.proj(y.transpose(1, 2).flatten(2)))

    def _visattn_heads(self: Any, x: torch.Tensor, given: Any) -> Heads:
        return *project(self, x), self.scale


class SplitAttention(SequenceAttention):
    """TNT's `Attention`, whose queries and keys have a projection of their own."""

    def _visattn_heads(self: Any, x: torch.Tensor, given: Any) -> Heads:
        q, k = self.qk(x).unflatten(2, (2, self.num_heads, self.head_dim)).permute(2, 0, 3, 1, 4).unbind(0)
        v = self.v(x).unflatten(2, (self.num_heads, -1)).transpose(1, 2)
        return q, k, v, self.scale


class FormerAttention:
    """EfficientFormer's `Attention`: a bias of the distances of rows and columns, and values wider than keys.

    Stock's bias is of the map of one image size; a pattern takes its outermost entries beyond that.
    """

    visattn_site: Swapped

    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        """As the module's own forward."""
        site: Swapped = self.visattn_site
        site.enter(x)
        layout = site.stays_stock(None, x.shape[1])
        places = self.attention_biases.shape[1]
        heads = self.num_heads, self.key_dim
        if layout is None or (layout.tokens == places and site.runs_own(layout, heads, x, rpb=True)):
            return super().forward(x)  # type: ignore[misc]
        qkv = self.qkv(x).unflatten(2, (self.num_heads, -1)).transpose(1, 2)
        q, k, v = qkv.split([self.key_dim, self.key_dim, self.val_dim], dim=3)
        side = math.isqrt(places), math.isqrt(places)
        rpb = offsets_of(symmetric(self.attention_biases, side), side, site.pattern, layout.grid).to(v.dtype)
        y = site.attend(q, k, v, layout, self.scale, rpb=rpb)
        return self.proj(y.transpose(1, 2).flatten(2))


class GemmaAttention(TokenAttention):
    """Gemma 4's `Gemma4Attention`: norms of queries, keys and values, and a rotary embedding by rows and columns."""

    def forward(
        self: Any,
        x: torch.Tensor,
        rope_cos: torch.Tensor,
        rope_sin: torch.Tensor,
        attn_mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """As the module's own forward."""
        y = self._visattn_attend(x, (rope_cos, rope_sin), attn_mask, False)
        if y is None:
            return super(TokenAttention, self).forward(x, rope_cos, rope_sin, attn_mask=attn_mask)  # type: ignore[misc]
        return self.proj_drop(self.o_proj(y.transpose(1, 2).flatten(2)))

    def _visattn_shape(self: Any) -> tuple[int, int]:
        return self.num_heads, self.head_dim

    def _visattn_heads(self: Any, x: torch.Tensor, given: Any) -> Heads:
        # Older releases of timm have no such model.
        from timm.models.gemma4_vit import apply_multidimensional_rope

        q, k, v = (part(x).unflatten(2, (-1, self.head_dim)) for part in (self.q_proj, self.k_proj, self.v_proj))
        q, k = (
            apply_multidimensional_rope(t, *given, ndim=2, unsqueeze_dim=2) for t in (self.q_norm(q), self.k_norm(k))
        )
        q, k, v = (t.transpose(1, 2) for t in (q, k, self.v_norm(v)))
        return q, k, v, 1.0


def difference(module: Any, y: torch.Tensor) -> torch.Tensor:
    """Of each two heads the first minus the second by the learned factor: [B, S, dim] of [B, 2 * heads, S, D]."""
    first, second = y.unflatten(1, (module.num_heads, 2)).unbind(2)
    y = module.sub_norm(first - module._compute_lambda().type_as(y) * second)
    return (y * (1 - module.lambda_init)).transpose(1, 2).flatten(2)


def halves(module: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Heads:
    """Heads of a differential attention: two of queries and keys for one of values, all of [B, S, dim]."""
    q, k = (t.unflatten(2, (2 * module.num_heads, module.head_dim)).transpose(1, 2) for t in (q, k))
    v = v.unflatten(2, (module.num_heads, 2 * module.head_dim)).transpose(1, 2).repeat_interleave(2, dim=1)
    return module.q_norm(q), module.k_norm(k), v, module.scale


class DiffTokens(TokenAttention):
    """timm's `DiffAttention`: two softmaxes, one subtracted from the other."""

    def _visattn_forward(
        self: Any, x: torch.Tensor, rope: torch.Tensor | None, attn_mask: torch.Tensor | None, is_causal: bool
    ) -> torch.Tensor:
        y = self._visattn_attend(x, None, attn_mask, is_causal)
        if y is None:
            return self._visattn_stock(x, None, attn_mask, is_causal)
        return self.proj_drop(self.proj(self.norm(difference(self, y))))

    def _visattn_shape(self: Any) -> tuple[int, int]:
        return 2 * self.num_heads, 2 * self.head_dim

    def _visattn_heads(self: Any, x: torch.Tensor, given: Any) -> Heads:
        return halves(self, *self.qkv(x).chunk(3, dim=2))


class ParallelBlock(TokenAttention):
    """timm's `ParallelScalingBlock`: one projection for attention and MLP, side by side."""

    def _visattn_forward(
        self: Any, x: torch.Tensor, rope: torch.Tensor | None, attn_mask: torch.Tensor | None, is_causal: bool
    ) -> torch.Tensor:
        beside: list[torch.Tensor] = []
        y = self._visattn_attend(x, beside, attn_mask, is_causal)
        if y is None:
            return self._visattn_stock(x, None, attn_mask, is_causal)
        y, mlp = self._visattn_joined(y), beside[0]
        mlp = self.mlp_drop(self.mlp_act(mlp if self.mlp_bias is None else mlp + self.mlp_bias))
        if self.out_proj is not None:
            y = self.out_proj(torch.cat((y, mlp), dim=-1))
        else:
            y = self.attn_out_proj(y) + self.mlp_out_proj(mlp)
        return x + self.drop_path(self.ls(y))

    def _visattn_parts(self: Any, x: torch.Tensor, beside: list[torch.Tensor]) -> list[torch.Tensor]:
        """q, k, v [B, S, dim]; what goes to the MLP is left in `beside`."""
        mlp, *parts = torch.split(self.in_proj(self.in_norm(x)), self.in_split, dim=-1)
        beside.append(mlp)
        return parts

    def _visattn_shape(self: Any) -> tuple[int, int]:
        return self.num_heads, self.head_dim

    def _visattn_joined(self, y: torch.Tensor) -> torch.Tensor:
        """[B, S, dim] of the heads."""
        return y.transpose(1, 2).flatten(2)

    def _visattn_heads(self: Any, x: torch.Tensor, given: Any) -> Heads:
        q, k, v = (t.unflatten(2, (self.num_heads, -1)) for t in self._visattn_parts(x, given))
        q, k, v = (t.transpose(1, 2) for t in (self.q_norm(q), self.k_norm(k), v))
        return q, k, v, self.scale


class DiffParallelBlock(ParallelBlock):
    """timm's `DiffParallelScalingBlock`: the same with differential attention."""

    def _visattn_joined(self, y: torch.Tensor) -> torch.Tensor:
        return difference(self, y)

    def _visattn_shape(self: Any) -> tuple[int, int]:
        return 2 * self.num_heads, 2 * self.head_dim

    def _visattn_heads(self: Any, x: torch.Tensor, given: Any) -> Heads:
        return halves(self, *self._visattn_parts(x, given))
