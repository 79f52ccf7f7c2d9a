"""Swapped attention of timm's blocks that cut a map into windows: neighborhoods of the whole map instead.

Twins, SAM 2's Hiera, TinyViT, GCViT, Swin v2 CR, Nest, EfficientViT. Where a window does not divide the map, the zero
padding of stock attention takes part in the softmax; a pattern sees no padding.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, cast

import torch
from timm.models.nest import blockify
from torch.nn import functional as F

from visattn.layout import Layout
from visattn.models.swap.bias import rpb_of, symmetric
from visattn.models.swap.maps import dropout_refusal
from visattn.models.swap.runtime import Swapped
from visattn.models.swap.sized import joined
from visattn.models.swap.sources import between
from visattn.models.swap.tokens import project
from visattn.offsets import log_distances, offsets_of
from visattn.patterns import Neighborhood


def _grid(x: torch.Tensor) -> tuple[int, int]:
    """Rows and columns of [B, H, W, dim]."""
    return int(x.shape[1]), int(x.shape[2])


class TwinsLocal:
    """Twins' `LocallyGroupedAttn`: sequences with the size of their map."""

    visattn_site: Swapped

    def forward(self: Any, x: torch.Tensor, size: Sequence[int]) -> torch.Tensor:
        """As the module's own forward."""
        site: Swapped = self.visattn_site
        if site.keeps_stock(dropout_refusal(self)):
            return super().forward(x, size)  # type: ignore[misc]
        y = site.attend(*project(self, x), Layout(tuple(size)), self.scale)
        return self.proj_drop(self.proj(joined(y)))


class NestAttention:
    """Nest's `Attention`: a square map as blocks of tokens [B, blocks, tokens, dim]."""

    visattn_site: Swapped

    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        """As the module's own forward."""
        site: Swapped = self.visattn_site
        if site.keeps_stock(dropout_refusal(self)):
            return super().forward(x)  # type: ignore[misc]
        blocks, block = math.isqrt(x.shape[1]), math.isqrt(x.shape[2])
        cut = x.unflatten(2, (block, block)).unflatten(1, (blocks, blocks))
        image = cut.transpose(2, 3).flatten(3, 4).flatten(1, 2)
        grid = _grid(image)
        y = site.attend(*project(self, image.flatten(1, 2)), Layout(grid), self.scale)
        # Its heads come last, unlike those of all others.
        y = y.permute(0, 2, 3, 1).flatten(2)
        return self.proj_drop(self.proj(blockify(y.unflatten(1, grid), block)))


