"""Swapped attention of timm's Hiera, whose tokens are sorted by the pooling that its later stages do.

They are brought into rows and columns for a pattern, and back.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from timm.models.hiera import Unroll
from torch import nn

from visattn.layout import Layout
from visattn.models.swap.runtime import Swapped
from visattn.models.swap.tokens import project


class Unrolled(NamedTuple):
    """How the tokens of a block are sorted.

    Attributes:
        reroll: Of the model.
        block: The block that made them.
        unroll: Sorts tokens that come row by row as they are.
    """

    reroll: Any
    block: int
    unroll: Unroll


def order_of(model: nn.Module, path: str) -> Unrolled:
    """The order of what the attention at a path of a model gets."""
    root, _, rest = path.rpartition("blocks.")
    reroll: Any = model.get_submodule(root.rstrip(".")).reroll
    block = max(int(rest.split(".")[0]) - 1, 0)
    schedule, size = reroll.schedule[block]
    return Unrolled(reroll, block, Unroll(tuple(size), (1, 1), schedule))


class MaskUnits:
    """Hiera's `MaskUnitAttention`: windows or the whole map."""

    visattn_site: Swapped

    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        """As the module's own forward."""
        site: Swapped = self.visattn_site
        order: Unrolled | None = site.order
        whole = order is None or x.shape[1] == math.prod(order.unroll.size)
        if site.keeps_stock(None if whole else "a mask drops tokens, and the rest is no grid") or order is None:
            return super().forward(x)  # type: ignore[misc]
        q, k, v = project(self, order.reroll(x, order.block).flatten(1, 2), self.heads)
        y = site.attend(q, k, v, Layout(order.unroll.size), self.scale).transpose(1, 2).flatten(2)
        return self.proj(order.unroll(y))


def pools_queries(module: Any) -> str:
    """Why a module of Hiera cannot be swapped, "" if it can."""
    return "its keys are on another grid than its queries" if module.q_stride > 1 else ""
