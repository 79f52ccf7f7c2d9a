"""Patterns between a part of the rows of a grid and another part of them, as patterns of their own.

A part's queries are rows [first_query, first_query + queries) of the whole grid's cut axis, its keys rows [first_key,
first_key + keys) of the same axis. Rows are *unrolled*: on a ring, row -1 is the last one once more. Engines run parts
as they run any static pattern.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np

from visattn.patterns import Dense, SpannedPattern, StaticPattern
from visattn.patterns.balls import AxisDistance, ball_mask, ball_pairs
from visattn.patterns.clear import Clear
from visattn.patterns.dense import full_spans
from visattn.patterns.geometry import Bools, Spans, TilePairs
from visattn.tiling import Tiling


@dataclass(frozen=True)
class Rows:
    """Which rows of a grid a part has.

    Attributes:
        grid: The whole grid.
        axis: The axis that is cut.
        first_query: First row of the queries.
        queries: Their number.
        first_key: First row of the keys, unrolled.
        keys: Their number.
        hidden: So many of the keys' first rows are there to begin in a dilation group, and seen by nobody.
    """

    grid: tuple[int, ...]
    axis: int
    first_query: int
    queries: int
    first_key: int
    keys: int
    hidden: int = 0

    def side(self, rows: int) -> tuple[int, ...]:
        """The grid of so many rows."""
        return (*self.grid[: self.axis], rows, *self.grid[self.axis + 1 :])

    @property
    def grids(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The grid of the queries and that of the keys."""
        return self.side(self.queries), self.side(self.keys)


class Part(StaticPattern):
    """What parts have in common."""

    two_grids: ClassVar[bool] = True
    rows: Rows

    def check(self, grid: tuple[int, ...], keys: tuple[int, ...] | None = None) -> None:
        """Raise a ValueError if the grids are not those of the part."""
        if (grid, keys or grid) != self.rows.grids:
            raise ValueError(f"grids {grid} and {keys or grid} are not those of {self}: {self.rows.grids}")

    def covers(self, grid: tuple[int, ...], keys: tuple[int, ...] | None = None) -> bool:
        """No: lists are right also where every query sees every key."""
        return False


@dataclass(frozen=True)
class SpannedPart(SpannedPattern, Part):
    """A part of a pattern that is one interval of keys per axis.

    Attributes:
        whole: The pattern.
        rows: Which rows.
        dense_pairs: Whether dense tokens see each other here.
    """

    whole: SpannedPattern | Dense
    rows: Rows
    dense_pairs: bool = True

    name: ClassVar[str] = "part"

    def step(self, grid: tuple[int, ...]) -> tuple[int, ...]:
        """The pattern's."""
        return self.whole.step(self.rows.grid) if isinstance(self.whole, SpannedPattern) else (1,) * len(grid)

    def spans(self, grid: tuple[int, ...], keys: tuple[int, ...] | None = None) -> list[Spans]:
        """Those of the pattern; of the cut axis what lies among the keys."""
        found = spans_of(self.whole, self.rows.grid)
        found[self.rows.axis] = cut_spans(found[self.rows.axis], self.rows)
        return found

    def covers(self, grid: tuple[int, ...], keys: tuple[int, ...] | None = None) -> bool:
        """Whether every query sees every key; dense tokens that do not see each other need a list all the same."""
        return self.dense_pairs and all(axis.whole for axis in self.spans(grid))

    def tile(self, grid: tuple[int, ...], volume: int = 64) -> tuple[int, ...]:
        """The pattern's."""
        return self.whole.tile(grid, volume)


def spans_of(pattern: SpannedPattern | Dense, grid: tuple[int, ...]) -> list[Spans]:
    """The intervals of a pattern, or of dense attention."""
    return pattern.spans(grid) if isinstance(pattern, SpannedPattern) else full_spans(grid)


def cut_spans(spans: Spans, rows: Rows) -> Spans:
    """What of an axis's intervals lies in a part; its first query and key are in one dilation group."""
    step = spans.step
    query = np.arange(rows.queries)
    group = query % step
    # From positions in groups of the whole axis to those among the keys.
    shift = ((rows.first_query + query) % step - rows.first_key - group) // step
    members = -(-(rows.keys - group) // step)
    whole = rows.first_query + query
    first = -(-(rows.hidden - group) // step)
    start, stop = (np.clip(edge[whole] + shift, first, members) for edge in (spans.start, spans.stop))
    return Spans(start, np.maximum(start, stop), step, rows.keys)


@dataclass(frozen=True)
class BallPart(Part):
    """A part of a pattern that is all keys nearer than a radius.

    Attributes:
        whole: The pattern.
        rows: Which rows.
        dense_pairs: Whether dense tokens see each other here.
    """

    whole: Clear
    rows: Rows
    dense_pairs: bool = True

    name: ClassVar[str] = "part"

    def _axes(self) -> tuple[list[AxisDistance], int]:
        axes, limit = self.whole.distances(self.rows.grid)
        rows, own = self.rows, axes[self.rows.axis]
        centre = own.centre[rows.first_query : rows.first_query + rows.queries] - rows.first_key * own.unit
        axes[rows.axis] = replace(own, centre=centre, keys=rows.keys, circular=False)
        return axes, limit

    def grid_mask(self, grid: tuple[int, ...], keys: tuple[int, ...] | None = None) -> Bools:
        """Squared distance below the squared radius."""
        return ball_mask(*self._axes())

    def tile_pairs(self, grid: tuple[int, ...], queries: Tiling, keys: Tiling) -> TilePairs:
        """Tiles that the circles of a query tile touch."""
        return ball_pairs(*self._axes(), queries, keys)
