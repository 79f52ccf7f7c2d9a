"""What heads list together: shared scores, forced and reachable blocks, guards, and lists of all heads."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch

from visattn.patterns.choice.alike import Alike
from visattn.patterns.choice.always import always_on, terms_of
from visattn.patterns.choice.blocks import Blocks
from visattn.patterns.choice.causal import reachable_on
from visattn.patterns.choice.picks import Seen
from visattn.patterns.routes import Routes


class Picker(Protocol):
    """What of a `DynamicPattern` says which scores are listed."""

    always: str | None
    per: str

    def least_listed(self, blocks: Blocks) -> int:
        """Key blocks that a query block lists at least."""
        ...

    def marked(
        self,
        scores: torch.Tensor,
        seen: Seen,
        forced: torch.Tensor | None,
        blocks: Blocks,
        variance: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Which key blocks are listed, what is forced included."""
        ...


def marked_for(
    pattern: Picker,
    scores: torch.Tensor,
    which: slice,
    seen: Seen,
    blocks: Blocks,
    guard: Alike | None,
    share: int,
    variance: torch.Tensor | None,
) -> torch.Tensor:
    """What a pattern lists of what heads may see: `marked`, where they share a choice or a budget, or have a guard.

    Args:
        pattern: The pattern.
        scores: Of some heads [B, h, rows, columns].
        which: Those heads.
        seen: Which blocks take part.
        blocks: The blocks of one head.
        guard: Blocks whose tokens differ too much for a mean, or None.
        share: Heads that share one choice.
        variance: Of the scores of each row, if they do not tell it themselves.
    """
    forced, reach = always_on(terms_of(pattern.always), blocks, scores.device), reachable_on(blocks, scores.device)
    if share > 1:
        scores = scores.unflatten(1, (-1, share)).mean(2)
    if reach is not None:
        # What nobody may see competes for nothing, and is not listed to fill a budget up.
        scores, forced = scores.masked_fill(~reach, float("-inf")), None if forced is None else forced & reach
        seen = Seen(seen.rows, seen.columns, reach)
    if forced is not None and seen.columns is not None:
        # Padding takes no place of what may be listed.
        forced = forced & seen.columns[:, None, None]
    if guard is not None:
        scores = scores.masked_fill(~guard.columns[:, which, None], float("-inf"))
        found = pattern.marked(scores, seen, forced, blocks, variance) | guard.forced(which)
    elif pattern.per != "all":
        found = pattern.marked(scores, seen, forced, blocks, variance)
    else:
        # The rows of all heads are those of one.
        heads = scores.shape[1]
        rows = None if seen.rows is None else seen.rows.repeat(1, heads)
        forced = None if forced is None else torch.cat([forced] * heads, -2)
        every = None if reach is None else reach.repeat(heads, 1)
        joined = pattern.marked(scores.flatten(1, 2)[:, None], Seen(rows, seen.columns, every), forced, blocks)
        found = joined.view(scores.shape)
    return found if reach is None else found & reach


def joined_heads(pattern: Picker, found: Sequence[Routes], blocks: Blocks, heads: int, share: int) -> Routes:
    """Lists of some heads after the other as those of all query heads, or of one group."""
    tiles = torch.cat([routes.tiles for routes in found], 1)
    counts: torch.Tensor | None = torch.cat([r.counts for r in found if r.counts is not None], 1)
    if pattern.least_listed(blocks) == tiles.shape[3] and not any(blocks.causal):
        counts = None
    if 1 < share < heads:
        tiles = tiles.repeat_interleave(share, 1)
        counts = None if counts is None else counts.repeat_interleave(share, 1)
    return Routes(tiles, counts)
