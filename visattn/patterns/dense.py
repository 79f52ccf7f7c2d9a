"""Dense attention: every token sees every token."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from visattn.patterns.geometry import Bools, Spans, TilePairs, product_mask, product_pairs
from visattn.patterns.kinds import StaticPattern
from visattn.tiling import Tiling


def full_spans(grid: tuple[int, ...], keys: tuple[int, ...] | None = None) -> list[Spans]:
    """Axes on which every query sees every key."""
    return [Spans(np.zeros(n, np.int64), np.full(n, m), keys=m) for n, m in zip(grid, keys or grid, strict=True)]


@dataclass(frozen=True)
class Dense(StaticPattern):
    """Plain softmax attention over all tokens (Vaswani et al. 2017, section 3.2.1)."""

    name: ClassVar[str] = "dense"
    two_grids: ClassVar[bool] = True

    def check(self, grid: tuple[int, ...], keys: tuple[int, ...] | None = None) -> None:
        """Any grid is fine."""

    def covers(self, grid: tuple[int, ...], keys: tuple[int, ...] | None = None) -> bool:
        """Always."""
        return True

    def grid_mask(self, grid: tuple[int, ...], keys: tuple[int, ...] | None = None) -> Bools:
        """All True."""
        return product_mask(full_spans(grid, keys))

    def tile_pairs(self, grid: tuple[int, ...], queries: Tiling, keys: Tiling) -> TilePairs:
        """Every pair of tiles."""
        return product_pairs(full_spans(grid, keys.layout.grid), queries, keys)
