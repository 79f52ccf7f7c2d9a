"""Dense attention: every token sees every token."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from visattn.patterns.geometry import Bools, Spans, TilePairs, product_mask, product_pairs
from visattn.patterns.kinds import StaticPattern
from visattn.tiling import Tiling


def full_span(length: int) -> Spans:
    """An axis on which every query sees every key."""
    return Spans(np.zeros(length, np.int64), np.full(length, length))


@dataclass(frozen=True)
class Dense(StaticPattern):
    """Plain softmax attention over all tokens (Vaswani et al. 2017, section 3.2.1)."""

    name: ClassVar[str] = "dense"

    def check(self, grid: tuple[int, ...]) -> None:
        """Any grid is fine."""

    def covers(self, grid: tuple[int, ...]) -> bool:
        """Always."""
        return True

    def grid_mask(self, grid: tuple[int, ...]) -> Bools:
        """All True."""
        return product_mask([full_span(n) for n in grid])

    def tile_pairs(self, grid: tuple[int, ...], queries: Tiling, keys: Tiling) -> TilePairs:
        """Every pair of tiles."""
        return product_pairs([full_span(n) for n in grid], queries, keys)
