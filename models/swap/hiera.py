"""Swapped attention of timm's Hiera, whose tokens are sorted by the pooling that its later stages do.

They are brought into rows and columns for a pattern, and back.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from timm.models.hiera import Unroll
from torch import nn
from torch.nn import functional as F

from visattn.models.swap.runtime import Swapped
from visattn.models.swap.sources import between
from visattn.models.swap.tokens import project


class Unrolled(NamedTuple):
    """How the tokens of a block are sorted.

    Attributes:
        reroll: Of the model.
        block: The block that made them.
        keys: Rows and columns of what the block gets.
        unroll: Sorts what it gives, row by row, as the next block expects it.
    """

    reroll: Any
    block: int
    keys: tuple[int, ...]
    unroll: Unroll


def order_of(model: nn.Module, path: str) -> Unrolled:
    """The order of what the attention at a path of a model gets, and of what it gives."""
    root, _, rest = path.rpartition("blocks.")
    reroll: Any = model.get_submodule(root.rstrip(".")).reroll
    block = int(rest.split(".")[0])
    before = max(block - 1, 0)
    schedule, size = reroll.schedule[block]
    return Unrolled(reroll, before, tuple(reroll.schedule[before][1]), Unroll(tuple(size), (1, 1), schedule))


class MaskUnits:
    """Hiera's `MaskUnitAttention`: windows or the whole map, and where a stage begins the maxima of queries."""

    visattn_site: Swapped

    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        """As the module's own forward."""
        site: Swapped = self.visattn_site
        order: Unrolled | None = site.order
        whole = order is None or x.shape[1] == math.prod(order.keys)
        if site.keeps_stock(None if whole else "a mask drops tokens, and the rest is no grid") or order is None:
            return super().forward(x)  # type: ignore[misc]
        layout = between(order.unroll.size, order.keys)
        if not self.use_mask_unit_attn and site.runs_own(layout, (self.heads, self.head_dim), x):
            return super().forward(x)  # type: ignore[misc]
        q, k, v = project(self, order.reroll(x, order.block).flatten(1, 2), self.heads)
        grid = order.unroll.size
        if self.q_stride > 1:
            strides = [n // m for n, m in zip(order.keys, grid, strict=True)]
            pooled = F.max_pool2d(q.transpose(2, 3).flatten(0, 1).unflatten(2, order.keys), strides)
            q = pooled.flatten(2).unflatten(0, (-1, self.heads)).transpose(2, 3)
        y = site.attend(q, k, v, layout, self.scale).transpose(1, 2).flatten(2)
        return self.proj(order.unroll(y))
