"""Swapped attention of timm's sequences with a relative position bias: BEiT and the vit_relpos models.

The bias between grid tokens goes into the window. A class token is no grid token: it sees everything, and as a key it
is merged into the softmax of the grid by its log-sum-exp.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch.nn import functional as F

from visattn.layout import Layout
from visattn.models.swap.bias import rpb_of
from visattn.models.swap.runtime import Swapped
from visattn.models.swap.tokens import project
from visattn.offsets import offsets_of


class TokenBias(NamedTuple):
    """Biases [heads] of the pairs with the class token: it to the grid, the grid to it, it to itself."""

    to_grid: torch.Tensor
    from_grid: torch.Tensor
    to_self: torch.Tensor


class RelativeAttention:
    """What BEiT's and the relpos models' `Attention` have in common."""

    visattn_site: Swapped

    def _visattn_forward(self: Any, x: torch.Tensor, shared: torch.Tensor | None) -> torch.Tensor | None:
        """The pattern's result [B, S, dim], or None where the module's own attention is to run."""
        site: Swapped = self.visattn_site
        site.enter(x)
        layout = site.stays_stock(_refusal(self, shared), x.shape[1])
        heads = self.num_heads, self.proj.in_features // self.num_heads
        if layout is None or site.runs_own(layout, heads, x, rpb=True):
            return None
        q, k, v = project(self, x)
        if hasattr(self, "q_norm"):
            q, k = self.q_norm(q).to(v.dtype), self.k_norm(k).to(v.dtype)
        rpb, token = self._visattn_bias(site, layout)
        if token is None:
            y = site.attend(q, k, v, layout, self.scale, rpb=None if rpb is None else rpb.to(q.dtype))
        else:
            y = _with_class_token(site, q, k, v, layout.grid, self.scale, rpb.to(q.dtype), token)
        return self.proj_drop(self.proj(y.transpose(1, 2).flatten(2)))


class BeitAttention(RelativeAttention):
    """BEiT's `Attention`."""

    def forward(self: Any, x: torch.Tensor, shared_rel_pos_bias: torch.Tensor | None = None) -> torch.Tensor:
        """As the module's own forward."""
        found = self._visattn_forward(x, shared_rel_pos_bias)
        return super().forward(x, shared_rel_pos_bias=shared_rel_pos_bias) if found is None else found  # type: ignore[misc]

    def _visattn_bias(self: Any, site: Swapped, layout: Layout) -> tuple[torch.Tensor | None, TokenBias | None]:
        table = self.relative_position_bias_table
        if table is None:
            return None, None
        return offsets_of(table[:-3], tuple(self.window_size), site.pattern, layout.grid), TokenBias(*table[-3:])


class RelPosAttention(RelativeAttention):
    """The `RelPosAttention` of timm's vit_relpos models."""

    def forward(self: Any, x: torch.Tensor, shared_rel_pos: torch.Tensor | None = None) -> torch.Tensor:
        """As the module's own forward."""
        found = self._visattn_forward(x, shared_rel_pos)
        return super().forward(x, shared_rel_pos=shared_rel_pos) if found is None else found  # type: ignore[misc]

    def _visattn_bias(self: Any, site: Swapped, layout: Layout) -> tuple[torch.Tensor | None, TokenBias | None]:
        if self.rel_pos is None:
            return None, None
        rpb = rpb_of(self.rel_pos, site.pattern, layout.grid)
        if not layout.prefix:
            return rpb, None
        table = getattr(self.rel_pos, "relative_position_bias_table", None)
        # The MLP knows distances only: timm gives the class token a bias of zero.
        token = rpb.new_zeros(3, self.num_heads) if table is None else table[-3:]
        return rpb, TokenBias(*token)


def _refusal(module: Any, shared: torch.Tensor | None) -> str | None:
    """Why a call cannot run a pattern, or None."""
    if module.training and getattr(module.attn_drop, "p", 0.0) > 0:
        return f"attention dropout {module.attn_drop.p} is on in training"
    if shared is not None:
        return "the position bias is shared by all blocks and comes as one dense tensor"
    return None


def _with_class_token(
    site: Swapped,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    grid: tuple[int, ...],
    scale: float,
    rpb: torch.Tensor,
    bias: TokenBias,
) -> torch.Tensor:
    """Class token and grid apart: [B, heads, 1 + grid, head_dim]."""
    # The class token sees everything, with one bias for the grid and one for itself.
    row = torch.cat([bias.to_self[:, None], bias.to_grid[:, None].expand(-1, k.shape[2] - 1)], dim=1)
    row = row[None, :, None].to(q.dtype)
    token = F.scaled_dot_product_attention(q[:, :, :1], k, v, attn_mask=row, scale=scale)
    inner, lse = site.attend_lse(q[:, :, 1:], k[:, :, 1:], v[:, :, 1:], Layout(grid), scale, rpb)
    # One more key, the class token, enters the softmax of every grid query.
    logit = (q[:, :, 1:] * k[:, :, :1]).sum(-1).float() * scale + bias.from_grid[None, :, None].float()
    share = torch.sigmoid(logit - lse.float())[..., None].to(v.dtype)
    return torch.cat([token, inner + share * (v[:, :, :1] - inner)], dim=2)
