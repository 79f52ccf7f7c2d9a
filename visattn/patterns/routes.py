"""Lists of key tiles that are found from q and k at run time, per head and of different length."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    import torch


class Routes(NamedTuple):
    """The key tiles that each grid query tile visits.

    Attributes:
        tiles: int64 or int32 [B, G, query tiles, n] with G one of 1, key heads, query heads: who shares a list. Indices
            over all tiles of the key side, without duplicates.
        counts: How many entries of each list count, [B, G, query tiles]; what lies behind them is some tile and
            means nothing. None where all n do.
    """

    tiles: torch.Tensor
    counts: torch.Tensor | None = None

    @property
    def groups(self) -> int:
        """Lists per sample, G."""
        return self.tiles.shape[1]

    def listed(self) -> torch.Tensor | None:
        """Which entries count: bool [B, G, query tiles, n], None where all do."""
        import torch

        if self.counts is None:
            return None
        return torch.arange(self.tiles.shape[3], device=self.tiles.device) < self.counts[..., None]

    def flat(self) -> Routes:
        """The same lists with one group per sample: [B * G, 1, query tiles, n]."""
        counts = None if self.counts is None else self.counts.flatten(0, 1)[:, None]
        return Routes(self.tiles.flatten(0, 1)[:, None], counts)

    def mask(self, first: int, tiles: int) -> torch.Tensor:
        """Which of `tiles` key tiles, counted from tile `first`, are listed: bool [B, G, query tiles, tiles]."""
        import torch

        listed, tiles_from_first = self.listed(), self.tiles.long() - first
        # One column more, into which what does not count is written.
        column = tiles_from_first if listed is None else tiles_from_first.masked_fill(~listed, tiles)
        seen = torch.zeros(*self.tiles.shape[:3], tiles + 1, dtype=torch.bool, device=self.tiles.device)
        # With a tensor of ones: torch.jit.trace finds no operator for a bool.
        return seen.scatter(3, column, torch.ones_like(column, dtype=torch.bool))[..., :tiles]


def lists_of(mask: torch.Tensor, most: int) -> Routes:
    """The marked tiles of each row, in their order.

    Args:
        mask: bool [B, G, rows, tiles].
        most: Marked tiles that a row has at most.
    """
    import torch

    # Each mark goes to its place in the list; what is not marked goes behind the end. No sorting.
    place = mask.cumsum(-1, dtype=torch.int32)
    column = torch.where(mask, place - 1, most).long()
    index = torch.arange(mask.shape[3], device=mask.device).expand(mask.shape)
    found = torch.zeros(*mask.shape[:3], most + 1, dtype=torch.int64, device=mask.device)
    return Routes(found.scatter(3, column, index)[..., :most], place[..., -1].long())
