"""What the lists of a dynamic pattern do not take from q and k: tiles of blocks, their masks, fixed visits."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch

from visattn.keep import kept
from visattn.kernels.triton.lists.program import Program, fill_kinds, first_tokens, int32_table, pack, program
from visattn.patterns import DynamicPattern, Pattern
from visattn.patterns.choice.blocks import Blocks, block_of
from visattn.patterns.geometry import Bools
from visattn.plans import TilePlan
from visattn.tiling import Ints

# Key tiles of the grid up to which one program holds a list.
LONGEST = 16384


def lists_by_blocks(pattern: Pattern) -> bool:
    """Whether lists of a pattern are those that `DynamicPattern.choose` gives, key blocks for query blocks."""
    return isinstance(pattern, DynamicPattern) and type(pattern).route is DynamicPattern.route


def writes_lists(pattern: Pattern, plan: TilePlan) -> bool:
    """Whether the kernel `lists` writes the lists of a pattern: such lists, of tiles that fit in a program.

    Its masks are those of key tiles alone.
    """
    if not lists_by_blocks(pattern) or plan.keys.runs[1] > LONGEST:
        return False
    assert isinstance(pattern, DynamicPattern)
    return not pattern.blocks(plan.layout.grid).in_order


@dataclass(frozen=True, eq=False)
class Tables:
    """The tables of one plan.

    Attributes:
        base: The program of the dense tokens, with the masks of all lists; its grid rows visit no grid column yet.
        row_blocks: Query block of each grid query tile: int32 [tiles].
        first: First token of each key tile of each key block, -1 where it has fewer: int32 [blocks, per].
        masks: Mask of each of these, -1 for those that need none: int32 [blocks, per].
        blocks: Blocks of queries.
        filler: First token of a grid key tile.
        everything: Mask that hides nothing.
        nothing: Mask that hides everything.
        whole: Whether any of these tiles needs no mask.
        even: Whether all key blocks have as many tiles, none of which needs a mask.
    """

    base: Program
    row_blocks: torch.Tensor
    first: torch.Tensor
    masks: torch.Tensor
    blocks: int
    filler: int
    everything: int
    nothing: int
    whole: bool
    even: bool

    @property
    def per(self) -> int:
        """Key tiles of a block at most."""
        return self.first.shape[1]


@kept
def tables(plan: TilePlan, blocks: Blocks, per_step: int, device: torch.device) -> Tables:
    """The tables of a plan whose kernel takes so many key tiles at once, on a device."""
    base = program(plan, False, per_step, device)
    columns = base.column_tiling
    slots = base.columns // base.tiles
    kind, filled = fill_kinds(columns)
    more = np.concatenate([filled, np.ones((1, columns.capacity), bool), np.zeros((1, columns.capacity), bool)])
    rows = np.broadcast_to(more[:, None, :], (len(more), base.rows, columns.capacity))
    masks = torch.cat([base.masks, torch.from_numpy(pack(rows, base.rows, slots)).to(device)])
    whole = np.asarray(filled[kind].all(1) & (columns.capacity == slots))
    mask = np.where(whole, -1, kind + len(base.masks))
    tiles, inside = _tiles_of(block_of(plan.keys, blocks.keys), blocks.columns)
    tiles += columns.grid_tiles.start

    first = first_tokens(columns)
    everything = len(base.masks) + len(filled)
    return Tables(
        replace(base, masks=masks),
        int32_table(block_of(plan.queries, blocks.queries), device),
        int32_table(np.where(inside, first[tiles], -1), device),
        int32_table(mask[tiles], device),
        blocks.rows,
        int(first[columns.grid_tiles.start]),
        everything,
        everything + 1,
        bool((whole[tiles] & inside).any()),
        bool((whole[tiles] & inside).all()),
    )


def _tiles_of(block: Ints, blocks: int) -> tuple[Ints, Bools]:
    """Tiles of each block, from the block of each tile: [blocks, m], and which of them there are."""
    counts = np.bincount(block, minlength=blocks)
    order, first = np.argsort(block, kind="stable"), np.cumsum(counts) - counts
    slot = np.arange(counts.max())
    inside = slot < counts[:, None]
    return order[np.where(inside, first[:, None] + slot, first[:, None])], inside
