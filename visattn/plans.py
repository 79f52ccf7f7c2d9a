"""Pattern + layout -> tile plan: the list of key tiles of each query tile, cached."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from visattn.given import counted, said
from visattn.keep import kept
from visattn.layout import Layout, check_layout
from visattn.memory import check_room
from visattn.patterns import (
    ComposedPattern,
    DynamicPattern,
    ListedPattern,
    Pattern,
    PooledPattern,
    RoutedPattern,
    Routes,
    SharingPattern,
    SpannedPattern,
    parse,
)
from visattn.patterns.choice.causal import later_slots
from visattn.patterns.geometry import Bools, TilePairs, check_pairs
from visattn.patterns.masks import check_defined
from visattn.patterns.values import as_text
from visattn.tiling import Ints, Tiling

Tile = int | tuple[int, ...]

# What a plan holds of a token of each side: where it sits, in the order of the tiles and while that is found.
TOKEN_BYTES = 24


@dataclass(frozen=True, eq=False)
class TileLists:
    """For each row tile a list of column tiles, as compressed rows.

    Attributes:
        start: Where the list of a row starts in `tile` and `mask`; the last value is their length: [rows + 1].
        tile: Column tiles: [entries].
        mask: Index into the plan's masks of each entry, -1 where the pair of tiles is fully visible: [entries].
    """

    start: Ints
    tile: Ints
    mask: Ints

    @property
    def counts(self) -> Ints:
        """Entries per row: [rows]."""
        return np.diff(self.start)

    @property
    def rows(self) -> Ints:
        """Row tile of each entry: [entries]."""
        return np.repeat(np.arange(len(self.start) - 1), self.counts)

    def where(self, partial: bool) -> TileLists:
        """Only the entries that need a mask (`partial`), or only those that do not."""
        keep = (self.mask >= 0) == partial
        counts = np.bincount(self.rows[keep], minlength=len(self.start) - 1)
        return TileLists(np.concatenate([[0], np.cumsum(counts)]), self.tile[keep], self.mask[keep])


@dataclass(frozen=True, eq=False, repr=False)
class TilePlan:
    """What a pattern visits on a layout, tile by tile; any backend can run it.

    Attributes:
        pattern: The pattern.
        layout: The tokens.
        queries: The query side cut in tiles.
        keys: The key side cut in tiles.
        lists: The key tiles of each query tile, fully visible ones first. Those of a routed pattern lack the grid
            key tiles of the grid query tiles, which `pattern.route` finds at run time.
        masks: The distinct partial masks: bool [masks, query slots, key slots]. Rows of empty query slots are
            arbitrary; columns of empty key slots are False.
        visible: Visible (query, key) pairs of tokens; of a routed pattern those of regions of average size.
        routed_tiles: Key tiles that `pattern.route` adds for each grid query tile.
    """

    pattern: ListedPattern
    layout: Layout
    queries: Tiling
    keys: Tiling
    lists: TileLists
    masks: Bools
    visible: int
    routed_tiles: int = 0

    def __repr__(self) -> str:
        """What it is in a line: the arrays of a plan are thousands of numbers."""
        boxes = [as_text(side.shape) for side in (self.queries, self.keys)]
        of = boxes[0] if boxes[0] == boxes[1] else ":".join(boxes)
        pairs = f"{self.entries} of {self.queries.tiles} x {self.keys.tiles} pairs"
        return (
            f"TilePlan({self.pattern} on {self.layout}: {pairs} of tiles of {of}, "
            f"{counted(len(self.masks), 'mask')}, density {self.density:.3g})"
        )

    @property
    def transposed(self) -> TileLists:
        """The query tiles of each key tile, fully visible ones first (for the backward over keys)."""
        return _transposed(self)

    @property
    def entries(self) -> int:
        """Visited pairs of tiles, routed ones included."""
        return len(self.lists.tile) + self.queries.runs[1] * self.routed_tiles

    @property
    def density(self) -> float:
        """Visible pairs over the pairs of dense attention, which has no extra keys."""
        return self.visible / self.layout.pairs

    @property
    def flop_bound(self) -> float:
        """How many times fewer operations than dense attention the visible pairs need."""
        return 1 / self.density

    @property
    def tile_bound(self) -> float:
        """How many times fewer operations than dense attention the visited tiles need."""
        slots = self.entries * self.queries.capacity * self.keys.capacity
        return self.layout.pairs / slots

    @cached_property
    def full_share(self) -> float:
        """Share of the visited tile pairs that need no mask."""
        listed = int((self.lists.mask < 0).sum())
        whole = float((self.keys.sizes[self.keys.grid_tiles] == self.keys.capacity).mean())
        routed = whole * self.queries.runs[1] * self.routed_tiles
        return (listed + routed) / self.entries if self.entries else 1.0


@kept
def _transposed(made: TilePlan) -> TileLists:
    return _lists(made.lists.tile, made.lists.rows, made.lists.mask, made.keys.tiles)


def check_listed(pattern: Pattern) -> None:
    """Raise a ValueError for a pattern that is not a list of tiles."""
    if not isinstance(pattern, ListedPattern):
        raise ValueError(f"{pattern} is a composition and no list of visible tiles: it has no mask to show or simulate")


def density_of(pattern: Pattern, layout: Layout) -> float | None:
    """Share of all (query, key) pairs that a pattern computes; of one that shares between steps the mean over them.

    None for a composed pattern that is no list of pairs.
    """
    if isinstance(pattern, SharingPattern):
        inside = density_of(pattern.of, layout)
        return None if inside is None else pattern.mean(inside, 1.0)
    return plan(pattern, layout).density if isinstance(pattern, ListedPattern) else None


def plan(pattern: Pattern | str, layout: Layout, tile: Tile | tuple[Tile, Tile] | None = None) -> TilePlan:
    """Cut a layout in tiles and list which key tiles each query tile visits.

    Plans are cached by everything they depend on: pattern, layout and tile.

    Args:
        pattern: A pattern or its text.
        layout: The tokens.
        tile: Box of grid tokens per tile, e.g. (8, 8), a pair of such boxes for queries and keys, or None for
            the pattern's choice.

    Returns:
        The plan, the same object for equal arguments.

    Raises:
        ValueError: If the pattern is not defined on the grid or the tile does not fit it.
    """
    pattern = parse(pattern)
    check_layout(layout)
    check_defined(pattern, layout)
    if not isinstance(pattern, ListedPattern):
        assert isinstance(pattern, ComposedPattern)
        raise ValueError(f"{pattern} has no tile plan: it is {pattern.instead(layout.grid)}")
    grids = (pattern.tiled_layout(layout.queries).grid, pattern.tiled_layout(layout.keys).grid)
    pair = tile if isinstance(tile, tuple) and len(tile) == 2 and isinstance(tile[0], tuple) else (tile, tile)
    boxes = tuple(pattern.tile(grid) if box is None else _box(box, grid) for box, grid in zip(pair, grids, strict=True))
    if isinstance(pattern, RoutedPattern):
        pattern.check_tiles(layout.grid, boxes[0], boxes[1])
    return _plan(pattern, layout, boxes[0], boxes[1])


def _box(tile: object, grid: tuple[int, ...]) -> tuple[int, ...]:
    box = (tile,) if isinstance(tile, int) else tile
    if (
        not isinstance(box, tuple)
        or len(box) != len(grid)
        or any(not isinstance(n, int) or isinstance(n, bool) or n < 1 for n in box)
    ):
        raise ValueError(f"tile={said(tile)} does not fit grid {grid}: pass {len(grid)} whole numbers of at least 1")
    return box


@kept
def _plan(pattern: ListedPattern, layout: Layout, query_box: tuple[int, ...], key_box: tuple[int, ...]) -> TilePlan:
    tokens = layout.length + layout.keys.length
    check_room(TOKEN_BYTES * tokens, f"planning {pattern} on {layout}", "take a smaller grid")
    tiled, tiled_keys = pattern.tiled_layout(layout.queries), pattern.tiled_layout(layout.keys)
    # Axes on which queries and keys differ are not dilated, and patterns with parts have one sequence.
    step = pattern.step(tiled.grid) if isinstance(pattern, SpannedPattern) else None
    parts = pattern.parts(tiled.grid) if isinstance(pattern, RoutedPattern) else None
    extra = pattern.extra_keys(layout.keys.grid) if isinstance(pattern, PooledPattern) else 0
    queries = Tiling(tiled, query_box, step, parts=parts)
    keys = Tiling(tiled_keys, key_box, step, extra, parts)
    pairs = pattern.tile_pairs(layout.grid, queries, keys)
    query, key, mask, masks = _with_dense_tokens(pairs, queries, keys, pattern.dense_pairs)
    visible = pairs.visible + _dense_token_pairs(layout, keys.extra, pattern.dense_pairs)
    lists = _lists(query, key, mask, queries.tiles)
    routed = pattern.routed_tiles(layout.grid, keys) if isinstance(pattern, RoutedPattern) else 0
    return TilePlan(pattern, layout, queries, keys, lists, masks, visible, routed)


def _dense_token_pairs(layout: Layout, extra: int, joined: bool = True) -> int:
    """Visible pairs that involve a prefix, suffix or extra token; `joined` says whether dense tokens see each other."""
    keys = layout.keys
    dense_queries, dense_keys = layout.prefix + layout.suffix, keys.prefix + keys.suffix
    return dense_queries * (keys.length if joined else keys.tokens) + layout.tokens * (dense_keys + extra)


def _with_dense_tokens(pairs: TilePairs, queries: Tiling, keys: Tiling, joined: bool) -> tuple[Ints, Ints, Ints, Bools]:
    """Add the visits of dense tokens to the grid's: query tile, key tile, mask per visit, and all masks.

    Grid tiles also visit every dense and extra tile; dense tiles visit everything but the extra tiles, and without
    `joined` the grid alone.
    """
    short, more = _validity(queries, keys)
    mask_of_key = np.where(short >= 0, short + len(pairs.masks), -1)
    key_index, query_index = np.arange(keys.tiles), np.arange(queries.tiles)
    grid_keys, grid_queries = key_index[keys.grid_tiles], query_index[queries.grid_tiles]
    dense_keys = np.setdiff1d(key_index, grid_keys)
    dense_queries = np.setdiff1d(query_index, grid_queries)
    plain_keys = key_index[: keys.tiles - keys.runs[3]] if joined else grid_keys
    # Tiles of one token leave tiles of the shorter regions empty.
    plain_keys = plain_keys[keys.sizes[plain_keys] > 0]
    filled_queries = grid_queries[queries.sizes[grid_queries] > 0]

    more_pairs = len(filled_queries) * len(dense_keys) + len(dense_queries) * len(plain_keys)
    check_pairs(len(pairs.query) + more_pairs, *queries.axes)
    query = [
        grid_queries[pairs.query],
        np.repeat(filled_queries, len(dense_keys)),
        np.repeat(dense_queries, len(plain_keys)),
    ]
    key = [grid_keys[pairs.key], np.tile(dense_keys, len(filled_queries)), np.tile(plain_keys, len(dense_queries))]
    mask = [pairs.mask, mask_of_key[key[1]], mask_of_key[key[2]]]
    used = np.unique(np.concatenate(mask))
    masks = np.concatenate([pairs.masks, more])
    used = used[used >= 0]
    renumber = np.full(len(masks) + 1, -1)
    renumber[used] = np.arange(len(used))
    return np.concatenate(query), np.concatenate(key), renumber[np.concatenate(mask)], masks[used]


def with_routes(made: TilePlan, routes: Routes, sample: int = 0, group: int = 0) -> TilePlan:
    """A routed pattern's plan with the lists that some q and k would give it, as a plan of a fixed pattern.

    Args:
        made: A plan of a routed pattern.
        routes: Key tiles of each grid query tile, as `pattern.route` finds them.
        sample: Whose lists.
        group: Which group of heads' lists.
    """
    short, more = _validity(made.queries, made.keys)
    tiles, listed = routes.tiles[sample, group].cpu().numpy(), routes.listed()
    keep = np.ones(tiles.shape, bool) if listed is None else listed[sample, group].cpu().numpy()
    tile = tiles[keep]
    row = np.repeat(np.arange(made.queries.tiles)[made.queries.grid_tiles], keep.sum(1))
    mask = np.where(short[tile] >= 0, short[tile] + len(made.masks), -1)
    masks = np.concatenate([made.masks, more])
    if isinstance(made.pattern, DynamicPattern) and made.pattern.blocks(made.layout.grid).in_order:
        mask, masks = _in_order(made, row, tile, mask, masks)
    old = made.lists
    joined = [np.concatenate(pair) for pair in ((old.rows, row), (old.tile, tile), (old.mask, mask))]
    lists = _lists(joined[0], joined[1], joined[2], made.queries.tiles)
    visible = int(made.queries.sizes[row] @ made.keys.sizes[tile]) + _dense_token_pairs(made.layout, made.keys.extra)
    return replace(made, lists=lists, masks=masks, visible=visible, routed_tiles=0)


def _in_order(made: TilePlan, row: Ints, tile: Ints, mask: Ints, masks: Bools) -> tuple[Ints, Bools]:
    """Masks of visits, and all masks, where the grid is a causal line: keys after a query are hidden besides."""
    queries, keys = made.queries.tokens, made.keys.tokens
    # Tiles behind the others are seen whole: most of them.
    first = np.where(queries >= 0, queries, queries.max(initial=0) + 1).min(1)
    cut = np.flatnonzero(keys.max(1)[tile] > first[row])
    everything = np.ones((1, *masks.shape[1:]), bool)
    seen = np.concatenate([masks, everything])[mask[cut]] & ~later_slots(queries[row[cut]], keys[tile[cut]])
    found, which = np.unique(seen, axis=0, return_inverse=True)
    mask = mask.copy()
    mask[cut] = len(masks) + which.ravel()
    return mask, np.concatenate([masks, found])


def _validity(queries: Tiling, keys: Tiling) -> tuple[Ints, Bools]:
    """Which key tiles are short: index into the masks of filled slots or -1: [tiles]; those masks [m, slots, slots]."""
    valid = keys.tokens >= 0
    index = np.full(keys.tiles, -1)
    rest = np.flatnonzero(~valid.all(1))
    masks, which = np.unique(valid[rest], axis=0, return_inverse=True)
    index[rest] = which.ravel()
    # A row is the same for every query slot.
    return index, np.broadcast_to(masks.reshape(-1, 1, keys.capacity), (len(masks), queries.capacity, keys.capacity))


def _lists(row: Ints, tile: Ints, mask: Ints, rows: int) -> TileLists:
    """Sort visits by row, fully visible first, then by tile: by one number of all three, a third of the time."""
    order = np.argsort((2 * row.astype(np.int64) + (mask >= 0)) * (tile.max(initial=0) + 1) + tile)
    start = np.concatenate([[0], np.cumsum(np.bincount(row, minlength=rows))])
    return TileLists(start, tile[order], mask[order])
