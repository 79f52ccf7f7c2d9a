"""Which dynamic patterns have query blocks so small that some share a tile, and the pattern that cuts such tiles."""

from __future__ import annotations

import math

from visattn.keep import kept
from visattn.layout import Layout
from visattn.patterns.base import Pattern
from visattn.patterns.choice.merging import merged_box
from visattn.patterns.dynamic import DynamicPattern
from visattn.patterns.ordered import Carried

# Members of a tile list together as many blocks as one of them times their number to this power: 0.18 to 0.31 on
# queries and keys of the emoji model, for blocks of 1 to 16 tokens and tiles of 64.
UNION = 0.25


@kept
def sharing_tiles(pattern: Pattern, layout: Layout, small: int) -> Carried | None:
    """The query tiles that blocks of a pattern share, as a pattern with such blocks; None where blocks have their own.

    What it expects to be listed is what any block of a tile lists, by an estimate: neighbours want much the same.

    Args:
        pattern: The pattern.
        layout: The tokens.
        small: Tokens of a block that shares a tile at most, at which an engine gains by it.
    """
    if not isinstance(pattern, DynamicPattern) or isinstance(pattern, Carried):
        return None
    if type(pattern).route is not DynamicPattern.route or pattern.skip or pattern.pools_rest:
        return None
    blocks = pattern.blocks(layout.grid)
    box = merged_box(blocks, small)
    if box is None:
        return None
    members = math.prod(box) // math.prod(blocks.queries)
    union = min(1.0, pattern.expected(blocks) * members**UNION)
    sides = (box, blocks.keys) if isinstance(pattern.block, tuple) else (box[0], blocks.keys[0])
    return Carried(*sides, blocks.columns, union)
