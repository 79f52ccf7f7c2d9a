"""Swapped attention of timm's MViT v2: pooled queries and keys, decomposed position logits, a residual of queries."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from timm.models.mvitv2 import reshape_post_pool, reshape_pre_pool
from torch.nn import functional as F

from visattn.models.swap.runtime import Swapped
from visattn.models.swap.sources import between
from visattn.models.swap.tokens import project
from visattn.positions import with_positions


class PooledAttention:
    """MViT v2's `MultiScaleAttention`: sequences with the size of their map, perhaps a class token before them."""

    visattn_site: Swapped

    def forward(self: Any, x: torch.Tensor, feat_size: Sequence[int]) -> tuple[torch.Tensor, list[int]]:
        """As the module's own forward."""
        site: Swapped = self.visattn_site
        if site.keeps_stock(None):
            return super().forward(x, feat_size)  # type: ignore[misc]
        heads = project(self, x)
        (q, size), (k, keys), (v, _) = (_pool(self, name, t, feat_size) for name, t in zip("qkv", heads, strict=True))
        prefix, grid = int(self.has_cls_token), (int(size[0]), int(size[1]))
        layout = between(grid, keys, prefix)
        wide_q, wide_k, wide_v = q, k, v
        if self.rel_pos_type == "spatial":
            tables = self.rel_pos_h, self.rel_pos_w
            own_q, own_k, own_v = (t[:, :, prefix:] for t in (q, k, v))
            parts = with_positions(own_q, own_k, own_v, tables, site.pattern, grid, self.scale, layout.keys.grid)
            wide_q, wide_k, wide_v = (_beside(t, part, prefix) for t, part in zip((q, k, v), parts, strict=True))
        y = site.attend(wide_q, wide_k, wide_v, layout, self.scale)[..., : v.shape[-1]]
        y = y + q if self.residual_pooling else y
        return self.proj(y.transpose(1, 2).flatten(2)), list(size)


def _pool(module: Any, name: str, x: torch.Tensor, size: Sequence[int]) -> tuple[torch.Tensor, Sequence[int]]:
    """One of q, k, v, pooled and normed as the module does, with the size of its map."""
    pool, norm = getattr(module, f"pool_{name}"), getattr(module, f"norm_{name}")
    if pool is not None:
        x, token = reshape_pre_pool(x, list(size), module.has_cls_token)
        x, size = reshape_post_pool(pool(x), module.num_heads, token)
    return (x if norm is None else norm(x)), size


def _beside(x: torch.Tensor, grid: torch.Tensor, prefix: int) -> torch.Tensor:
    """Dense tokens of x without position logits, before the grid tokens, which have them as more channels."""
    return torch.cat([F.pad(x[:, :, :prefix], (0, grid.shape[-1] - x.shape[-1])), grid], dim=2) if prefix else grid


def pools_apart(module: Any) -> bool:
    """Whether a module of MViT v2 pools keys in other steps than queries."""
    return _stride(module.pool_q) != _stride(module.pool_k)


def _stride(pool: Any) -> tuple[int, ...]:
    stride = 1 if pool is None else pool.stride
    return (stride, stride) if isinstance(stride, int) else tuple(stride)
