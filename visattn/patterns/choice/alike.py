"""SpargeAttn's guard: blocks whose tokens differ too much for a mean to stand for them."""

from __future__ import annotations

from typing import NamedTuple

import torch

from visattn.operands import repeated, wide_dtype
from visattn.patterns.choice.blocks import Blocks
from visattn.patterns.choice.pooling import means


class Alike(NamedTuple):
    """Which blocks are like their mean.

    Attributes:
        rows: Query blocks [B, H, rows].
        columns: Key blocks [B, H, columns].
    """

    rows: torch.Tensor
    columns: torch.Tensor

    def forced(self, some: slice) -> torch.Tensor:
        """What is listed because a mean says nothing about it, of some heads: bool [B, h, rows, columns]."""
        return ~self.rows[:, some, :, None] | ~self.columns[:, some, None]


def alike_blocks(q: torch.Tensor, k: torch.Tensor, blocks: Blocks, valid: torch.Tensor | None, bar: float) -> Alike:
    """Blocks whose tokens, as unit vectors, have more than `bar` as the mean product of all their pairs.

    Args:
        q: Grid queries [B, tokens, H, D].
        k: Grid keys [B, tokens, Hkv, D], as they are: the original may take the mean of all of them away before.
        blocks: The blocks.
        valid: Tokens that take part, bool [B, tokens], or None for all; a block without any is alike.
        bar: The least mean product.
    """
    wide = wide_dtype(q)
    found = []
    for x, (grid, box) in ((q, blocks.sides[0]), (k, blocks.sides[1])):
        mean, count = means(torch.nn.functional.normalize(x.to(wide), dim=-1), grid, box, 1, valid)
        # The mean of the whole matrix of products is the square of the mean vector.
        same = mean[:, :, 0].square().sum(-1).transpose(1, 2) > bar
        found.append(same | (count[:, None, :, 0] == 0))
    rows, columns = found
    return Alike(rows, repeated(columns, rows.shape[1], 1))
