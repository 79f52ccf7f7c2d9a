"""Small query blocks that share a tile: the key blocks that any of them lists, and a bit for each block that does.

Blocks of a few tokens, a single one even, choose for themselves; a tile of queries that holds one block alone would be
nearly empty. So tiles hold as many neighbouring blocks as a word has bits, visit what any of them lists, and hide from
each row of queries what its own block does not.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import torch

from visattn.keep import kept
from visattn.patterns.choice.blocks import Blocks, Box, tiles_of_blocks, token_block_table
from visattn.patterns.kinds import Tiled
from visattn.patterns.routes import Routes, lists_of

# Bits of a word: query blocks that share a tile at most.
BITS = 64
# Marks of a step: the words of all heads at once would take eight times the memory.
STEP = 2**25


class Merged(NamedTuple):
    """What the query tiles of a plan visit whose blocks choose for themselves.

    Attributes:
        routes: Key tiles that any block of a query tile lists: [B, G, query tiles, n].
        words: Which blocks list each: int64 [B, G, query tiles, n], bit j is the tile's j-th block.
        slots: Bit of each slot of a query tile: int64 [slots].
    """

    routes: Routes
    words: torch.Tensor
    slots: torch.Tensor


def merged_box(blocks: Blocks, small: int) -> Box | None:
    """Sides of a tile of at most `BITS` tokens that holds whole query blocks; None where a block has a tile alone.

    Args:
        blocks: The blocks.
        small: Tokens of a block that shares a tile at most.
    """
    sides = [min(side, n) for side, n in zip(blocks.queries, blocks.grid, strict=True)]
    number = [1] * len(sides)
    # Doubling the shortest side that fits keeps tiles cube-like, and all smaller tiles in step with the blocks.
    while math.prod(sides) <= small or max(number) > 1:
        wide = [i for i, n in enumerate(blocks.grid) if 2 * number[i] * blocks.queries[i] <= n]
        if not wide or 2 * math.prod(sides) > BITS:
            break
        axis = min(wide, key=lambda i: (sides[i], -i))
        number[axis], sides[axis] = 2 * number[axis], 2 * sides[axis]
    return tuple(n * side for n, side in zip(number, blocks.queries, strict=True)) if max(number) > 1 else None


def merge(choice: Routes, plan: Tiled, blocks: Blocks) -> Merged:
    """What the query tiles of a plan visit.

    Args:
        choice: Key blocks of each query block: [B, G, rows, n].
        plan: A plan whose query tiles hold whole blocks, or parts of one.
        blocks: The blocks.
    """
    rows, slots = _members(plan, blocks, choice.tiles.device)
    tiles, members = rows.shape
    most = min(blocks.columns, members * choice.tiles.shape[3])
    (batch, groups), flat = choice.tiles.shape[:2], choice.flat()
    some = max(1, STEP // (tiles * members * blocks.columns))
    found = []
    for first in range(0, batch * groups, some):
        part = slice(first, first + some)
        own = Routes(flat.tiles[part], None if flat.counts is None else flat.counts[part])
        # One row more, of blocks that are not there.
        marks = torch.nn.functional.pad(own.mask(0, blocks.columns), (0, 0, 0, 1))[:, :, rows]
        bits = torch.arange(members, device=marks.device)[:, None]
        words = (marks.long() << bits).sum(-2)
        lists = lists_of(words != 0, most)
        found.append((lists.tiles, lists.counts, words.gather(3, lists.tiles)))
    joined = (torch.cat(each)[:, 0].unflatten(0, (batch, groups)) for each in zip(*found, strict=True))
    own_tiles, counts, words = joined
    routes, words = tiles_of_blocks(Routes(own_tiles, counts), plan, blocks, words)
    return Merged(routes, words, slots)


@kept
def _members(plan: Tiled, blocks: Blocks, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Query blocks of each grid tile [tiles, m], `blocks.rows` for none; which of the m each slot is in: [slots]."""
    queries = plan.queries
    slots, members = np.zeros(1, np.int64), 1
    for n, side, tile in zip(blocks.grid, blocks.queries, queries.shape, strict=True):
        inside = side >= n or side % tile == 0
        assert inside or tile % side == 0 or tile >= n, "tiles hold whole blocks, or parts of one"
        own = np.zeros(tile, np.int64) if inside else np.arange(tile) // side
        slots = (slots[:, None] * (own[-1] + 1) + own).ravel()
        members *= int(own[-1]) + 1
    tokens = queries.tokens[queries.grid_tiles]
    block = token_block_table(blocks.grid, blocks.queries)
    rows = np.full((len(tokens), members), blocks.rows)
    tile, slot = np.nonzero(tokens >= 0)
    rows[tile, slots[slot]] = block[tokens[tile, slot] - plan.layout.prefix]
    return torch.from_numpy(rows).to(device), torch.from_numpy(slots).to(device)
