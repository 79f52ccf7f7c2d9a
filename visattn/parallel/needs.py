"""What a rank needs of the others: which key rows its queries see, who has them, and which queries see them."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from visattn.keep import kept
from visattn.layout import Layout
from visattn.parallel.block_part import BlockPart
from visattn.parallel.parts import BallPart, Part, Rows, SpannedPart, spans_of
from visattn.parallel.slabs import Slabs, check_slabs
from visattn.patterns import (
    ComposedPattern,
    Dense,
    Linear,
    MergingPattern,
    Pattern,
    RoutedPattern,
    SpannedPattern,
    parse,
)
from visattn.patterns.clear import Clear
from visattn.patterns.geometry import Bools, Spans
from visattn.patterns.radial import Radial
from visattn.tiling import Ints

# Where a row of a buffer comes from: (rank, place among the rows that this rank sends), or None for a hidden row.
Source = tuple[int, int] | None


@dataclass(frozen=True, eq=False)
class Border:
    """Keys of other ranks in one stretch of rows, and the queries of this rank that see some of them.

    Attributes:
        part: The pattern between them.
        layout: Where queries and keys sit.
        first_query: First row of the queries in this rank's slab.
        queries: Their rows.
        sources: Where each key row comes from.
    """

    part: Part
    layout: Layout
    first_query: int
    queries: int
    sources: tuple[Source, ...]


@dataclass(frozen=True, eq=False)
class Needs:
    """What one rank computes, fetches and gives.

    Attributes:
        slabs: How the sequence is cut.
        rank: Whose.
        own: The pattern among its own tokens.
        borders: The rest.
        fetch: Rows of other ranks' slabs that it needs, by rank.
        give: Rows of its slab that others need, by rank.
    """

    slabs: Slabs
    rank: int
    own: Part
    borders: tuple[Border, ...]
    fetch: dict[int, tuple[int, ...]]
    give: dict[int, tuple[int, ...]]

    @property
    def fetched_tokens(self) -> int:
        """Key tokens that come from other ranks."""
        return self.slabs.row_tokens * sum(map(len, self.fetch.values()))

    @property
    def given_tokens(self) -> int:
        """Key tokens that go to other ranks, counted once for each."""
        return self.slabs.row_tokens * sum(map(len, self.give.values()))


def refusal(pattern: Pattern | str, slabs: Slabs) -> str:
    """Why a pattern cannot run on slabs, empty if it can; completes "PATTERN on slabs: ..."."""
    pattern = parse(pattern)
    check_slabs(slabs)
    if isinstance(pattern, RoutedPattern):
        return "its lists are computed from q and k, and say only then which keys are needed: use Ulysses"
    if isinstance(pattern, Linear):
        return "its feature map has parameters, of which no rank has a part: use elu or relu" * pattern.learnable
    if isinstance(pattern, MergingPattern | ComposedPattern):
        return "it is a composition whose parts read tokens of every rank, and no list of keys: use Ulysses"
    if isinstance(pattern, Clear):
        if pattern.pool is not None:
            return "its pooled keys are means of cells, which slabs cut: use Ulysses, or leave pool out"
        own = pattern.distances(slabs.layout.grid)[0][slabs.axis]
        if own.circular and bool((own.spans().stop - own.spans().start >= own.keys).all()):
            return f"its circle goes around the ring of axis {slabs.axis}, which is cut: cut another axis"
        return ""
    if isinstance(pattern, Radial):
        return "" if slabs.axis == 0 else "its blocks are of the flat sequence: cut axis 0, the frames"
    if isinstance(pattern, SpannedPattern | Dense):
        return ""
    return "it does not say which rows of an axis its queries see (spans, balls and radial blocks do): use Ulysses"


def check(pattern: Pattern, slabs: Slabs) -> None:
    """Raise a ValueError for a pattern that cannot run on slabs."""
    check_slabs(slabs)
    pattern.check(slabs.layout.grid)
    why = refusal(pattern, slabs)
    if why:
        raise ValueError(f"{pattern} on slabs of {slabs.layout}: {why}")


@dataclass(frozen=True, eq=False)
class Seen:
    """Which rows of the cut axis see which, unrolled.

    Attributes:
        rows: bool [rows, columns].
        first: Row of the first column.
        step: Distance of neighbouring rows of one dilation group.
    """

    rows: Bools
    first: int
    step: int


@kept
def rows_seen(pattern: Pattern, slabs: Slabs) -> Seen:
    """Which rows see which: row j where some query of row i sees some key of it."""
    number = slabs.rows
    if isinstance(pattern, Radial):
        # Tokens of a frame, a frame's blocks, and what those see.
        blocks = pattern.blocks(slabs.layout.grid)
        block = np.arange(slabs.layout.tokens) // pattern.block
        frame = np.arange(slabs.layout.tokens) // slabs.row_tokens
        of = np.zeros((number, len(blocks)), np.int64)
        of[frame, block] = 1
        return Seen(of @ blocks @ of.T > 0, 0, 1)
    if isinstance(pattern, Clear):
        axis = pattern.distances(slabs.layout.grid)[0][slabs.axis].spans()
    else:
        assert isinstance(pattern, SpannedPattern | Dense)
        axis = spans_of(pattern, slabs.layout.grid)[slabs.axis]
    return _unrolled(axis, number)


def _unrolled(axis: Spans, number: int) -> Seen:
    first, width = (-number, 3 * number) if axis.circular else (0, number)
    row = np.arange(number)[:, None]
    column = first + np.arange(width)
    position = column // axis.step
    same = row % axis.step == column % axis.step
    return Seen(same & (position >= axis.start[row]) & (position < axis.stop[row]), first, axis.step)


def halo_needs(pattern: Pattern | str, slabs: Slabs, rank: int) -> Needs:
    """What a rank computes, fetches and gives for a pattern.

    Args:
        pattern: The pattern or its text, which `refusal` lets pass.
        slabs: How the sequence is cut.
        rank: Whose needs.

    Raises:
        ValueError: If it cannot run on slabs, or ranks exchange sums instead of keys for it.
    """
    pattern = parse(pattern)
    check(pattern, slabs)
    if isinstance(pattern, Linear):
        raise ValueError(f"{pattern} on slabs fetches no keys: ranks exchange their states")
    return _needs(pattern, slabs, slabs.checked(rank))


@kept
def _needs(pattern: Pattern, slabs: Slabs, rank: int) -> Needs:
    seen = rows_seen(pattern, slabs)
    fetch = {other: rows for other, rows in _wanted(seen, slabs, rank).items() if other != rank}
    everybody = (r for r in range(slabs.ranks) if r != rank)
    give = {other: rows for other in everybody if (rows := _wanted(seen, slabs, other).get(rank))}
    start, size = slabs.start(rank), slabs.sizes[rank]
    rows = Rows(slabs.layout.grid, slabs.axis, start, size, start, size)
    # Dense tokens are everywhere; their queries count them on the first rank only.
    own = _part(pattern, rows, rank == 0 or not slabs.dense)
    return Needs(slabs, rank, own, tuple(_borders(pattern, slabs, rank, seen, fetch)), fetch, give)


def _wanted(seen: Seen, slabs: Slabs, rank: int) -> dict[int, tuple[int, ...]]:
    """The rows outside of its slab that a rank's queries see, by the rank that has them, counted in its slab."""
    found: dict[int, set[int]] = {}
    for column in _outside(seen, slabs, rank):
        owner, row = _owner(slabs, int(column))
        found.setdefault(owner, set()).add(row)
    return {owner: tuple(sorted(rows)) for owner, rows in sorted(found.items())}


