"""Swapped attention of timm's blocks on maps without prefix tokens: MaxViT, CoAtNet, DaViT.

MaxViT's block attention and DaViT's spatial attention cut the map into windows that never meet; a pattern sees the
whole map. `na(window=P, stride=P)` is the cut into windows of P, where P divides the map.
"""

from __future__ import annotations

from typing import Any

import torch
from timm.models.maxxvit import grid_partition, grid_reverse

from visattn.layout import Layout
from visattn.models.swap.bias import rpb_of
from visattn.models.swap.runtime import Swapped
from visattn.models.swap.tokens import project


def dropout_refusal(attn: Any) -> str | None:
    """Why a module whose attention drops entries in training cannot run a pattern now, or None."""
    rate = attn.attn_drop.p if attn.training and hasattr(attn, "attn_drop") else 0.0
    return f"attention dropout {rate} is on in training" if rate > 0 else None


def attend_last(site: Swapped, attn: Any, x: torch.Tensor) -> torch.Tensor:
    """The pattern between MaxViT's projections for channels last: [B, H, W, dim] -> [B, H, W, dim_out]."""
    qkv = attn.qkv(x).flatten(1, 2)
    q, k, v = _heads(attn, qkv)
    y = _attend(site, attn, q, k, v, (x.shape[1], x.shape[2]))
    return attn.proj_drop(attn.proj(y.transpose(1, 2).flatten(2))).unflatten(1, x.shape[1:3])


def attend_first(site: Swapped, attn: Any, x: torch.Tensor) -> torch.Tensor:
    """The same for channels first: [B, dim, H, W] -> [B, dim_out, H, W]."""
    q, k, v = _heads(attn, attn.qkv(x).flatten(2).transpose(1, 2))
    y = _attend(site, attn, q, k, v, (x.shape[2], x.shape[3]))
    return attn.proj_drop(attn.proj(y.transpose(2, 3).flatten(1, 2).unflatten(2, x.shape[2:])))


def _heads(attn: Any, qkv: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """q, k, v [B, heads, S, head_dim] of [B, S, 3 * heads * head_dim], whose heads may come before q, k, v."""
    if attn.head_first:
        q, k, v = qkv.unflatten(2, (attn.num_heads, 3, attn.dim_head)).permute(3, 0, 2, 1, 4).unbind(0)
    else:
        q, k, v = qkv.unflatten(2, (3, attn.num_heads, attn.dim_head)).permute(2, 0, 3, 1, 4).unbind(0)
    return q, k, v


def _attend(
    site: Swapped, attn: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, grid: tuple[int, int]
) -> torch.Tensor:
    rpb = None if attn.rel_pos is None else rpb_of(attn.rel_pos, site.pattern, grid).to(v.dtype)
    return site.attend(q, k, v, Layout(grid), attn.scale, rpb=rpb)


class PartitionLast:
    """MaxViT's block `PartitionAttentionCl`: maps [B, H, W, dim]."""

    visattn_site: Swapped

    def _partition_attn(self: Any, x: torch.Tensor) -> torch.Tensor:
        if self.visattn_site.keeps_stock(dropout_refusal(self.attn)):
            return super()._partition_attn(x)  # type: ignore[misc]
        return attend_last(self.visattn_site, self.attn, x)


class PartitionFirst:
    """MaxViT's block `PartitionAttention2d`: maps [B, dim, H, W]."""

    visattn_site: Swapped

    def _partition_attn(self: Any, x: torch.Tensor) -> torch.Tensor:
        if self.visattn_site.keeps_stock(dropout_refusal(self.attn)):
            return super()._partition_attn(x)  # type: ignore[misc]
        return attend_first(self.visattn_site, self.attn, x)


class ParallelPartition:
    """MaxViT's `ParallelPartitionAttention`: its block half gets the pattern, its grid half stays."""

    visattn_site: Swapped

    def _partition_attn(self: Any, x: torch.Tensor) -> torch.Tensor:
        if self.visattn_site.keeps_stock(dropout_refusal(self.attn_block)):
            return super()._partition_attn(x)  # type: ignore[misc]
        size = list(self.partition_size)
        far = self.attn_grid(grid_partition(x, size))
        near = attend_last(self.visattn_site, self.attn_block, x)
        return torch.cat([near, grid_reverse(far, size, list(x.shape[1:3]))], dim=-1)


class CoAtBlock:
    """CoAtNet's `TransformerBlock2d`, whose attention sees the whole map already."""

    visattn_site: Swapped

    def forward(self: Any, x: torch.Tensor, shared_rel_pos: torch.Tensor | None = None) -> torch.Tensor:
        """As the module's own forward."""
        shared = "the position bias is shared by all blocks and comes as one dense tensor"
        refusal = dropout_refusal(self.attn) if shared_rel_pos is None else shared
        if self.visattn_site.keeps_stock(refusal):
            return super().forward(x, shared_rel_pos=shared_rel_pos)  # type: ignore[misc]
        y = attend_first(self.visattn_site, self.attn, self.norm1(x))
        x = self.shortcut(x) + self.drop_path1(self.ls1(y))
        return x + self.drop_path2(self.ls2(self.mlp(self.norm2(x))))


class DaVitBlock:
    """DaViT's `SpatialBlock`: maps [B, dim, H, W], windows without a position bias.

    Where its window does not divide the map, its zero padding takes part in the softmax; a pattern sees no padding.
    """

    visattn_site: Swapped

    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        """As the module's own forward."""
        site: Swapped = self.visattn_site
        if site.keeps_stock(None):
            return super().forward(x)  # type: ignore[misc]
        grid = int(x.shape[2]), int(x.shape[3])
        tokens = self.cpe1(x).flatten(2).transpose(1, 2)
        q, k, v = project(self.attn, self.norm1(tokens))
        y = site.attend(q, k, v, Layout(grid), self.attn.scale).transpose(1, 2).flatten(2)
        y = self.attn.proj(y)
        tokens = tokens + (y if self.drop_path1 is None else self.drop_path1(y))
        x = self.cpe2(tokens.transpose(1, 2).unflatten(2, grid))
        if self.mlp is None:
            return x
        tokens = x.flatten(2).transpose(1, 2)
        tokens = tokens + self.drop_path2(self.mlp(self.norm2(tokens)))
        return tokens.transpose(1, 2).unflatten(2, grid)
