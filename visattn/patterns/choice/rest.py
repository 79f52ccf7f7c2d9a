"""What the blocks that a query block does not list give it: one pooled key each."""

from __future__ import annotations

from typing import NamedTuple

import torch

from visattn.layout import Layout
from visattn.operands import wide_dtype
from visattn.patterns.choice.blocks import Blocks, block_tokens, inner
from visattn.patterns.choice.pooling import sums
from visattn.patterns.routes import Routes


class Pooled(NamedTuple):
    """Keys and values with the means of all blocks behind them.

    Attributes:
        k: [B, S + blocks, Hkv, D].
        v: [B, S + blocks, Hkv, D].
        weight: Logarithm of the number of tokens of each block, -inf where none is valid: [1 or B, blocks].
    """

    k: torch.Tensor
    v: torch.Tensor
    weight: torch.Tensor


def append_means(
    k: torch.Tensor, v: torch.Tensor, layout: Layout, blocks: Blocks, key_mask: torch.Tensor | None
) -> Pooled:
    """Put the mean key and value of the valid tokens of each block behind the others; differentiable."""
    at = inner(layout)
    wide = wide_dtype(k)
    if key_mask is None:
        count = block_tokens(blocks.grid, blocks.keys, k.device)[None].to(wide)
    else:
        valid = key_mask[:, at].to(wide)[..., None, None]
        count = sums(valid, blocks.grid, blocks.keys)[..., 0, 0, 0]
    found = []
    for x in (k, v):
        own = x[:, at] if key_mask is None else x[:, at].masked_fill(~key_mask[:, at, None, None], 0)
        mean = sums(own, blocks.grid, blocks.keys)[:, :, 0] / count.clamp(min=1)[..., None, None]
        found.append(torch.cat([x, mean.to(x.dtype)], 1))
    return Pooled(found[0], found[1], count.log())


def rest_weights(weight: torch.Tensor, choice: Routes) -> torch.Tensor:
    """What is added to the scores of pooled keys: the weight of those that a block does not list, else -inf.

    Args:
        weight: As in `Pooled`.
        choice: Key blocks of each query block.

    Returns:
        [B, G, query blocks, blocks].
    """
    listed = choice.mask(0, weight.shape[1])
    return weight[:, None, None].expand(listed.shape).masked_fill(listed, float("-inf"))
