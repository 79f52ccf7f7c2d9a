"""Scores by sums along antidiagonals (XAttention): every row and column of a square of tokens is met once."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch

from visattn.operands import wide_dtype
from visattn.patterns.choice.blocks import Blocks, slot_places
from visattn.patterns.choice.causal import reachable_on
from visattn.patterns.choice.pooling import tokens_of_blocks
from visattn.patterns.choice.slices import Slices
from visattn.tiling import Ints


@dataclass(frozen=True, eq=False)
class Runs:
    """The runs of each block of one side; those that lie behind the end of the grid are none.

    Attributes:
        grid: Tokens per axis.
        box: Sides of a block.
        length: Tokens of a run.
        run: Run of each slot of a block `within` the grid.
        place: Place in its run of each slot.
        number: Runs.
    """

    grid: tuple[int, ...]
    box: tuple[int, ...]
    length: int
    run: Ints
    place: Ints
    number: int

    @classmethod
    def of(cls, grid: tuple[int, ...], box: tuple[int, ...], length: int) -> Runs:
        """The runs of blocks of a grid."""
        place = slot_places(grid, box)
        found, run = np.unique(place // length, return_inverse=True)
        return cls(grid, box, length, run, place % length, len(found))

    @property
    def cut(self) -> bool:
        """Whether blocks reach behind the end of the grid on some axis whatever block it is."""
        return len(self.run) < math.prod(self.box)

    def tokens(
        self, x: torch.Tensor, valid: torch.Tensor | None, met: Ints | None, turned: bool
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Tokens of the runs of each block, whose are there, and how many runs of a block have any.

        Args:
            x: Grid tokens [B, tokens, H, D].
            valid: Tokens that take part, bool [B, tokens], or None for all.
            met: Places of a run of keys that are asked for, ascending; None for all.
            turned: Whether runs begin with their last token.

        Returns:
            [B, H, blocks, runs, places * D], [B, blocks, runs, places] and [B, blocks].
        """
        wide = wide_dtype(x)
        there = torch.ones(x.shape[:2], dtype=torch.bool, device=x.device) if valid is None else valid
        own = x.masked_fill(~there[..., None, None], 0).to(wide)
        own = tokens_of_blocks(own, self.grid, self.box)
        there = tokens_of_blocks(there[..., None, None].to(wide), self.grid, self.box)[..., 0, 0]
        if met is None:
            own, there = (t.unflatten(2, (-1, self.length)) for t in (own, there))
            number = (there.sum(-1) > 0).sum(-1)
            own, there = (t.flip(3) for t in (own, there)) if turned else (own, there)
        else:
            inside = torch.from_numpy(self.run[:, None] == np.arange(self.number)).to(x.device)
            number = (there @ inside.to(wide) > 0).sum(-1)
            slots = torch.from_numpy(self._slots(met, turned)).to(x.device)
            own, there = (torch.cat([t, torch.zeros_like(t[:, :, :1])], 2)[:, :, slots] for t in (own, there))
        return own.permute(0, 4, 1, 2, 3, 5).flatten(4), there, number

    def _slots(self, met: Ints, turned: bool) -> Ints:
        """Slot of each place that is asked for, the one behind the last for none: [runs, places]."""
        table = np.full((self.number, len(met)), len(self.run))
        place = self.length - 1 - self.place if turned else self.place
        here = np.isin(place, met)
        table[self.run[here], np.searchsorted(met, place[here])] = np.flatnonzero(here)
        return table


def scores(
    length: int, q: torch.Tensor, k: torch.Tensor, blocks: Blocks, valid: torch.Tensor | None, slices: Slices
) -> Iterator[tuple[torch.Tensor, slice]]:
    """Logarithm of the share of a query block's runs that falls on each key block.

    A run is `length` tokens of a block in row-major order. Two runs meet in the mean of the products along their
    antidiagonal, of those pairs of which both tokens are valid; the softmax over all runs of keys is summed over the
    runs of a block on both sides. Runs without such a pair do not meet, and blocks none of whose runs meet score -inf:
    nothing says how much one holds of the other, and a rank among the scored ones would be made up. Picks put them
    behind all that have a score, and before padding.

    Args:
        length: Tokens of a run.
        q: Grid queries [B, tokens, H, D], times the factor on the logits.
        k: Grid keys [B, tokens, Hkv, D].
        blocks: The blocks.
        valid: Tokens that take part, bool [B, tokens], or None for all.
        slices: How many heads at a time.

    Yields:
        [B, some heads, rows, columns] and those heads.
    """
    # A query run is turned, so that a product of runs is the sum along the antidiagonal.
    sides = [Runs.of(*side, length) for side in blocks.sides]
    met = None
    if any(side.cut for side in sides):
        # Places of a run that no token of one side has add nothing.
        met = np.intersect1d(length - 1 - sides[0].place, sides[1].place)
    (query, query_there, runs), (keys, keys_there, _) = (
        sides[i].tokens(x, valid, met, turned=i == 0) for i, x in enumerate((q, k))
    )
    pairs = query_there.flatten(1, 2) @ keys_there.flatten(1, 2).transpose(1, 2)
    hidden = _later_runs(blocks, sides[0].number, sides[1].number, q.device)
    pairs = pairs if hidden is None else pairs.masked_fill(hidden, 0)
    runs = runs.clamp(min=1).to(query.dtype)
    (rows, each), (columns, others) = query.shape[2:4], keys.shape[2:4]
    query, keys = query.flatten(2, 3), keys.flatten(2, 3).transpose(2, 3)
    for some, head in slices.of(query, keys.shape[3], keys.shape[1]):
        found = (query[:, some] @ keys[:, head]) / pairs.clamp(min=1)[:, None]
        found = found.masked_fill((pairs == 0)[:, None], float("-inf"))
        # A run of padding meets nobody.
        share = found.softmax(-1).nan_to_num(0.0).unflatten(3, (columns, others)).unflatten(2, (rows, each))
        yield (share.sum((3, 5)) / runs[:, None, :, None]).log(), some


def _later_runs(blocks: Blocks, each: int, others: int, device: torch.device) -> torch.Tensor | None:
    """Runs of keys that come after a run of queries: bool [runs, runs]; None where no axis is causal."""
    reach = reachable_on(blocks, device)
    if reach is None:
        return None
    if not blocks.in_order:
        return ~reach.repeat_interleave(each, 0).repeat_interleave(others, 1)
    return torch.ones(blocks.rows * each, blocks.columns * others, dtype=torch.bool, device=device).triu(1)
