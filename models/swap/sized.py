"""Swapped attention that is dense on a map whose size its forward gets or knows.

VOLO, Visformer, FastViT, MobileNetV4, PVT v2 and Twins, LeViT, and what those have in common.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from visattn.layout import Layout
from visattn.models.swap.bias import symmetric
from visattn.models.swap.maps import dropout_refusal
from visattn.models.swap.runtime import Swapped
from visattn.models.swap.tokens import project
from visattn.offsets import offsets_of


def joined(y: torch.Tensor) -> torch.Tensor:
    """[B, S, heads * D] of heads [B, heads, S, D]."""
    return y.transpose(1, 2).flatten(2)


class LastMap:
    """VOLO's `Attention`: maps [B, H, W, dim]."""

    visattn_site: Swapped

    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        """As the module's own forward."""
        grid = x.shape[1:3]
        heads = self.num_heads, x.shape[3] // self.num_heads
        layout = self.visattn_site.on_map(dropout_refusal(self), grid, heads, x)
        if layout is None:
            return super().forward(x)  # type: ignore[misc]
        y = self.visattn_site.attend(*project(self, x.flatten(1, 2)), layout, self.scale)
        return self.proj_drop(self.proj(joined(y).unflatten(1, grid)))


class FirstMap:
    """Visformer's `Attention`: maps [B, dim, H, W], projected by convolutions."""

    visattn_site: Swapped

    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        """As the module's own forward."""
        grid = x.shape[2:]
        layout = self.visattn_site.on_map(dropout_refusal(self), grid, (self.num_heads, self.head_dim), x)
        if layout is None:
            return super().forward(x)  # type: ignore[misc]
        q, k, v = self.qkv(x).flatten(2).unflatten(1, (3, self.num_heads, -1)).transpose(3, 4).unbind(1)
        y = self.visattn_site.attend(q, k, v, layout, self.scale)
        return self.proj_drop(self.proj(joined(y).transpose(1, 2).unflatten(2, grid)))


class FlattenedMap:
    """FastViT's `Attention`: maps [B, dim, H, W], projected as a sequence."""

    visattn_site: Swapped

    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        """As the module's own forward."""
        grid = x.shape[2:]
        layout = self.visattn_site.on_map(dropout_refusal(self), grid, (self.num_heads, self.head_dim), x)
        if layout is None:
            return super().forward(x)  # type: ignore[misc]
        y = self.visattn_site.attend(*project(self, x.flatten(2).transpose(1, 2)), layout, self.scale)
        return self.proj_drop(self.proj(joined(y))).transpose(1, 2).unflatten(2, grid)


class OneHead:
    """SHViT's `SHSA`: one head on some of the channels of maps [B, dim, H, W]."""

    visattn_site: Swapped

    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        """As the module's own forward."""
        grid = x.shape[2:]
        layout = self.visattn_site.on_map(None, grid, (1, self.pdim), x)
        if layout is None:
            return super().forward(x)  # type: ignore[misc]
        own, rest = x.split([self.pdim, self.dim - self.pdim], dim=1)
        # Each transposed alone: torch's BatchNorm has a wrong gradient for one image if its own comes transposed.
        heads = self.qkv(self.pre_norm(own)).split([self.qk_dim, self.qk_dim, self.pdim], dim=1)
        q, k, v = (t.flatten(2).transpose(1, 2)[:, None] for t in heads)
        y = self.visattn_site.attend(q, k, v, layout, self.scale)[:, 0].transpose(1, 2).unflatten(2, grid)
        return self.proj(torch.cat([y, rest], dim=1))


