"""Swapped attention of timm's Swin v1 and v2: a neighborhood with the window's position bias, and no shift.

Swin's windows are blocks, shifted in every other layer so that they overlap; a neighborhood overlaps everywhere.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch.nn import functional as F

from visattn.layout import Layout
from visattn.models.swap.runtime import Swapped
from visattn.models.swap.tokens import project
from visattn.offsets import log_distances, offsets_of
from visattn.patterns import Neighborhood


class SwinBlock:
    """timm's `SwinTransformerBlock`, whose `_attn` takes and gives maps [B, H, W, dim]."""

    visattn_site: Swapped

    def _attn(self: Any, x: torch.Tensor) -> torch.Tensor:
        site: Swapped = self.visattn_site
        attn = self.attn
        batch, height, width, dim = x.shape
        layout = Layout((height, width))
        dropout = attn.attn_drop.p if self.training else 0.0
        if site.keeps_stock(f"attention dropout {dropout} is on in training" if dropout > 0 else None):
            return super()._attn(x)  # type: ignore[misc]
        q, k, v = project(attn, x.reshape(batch, height * width, dim))
        q, k, scale = self._visattn_logits(attn, q, k)
        rpb = self._visattn_bias(attn, site.pattern, layout.grid)
        y = site.attend(q.to(v.dtype), k.to(v.dtype), v, layout, scale, rpb=rpb.to(v.dtype))
        y = attn.proj_drop(attn.proj(y.transpose(1, 2).flatten(2)))
        return y.reshape(batch, height, width, dim)

    def _visattn_logits(self, attn: Any, q: torch.Tensor, k: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, float]:
        """Queries, keys and the scale of their products."""
        return q, k, attn.scale

    def _visattn_bias(self, attn: Any, pattern: Neighborhood, grid: tuple[int, ...]) -> torch.Tensor:
        """The `rpb` of the pattern."""
        return offsets_of(attn.relative_position_bias_table, tuple(attn.window_size), pattern, grid)


class SwinV2Block(SwinBlock):
    """timm's `SwinTransformerV2Block`: cosine attention, and a bias that a small MLP gives for any distance."""

    def _visattn_logits(self, attn: Any, q: torch.Tensor, k: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, float]:
        """Queries, keys and the scale of their products."""
        scale = attn.logit_scale.clamp(max=math.log(1 / 0.01)).exp()
        return F.normalize(q, dim=-1) * scale, F.normalize(k, dim=-1), 1.0

    def _visattn_bias(self, attn: Any, pattern: Neighborhood, grid: tuple[int, ...]) -> torch.Tensor:
        """The `rpb` of the pattern, from the MLP."""
        weight = attn.cpb_mlp[0].weight
        known = attn.pretrained_window_size if attn.pretrained_window_size[0] > 0 else attn.window_size
        coordinates = log_distances(pattern, grid, tuple(known), weight)
        return 16 * torch.sigmoid(attn.cpb_mlp(coordinates)).permute(2, 0, 1)