def _outside(seen: Seen, slabs: Slabs, rank: int) -> Ints:
    """Unrolled rows outside of a rank's slab that its queries see."""
    start, stop = slabs.start(rank), slabs.start(rank) + slabs.sizes[rank]
    columns = np.flatnonzero(seen.rows[start:stop].any(0)) + seen.first
    return columns[(columns < start) | (columns >= stop)]


def _owner(slabs: Slabs, column: int) -> tuple[int, int]:
    """Who has an unrolled row, and which of its rows that is."""
    row = column % slabs.rows
    bounds = np.cumsum((0, *slabs.sizes))
    owner = int(np.searchsorted(bounds, row, "right")) - 1
    return owner, int(row - bounds[owner])


def _borders(pattern: Pattern, slabs: Slabs, rank: int, seen: Seen, fetch: dict[int, tuple[int, ...]]) -> list[Border]:
    """The stretches of foreign rows below and above a slab, and runs of query rows that all see some."""
    start, stop = slabs.start(rank), slabs.start(rank) + slabs.sizes[rank]
    outside = _outside(seen, slabs, rank)
    found = []
    for columns in (outside[outside < start], outside[outside >= stop]):
        if not len(columns):
            continue
        sees = np.asarray(seen.rows[start:stop, columns - seen.first].any(1))
        edges = np.flatnonzero(np.diff(np.concatenate([[0], sees.astype(int), [0]])))
        for first, end in pairwise(edges.tolist()):
            if sees[first]:
                found.append(_border(pattern, slabs, rank, seen, fetch, columns, first, end))
    return found


def _border(
    pattern: Pattern,
    slabs: Slabs,
    rank: int,
    seen: Seen,
    fetch: dict[int, tuple[int, ...]],
    columns: Ints,
    first: int,
    end: int,
) -> Border:
    """Query rows [first, end) of a slab and what they see of some foreign rows."""
    query = slabs.start(rank) + first
    columns = columns[seen.rows[query : query + end - first, columns - seen.first].any(0)]
    # The first key row is of the first query row's dilation group: hidden rows before it see to that.
    low = int(columns[0]) - int(columns[0] - query) % seen.step
    number = int(columns[-1]) + 1 - low
    there = set(columns.tolist())
    sources: list[Source] = []
    for column in range(low, low + number):
        owner, row = _owner(slabs, column)
        place = row if owner == rank else fetch[owner].index(row) if column in there else -1
        sources.append((owner, place) if column in there else None)
    rows = Rows(slabs.layout.grid, slabs.axis, query, end - first, low, number, int(columns[0]) - low)
    layout = Layout(rows.grids[0], key_layout=Layout(rows.grids[1]))
    return Border(_part(pattern, rows, True), layout, first, end - first, tuple(sources))


def _part(pattern: Pattern, rows: Rows, dense_pairs: bool) -> Part:
    if isinstance(pattern, Radial):
        return BlockPart(pattern, rows, dense_pairs)
    if isinstance(pattern, Clear):
        return BallPart(pattern, rows, dense_pairs)
    assert isinstance(pattern, SpannedPattern | Dense)
    return SpannedPart(pattern, rows, dense_pairs)
