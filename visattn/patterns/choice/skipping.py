"""The test of an online softmax (BLASST, skip-softmax): listed blocks that hardly count are passed over."""

from __future__ import annotations

import math

import torch

from visattn.layout import Layout
from visattn.operands import wide_dtype
from visattn.patterns.choice.blocks import Blocks, inner
from visattn.patterns.choice.pooling import tokens_of_blocks
from visattn.patterns.choice.slices import Slices
from visattn.patterns.routes import Routes, lists_of


def refuse_gradients(pattern: object, q: torch.Tensor, k: torch.Tensor) -> None:
    """Raise a ValueError where queries or keys would have a gradient."""
    if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad):
        raise ValueError(
            f"{pattern}: what skip passes over depends on the order of the blocks and has no gradient: call it under "
            "torch.no_grad(), or leave skip out"
        )


def not_skipped(
    choice: Routes,
    q: torch.Tensor,
    k: torch.Tensor,
    layout: Layout,
    blocks: Blocks,
    key_mask: torch.Tensor | None,
    scale: float,
    below: float,
) -> Routes:
    """The lists without blocks that the test skips.

    Dense keys are met first, then the listed blocks in ascending order. A block is skipped if for every valid query of
    the block of queries its largest weight, relative to the largest so far (its own included), is less than `below`.
    The first block that is met is never skipped. What is skipped has counted for the largest so far.

    Args:
        choice: Key blocks of each query block.
        q: Queries [B, S, H, D].
        k: Keys [B, S, Hkv, D].
        layout: The tokens.
        blocks: The blocks of the grid.
        key_mask: bool [B, S], or None.
        scale: Factor on the logits.
        below: The largest weight that is skipped, as a share of the largest so far.
    """
    at, wide = inner(layout), wide_dtype(q)
    valid = torch.ones(q.shape[:2], dtype=torch.bool, device=q.device) if key_mask is None else key_mask
    heads, most = q.shape[2], choice.tiles.shape[3]
    queries, there = (
        tokens_of_blocks(x, blocks.grid, blocks.queries) for x in (q[:, at].to(wide) * scale, valid[:, at, None, None])
    )
    keys, keys_there = (
        tokens_of_blocks(x, blocks.grid, blocks.keys) for x in (k[:, at].to(wide), valid[:, at, None, None])
    )
    queries, keys = queries.permute(0, 3, 1, 2, 4), keys.permute(0, 3, 1, 2, 4).flatten(2, 3)
    dense = torch.cat([k[:, : at.start], k[:, at.stop :]], 1).to(wide).transpose(1, 2)
    dense_there = torch.cat([valid[:, : at.start], valid[:, at.stop :]], 1)
    listed = choice.mask(0, blocks.columns).expand(-1, heads, -1, -1)
    slots, found = queries.shape[3], []
    for some, head in Slices().of(queries.flatten(2, 3), keys.shape[2] + dense.shape[2], keys.shape[1]):
        rows = queries[:, some].flatten(2, 3)
        scores = (rows @ keys[:, head].transpose(2, 3)).unflatten(3, (blocks.columns, -1))
        scores = scores.masked_fill(~keys_there[:, None, None, :, :, 0, 0], -math.inf)
        own = listed[:, some].repeat_interleave(slots, 2)
        largest = scores.amax(-1).masked_fill(~own, -math.inf)
        text = (rows @ dense[:, head].transpose(2, 3)).masked_fill(~dense_there[:, None, None], -math.inf)
        start = torch.nn.functional.pad(text, (0, 1), value=-math.inf).amax(-1, keepdim=True)
        so_far = torch.maximum(largest.cummax(-1).values, start)
        small = largest - so_far < math.log(below)
        # Nothing was met, so nothing is skipped; what is no query has no say.
        small = small | ~there[..., 0, 0].flatten(1)[:, None, :, None]
        skipped = small.unflatten(2, (-1, slots)).all(3)
        found.append(listed[:, some] & ~skipped)
    return lists_of(torch.cat(found, 1), most)