class SharedKeys:
    """MobileNetV4's `MultiQueryAttention2d`: maps [B, dim, H, W], one head of keys and values for all queries.

    A stride of its queries, or of its keys and values, makes their map coarser.
    """

    visattn_site: Swapped

    def forward(self: Any, x: torch.Tensor, attn_mask: torch.Tensor | None = None) -> torch.Tensor:
        """As the module's own forward."""
        height, width = x.shape[2:]
        grid = height // self.query_strides[0], width // self.query_strides[1]
        keys = -(-height // self.kv_stride), -(-width // self.kv_stride)
        refusal = dropout_refusal(self) if attn_mask is None else "attn_mask is of pairs"
        layout = self.visattn_site.on_map(refusal, grid, (self.num_heads, self.key_dim), x, keys)
        if layout is None:
            return super().forward(x, attn_mask)  # type: ignore[misc]
        q = self.query(x).flatten(2).unflatten(1, (self.num_heads, -1)).transpose(2, 3)
        k, v = (part(x).flatten(2).transpose(1, 2)[:, None] for part in (self.key, self.value))
        y = self.visattn_site.attend(q, k, v, layout, self.scale)
        return self.output(joined(y).transpose(1, 2).unflatten(2, grid))


class ReducedKeys:
    """The `Attention` of PVT v2 and the `GlobalSubSampleAttn` of Twins: sequences with the size of their map.

    A convolution makes the map of the keys coarser in all stages but the last; in PVT v2's linear form a pooling does.
    """

    visattn_site: Swapped

    def forward(self: Any, x: torch.Tensor, size: Sequence[int]) -> torch.Tensor:
        """As the module's own forward."""
        heads = self.num_heads, x.shape[2] // self.num_heads
        layout = self.visattn_site.on_map(dropout_refusal(self), size, heads, x, self._visattn_keys(size))
        if layout is None:
            return super().forward(x, size)  # type: ignore[misc]
        q = self.q(x).unflatten(2, heads).transpose(1, 2)
        if self.sr is not None:
            image = x.transpose(1, 2).unflatten(2, tuple(size))
            pooled = image if getattr(self, "pool", None) is None else self.pool(image)
            x = self.norm(self.sr(pooled).flatten(2).transpose(1, 2))
            x = x if getattr(self, "act", None) is None else self.act(x)
        k, v = self.kv(x).unflatten(2, (2, *heads)).permute(2, 0, 3, 1, 4).unbind(0)
        return self.proj_drop(self.proj(joined(self.visattn_site.attend(q, k, v, layout, self.scale))))

    def _visattn_keys(self: Any, size: Sequence[int]) -> tuple[int, int]:
        """Rows and columns of the keys."""
        pool = getattr(self, "pool", None)
        if pool is not None:
            return pool.output_size, pool.output_size
        stride = 1 if self.sr is None else self.sr.stride[0]
        return size[0] // stride, size[1] // stride


class LevitAttention:
    """LeViT's `Attention`: sequences or maps of one size, with a bias of distances and values wider than keys."""

    visattn_site: Swapped

    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        """As the module's own forward."""
        grid = tuple(self.resolution)
        layout = self.visattn_site.on_map(None, grid, (self.num_heads, self.key_dim), x, rpb=True)
        if layout is None:
            return super().forward(x)  # type: ignore[misc]
        _check(self, x, layout)
        sizes = [self.key_dim, self.key_dim, self.val_dim]
        if self.use_conv:
            q, k, v = (
                t.transpose(2, 3) for t in self.qkv(x).flatten(2).unflatten(1, (self.num_heads, -1)).split(sizes, dim=2)
            )
        else:
            q, k, v = self.qkv(x).unflatten(2, (self.num_heads, -1)).transpose(1, 2).split(sizes, dim=3)
        rpb = offsets_of(symmetric(self.attention_biases, grid), grid, self.visattn_site.pattern, grid)
        y = joined(self.visattn_site.attend(q, k, v, layout, self.scale, rpb=rpb.to(v.dtype)))
        return self.proj(y.transpose(1, 2).unflatten(2, grid) if self.use_conv else y)


def _check(module: Any, x: torch.Tensor, layout: Layout) -> None:
    """Raise a ValueError unless a module of one size got a map or sequence of that."""
    fits = tuple(x.shape[2:]) == layout.grid if module.use_conv else x.shape[1] == layout.tokens
    if not fits:
        raise ValueError(
            f"{module.visattn_site.path} was made for a grid of {layout} and got {list(x.shape)}: give the images the "
            "size of the model, or create it with their img_size"
        )


def strided(module: Any) -> bool:
    """Whether a module of MobileNetV4 has queries or keys on a coarser map."""
    return module.kv_stride > 1 or module.has_query_strides


def reduced(module: Any) -> bool:
    """Whether a module of PVT v2 or Twins has keys on a coarser map."""
    return module.sr is not None