class Sam2Block:
    """SAM 2's `MultiScaleBlock` of Hiera: maps [B, H, W, dim], windows or the whole map."""

    visattn_site: Swapped

    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        """As the module's own forward."""
        site: Swapped = self.visattn_site
        if site.keeps_stock(None):
            return super().forward(x)  # type: ignore[misc]
        if not self.is_windowed and self._visattn_own(site, x):
            return super().forward(x)  # type: ignore[misc]
        normed, keys = self.norm1(x), _grid(x)
        x = x if self.dim == self.dim_out else _pooled(self.pool, self.proj(normed))
        grid = _grid(x)
        q, k, v = project(self.attn, normed.flatten(1, 2))
        if self.attn.q_pool is not None:
            q = q.transpose(2, 3).flatten(1, 2).unflatten(2, keys)
            q = self.attn.q_pool(q).flatten(2).unflatten(1, (self.attn.num_heads, -1)).transpose(2, 3)
        y = site.attend(q, k, v, between(grid, keys), self.attn.scale)
        x = x + self.drop_path1(self.ls1(self.attn.proj(joined(y).unflatten(1, grid))))
        return x + self.drop_path2(self.ls2(self.mlp(self.norm2(x))))

    def _visattn_own(self: Any, site: Swapped, x: torch.Tensor) -> bool:
        """Whether attention to the whole map runs."""
        keys, (down, right) = _grid(x), self.q_stride or (1, 1)
        heads = self.attn.num_heads, self.dim_out // self.attn.num_heads
        return site.runs_own(between((keys[0] // down, keys[1] // right), keys), heads, x)


def _pooled(pool: Any, x: torch.Tensor) -> torch.Tensor:
    """A map [B, H, W, dim] after a pooling of maps [B, dim, H, W], or as it is without one."""
    return x if pool is None else pool(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


class TinyBlock:
    """TinyViT's `TinyVitBlock`: maps [B, H, W, dim], a bias of distances."""

    visattn_site: Swapped

    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        """As the module's own forward."""
        site: Swapped = self.visattn_site
        if site.keeps_stock(None):
            return super().forward(x)  # type: ignore[misc]
        grid, attn = _grid(x), self.attn
        heads = attn.qkv(attn.norm(x.flatten(1, 2))).unflatten(2, (attn.num_heads, -1)).transpose(1, 2)
        q, k, v = heads.split([attn.key_dim, attn.key_dim, attn.val_dim], dim=3)
        table = symmetric(attn.attention_biases, attn.resolution)
        rpb = offsets_of(table, attn.resolution, site.pattern, grid)
        y = site.attend(q, k, v, Layout(grid), attn.scale, rpb=rpb.to(v.dtype))
        x = x + self.drop_path1(attn.proj(joined(y)).unflatten(1, grid))
        tokens = self.local_conv(x.permute(0, 3, 1, 2)).flatten(2).transpose(1, 2)
        return (tokens + self.drop_path2(self.mlp(tokens))).unflatten(1, grid)


class GlobalContextBlock:
    """GCViT's `GlobalContextVitBlock` with local queries: maps [B, H, W, dim]."""

    visattn_site: Swapped

    def _window_attn(self: Any, x: torch.Tensor, q_global: torch.Tensor | None = None) -> torch.Tensor:
        site: Swapped = self.visattn_site
        attn = self.attn
        if site.keeps_stock(dropout_refusal(attn)):
            return super()._window_attn(x, q_global)  # type: ignore[misc]
        grid = _grid(x)
        q, k, v = project(attn, x.flatten(1, 2))
        rpb = rpb_of(attn.rel_pos, site.pattern, grid).to(v.dtype)
        y = site.attend(q, k, v, Layout(grid), attn.scale, rpb=rpb)
        return attn.proj_drop(attn.proj(joined(y))).unflatten(1, grid)


def global_queries(block: Any) -> str:
    """Why a block of GCViT cannot be swapped, "" if it can."""
    return "its queries are one window's, made of the whole image" if block.attn.use_global else ""


class SwinCrBlock:
    """timm's `SwinTransformerV2CrBlock`: cosine attention, and a bias that a small MLP gives for any distance."""

    visattn_site: Swapped

    def _shifted_window_attn(self: Any, x: torch.Tensor) -> torch.Tensor:
        site: Swapped = self.visattn_site
        attn = self.attn
        if site.keeps_stock(dropout_refusal(attn)):
            return super()._shifted_window_attn(x)  # type: ignore[misc]
        grid = _grid(x)
        q, k, v = project(attn, x.flatten(1, 2))
        factor = attn.logit_scale[:, None, None].clamp(max=math.log(1 / 0.01)).exp()
        q, k = (F.normalize(q, dim=-1) * factor).to(v.dtype), F.normalize(k, dim=-1).to(v.dtype)
        bias = attn.meta_mlp(
            log_distances(cast(Neighborhood, site.pattern), grid, None, attn.meta_mlp.fc1.weight)
        ).permute(2, 0, 1)
        y = site.attend(q, k, v, Layout(grid), 1.0, rpb=bias.to(v.dtype))
        return attn.proj_drop(attn.proj(joined(y))).unflatten(1, grid)


class GatedHead:
    """iFormer's `SHMA`: one head with a gate on maps [B, dim, H, W], windows or the whole map."""

    visattn_site: Swapped

    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        """As the module's own forward."""
        site: Swapped = self.visattn_site
        if site.keeps_stock(dropout_refusal(self)):
            return super().forward(x)  # type: ignore[misc]
        grid = int(x.shape[2]), int(x.shape[3])
        if not self.window_size and site.runs_own(Layout(grid), (1, round(self.scale**-2)), x):
            return super().forward(x)  # type: ignore[misc]
        v, gate = self.gate_act(self.v_gate(x)).chunk(2, dim=1)
        q, k, v = (t.flatten(2).transpose(1, 2)[:, None] for t in (self.q(x), self.k(x), v))
        y = site.attend(q, k, v, Layout(grid), self.scale)[:, 0].transpose(1, 2).unflatten(2, grid)
        return self.proj(y * gate)


class CascadeWindow:
    """EfficientViT's `LocalWindowAttention`: maps [B, dim, H, W], each head's input has the output of the one before.

    The convolution on the queries sees the whole map where a pattern runs; stock's sees its window.
    """

    visattn_site: Swapped

    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        """As the module's own forward."""
        site: Swapped = self.visattn_site
        if site.keeps_stock(None):
            return super().forward(x)  # type: ignore[misc]
        attn, grid = self.attn, (int(x.shape[2]), int(x.shape[3]))
        side = attn.resolution, attn.resolution
        rpb = offsets_of(symmetric(attn.attention_biases, side), side, site.pattern, grid)
        made: list[torch.Tensor] = []
        for head, part in enumerate(x.chunk(attn.num_heads, dim=1)):
            heads = attn.qkvs[head](part + made[-1] if made else part)
            q, k, v = heads.split([attn.key_dim, attn.key_dim, attn.val_dim], dim=1)
            q, k, v = (t.flatten(2).transpose(1, 2)[:, None] for t in (attn.dws[head](q), k, v))
            y = site.attend(q, k, v, Layout(grid), attn.scale, rpb=rpb[head : head + 1].to(v.dtype))
            made.append(y[:, 0].transpose(1, 2).unflatten(2, grid))
        return attn.proj(torch.cat(made, dim=1))
