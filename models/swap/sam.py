"""Swapped attention of timm's SAM encoders: maps without prefix tokens, and a position logit that depends on the query.

See `visattn.positions` for the logits.
"""

from __future__ import annotations

from typing import Any

import torch
from timm.layers import apply_rot_embed_cat

from visattn.layout import Layout
from visattn.models.swap.maps import dropout_refusal
from visattn.models.swap.runtime import Swapped
from visattn.models.swap.tokens import project
from visattn.positions import resized, with_positions


class SamBlock:
    """timm's `Block` of SAM: maps [B, H, W, dim], windows or the whole map.

    Where its window does not divide the map, its zero padding takes part in the softmax; a pattern sees no padding.
    """

    visattn_site: Swapped

    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        """As the module's own forward."""
        site: Swapped = self.visattn_site
        if site.keeps_stock(dropout_refusal(self.attn)):
            return super().forward(x)  # type: ignore[misc]
        grid = int(x.shape[1]), int(x.shape[2])
        heads = self.attn.num_heads, x.shape[3] // self.attn.num_heads
        if self.window_size == 0 and site.runs_own(Layout(grid), heads, x):
            return super().forward(x)  # type: ignore[misc]
        x = x + self.drop_path1(self.ls1(self._visattn_map(site, self.norm1(x), grid)))
        tokens = x.flatten(1, 2)  # as timm does, for a faster MLP
        tokens = tokens + self.drop_path2(self.ls2(self.mlp(self.norm2(tokens))))
        return tokens.unflatten(1, grid)

    def _visattn_map(self: Any, site: Swapped, x: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
        attn = self.attn
        q, k, v = project(attn, x.flatten(1, 2))
        q, k = attn.q_norm(q).to(v.dtype), attn.k_norm(k).to(v.dtype)
        if attn.use_rel_pos:
            tables = attn.rel_pos_h, attn.rel_pos_w
            if self.window_size == 0:
                tables = tuple(resized(table, 2 * n - 1) for table, n in zip(tables, grid, strict=True))
            q, k, padded = with_positions(q, k, v, tables, site.pattern, grid, attn.scale)
            y = site.attend(q, k, padded, Layout(grid), attn.scale)[..., : v.shape[-1]]
        else:
            if attn.rope is not None:
                q, k = (apply_rot_embed_cat(t, attn.rope.get_embed()).type_as(v) for t in (q, k))
            y = site.attend(q, k, v, Layout(grid), attn.scale)
        return attn.proj_drop(attn.proj(y.transpose(1, 2).flatten(2))).unflatten(1, grid)
