"""Patterns as pictures: what one query sees on the grid, and the map of visited tiles."""

from __future__ import annotations

import math

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from visattn.canvas import GAP, Picture, Swatch, column, legend, row, text
from visattn.given import said
from visattn.layout import Layout, check_layout
from visattn.patterns import Agent, Dense, DynamicPattern, Pattern, RoutedPattern, Routes, SharingPattern, parse
from visattn.patterns.values import is_axes, whole_numbers
from visattn.plans import Tile, TilePlan, check_listed, plan, with_routes

SKIPPED, WASTED, PARTIAL, FULL, QUERY = range(5)
COLORS = np.array([(233, 235, 238), (250, 213, 165), (104, 165, 222), (27, 82, 150), (214, 39, 40)], np.uint8)
LINE = (255, 255, 255)


def query_view(made: TilePlan, token: int) -> NDArray[np.uint8]:
    """What the query in sequence row `token` sees and what its tile computes: one state per key [S].

    SKIPPED, WASTED (its tile computes the pair and masks it), PARTIAL (visible, in a tile that needs a mask),
    FULL (visible, in a tile that needs none) or QUERY.
    """
    tile, slot = (int(index[0]) for index in np.nonzero(made.queries.tokens == token))
    entries = slice(made.lists.start[tile], made.lists.start[tile + 1])
    state = np.full(made.keys.length, SKIPPED, np.uint8)
    for key, mask in zip(made.lists.tile[entries], made.lists.mask[entries], strict=True):
        tokens = made.keys.tokens[key]
        valid = tokens >= 0
        seen = np.full(len(tokens), FULL) if mask < 0 else np.where(made.masks[mask][slot], PARTIAL, WASTED)
        state[tokens[valid]] = seen[valid]
    return state


def tile_map(made: TilePlan, shrink: int = 1) -> NDArray[np.float64]:
    """Share of skipped, partial and full pairs of tiles in squares of `shrink` x `shrink` pairs.

    Returns:
        [query tiles / shrink, key tiles / shrink, 3], both rounded up; the last axis sums to 1.
    """
    shape = tuple(-(-n // shrink) for n in (made.queries.tiles, made.keys.tiles))
    where = made.lists.rows // shrink * shape[1] + made.lists.tile // shrink
    counts = [
        np.bincount(where[(made.lists.mask < 0) == full], minlength=shape[0] * shape[1]) for full in (False, True)
    ]
    sides = [
        np.minimum(shrink, n - shrink * np.arange(m))
        for n, m in zip((made.queries.tiles, made.keys.tiles), shape, strict=True)
    ]
    pairs = np.outer(*sides)
    partial, full = (count.reshape(shape) / pairs for count in counts)
    return np.stack([1 - partial - full, partial, full], -1)


def draw(
    pattern: Pattern | str,
    layout: Layout,
    *,
    query: tuple[int, ...] | None = None,
    tile: Tile | tuple[Tile, Tile] | None = None,
) -> Image.Image:
    """A picture of a pattern: caption, the view of one query, the tile map, legends.

    Args:
        pattern: A pattern or its text.
        layout: The tokens.
        query: Grid position of the query, one index per axis; the middle if None.
        tile: As in `plan`.

    Raises:
        ValueError: If pattern, layout, query and tile do not fit together, or the pattern is neither a list of
            tiles nor agent.
    """
    pattern = parse(pattern)
    check_layout(layout)
    if isinstance(pattern, Agent):
        return _draw_agents(pattern, layout)
    shown = pattern.of if isinstance(pattern, SharingPattern) else pattern
    check_listed(shown)
    where = _check_query(query, layout.grid)
    made = plan(shown, layout, tile)
    if isinstance(shown, RoutedPattern):
        made = with_routes(made, _example_routes(shown, made))
    token = layout.prefix + int(np.ravel_multi_index(where, layout.grid))
    return column(
        [
            text(f"{pattern} on {layout}", size=22),
            text(_caption(made) + _note(pattern, shown)),
            row([_query_panel(made, token, where), _map_panel(made)], gap=3 * GAP),
        ],
        margin=2 * GAP,
    )


def _note(pattern: Pattern, shown: Pattern) -> str:
    """Lines about what the pictures do not show."""
    note = ""
    if isinstance(pattern, SharingPattern):
        note += f"\npicture and numbers are of {shown} alone; one step in {pattern.every} computes anew for the others"
    if isinstance(shown, RoutedPattern):
        own = "for each head on its own " if isinstance(shown, DynamicPattern) else ""
        what = "blocks" if own else "regions"
        note += f"\nwhich {what} are seen depends {own}on q and k: these are those of smooth random ones (seed 0)"
    if isinstance(shown, DynamicPattern) and shown.rest != "drop":
        rest = "the mean of each block that" if shown.pools_rest else "what"
        note += f"\n{rest} is not seen takes part too, by rest={shown.rest}"
    return note


def _example_routes(pattern: RoutedPattern, made: TilePlan) -> Routes:
    """Key tiles of each grid query tile for a random field that varies smoothly, as features of an image do."""
    layout = made.layout
    generator = torch.Generator().manual_seed(0)
    axes = [torch.linspace(-1, 1, n, dtype=torch.float64, device="cpu") for n in layout.grid]
    where = torch.stack(torch.meshgrid(*axes, indexing="ij"), -1).flatten(0, -2)
    waves = 3 * torch.randn(layout.dims, 16, generator=generator, dtype=torch.float64, device="cpu")
    features = torch.zeros(1, layout.length, 1, 16, dtype=torch.float64, device="cpu")
    phase = 6 * torch.rand(16, generator=generator, dtype=torch.float64, device="cpu")
    features[0, layout.prefix : layout.prefix + layout.tokens, 0] = torch.cos(where @ waves + phase)
    return pattern.route(features, features, made)


def _draw_agents(pattern: Agent, layout: Layout) -> Image.Image:
    """The cells of the grid that are pooled into one agent each, in two colours by turns."""
    pattern.check(layout.grid)
    index = np.indices(layout.grid)
    parity = sum(
        index[i] * a // n for i, (n, a) in enumerate(zip(layout.grid, pattern.shape(layout.grid), strict=True))
    )
    state = np.where(np.asarray(parity).ravel() % 2, PARTIAL, FULL).astype(np.uint8)
    count = pattern.count(layout.grid)
    caption = (
        f"every token reads every other through {count} agents: "
        f"{layout.length / (2 * count):.1f}x fewer operations than dense attention"
    )
    shared = any(n % a for n, a in zip(layout.grid, pattern.shape(layout.grid), strict=True))
    note = ", with the next token beyond a border that falls between two" * shared
    cells = legend(
        [Swatch(tuple(COLORS[FULL]), f"cells, dark and light by turns: the mean query of each is one agent{note}")]
    )
    whole = plan(Dense(), layout, layout.grid)
    return column(
        [text(f"{pattern} on {layout}", size=22), text(caption), _grid_view(whole, state), cells], margin=2 * GAP
    )


def _check_query(query: tuple[int, ...] | None, grid: tuple[int, ...]) -> tuple[int, ...]:
    if query is None:
        return tuple(n // 2 for n in grid)
    last, where = ",".join(str(n - 1) for n in grid), "x".join(map(str, grid))
    fix = f"is not on grid {where}: pass {len(grid)} indices up to {last}"
    try:
        found = whole_numbers(query, "query", 0) if is_axes(query) else None
    except ValueError:
        found = None
    if not isinstance(found, tuple) or len(found) != len(grid) or any(i >= n for i, n in zip(found, grid, strict=True)):
        given = ",".join(map(str, query)) if is_axes(query) else said(query)
        raise ValueError(f"query {given} {fix}")
    return found


def _caption(made: TilePlan) -> str:
    query, key = ("x".join(map(str, box.shape)) for box in (made.queries, made.keys))
    tiles = f"tiles of {query}" if query == key else f"query tiles of {query}, key tiles of {key}"
    return (
        f"density {made.density:.2%}: at most {made.flop_bound:.1f}x fewer operations than dense attention, "
        f"{made.tile_bound:.1f}x by {tiles} tokens\n"
        f"{made.full_share:.0%} of the visited tile pairs need no mask; {len(made.masks)} distinct masks"
    )


def _query_panel(made: TilePlan, token: int, where: tuple[int, ...]) -> Picture:
    layout = made.layout.keys
    state = query_view(made, token)
    sees = int(np.isin(state, (PARTIAL, FULL)).sum())
    if made.layout.key_layout is None:
        state[token] = QUERY
    grid = state[layout.prefix : layout.prefix + layout.tokens]
    rows = [text(f"Query {','.join(map(str, where))} sees {sees} of {made.keys.length} tokens", size=17)]
    view = _grid_view(made, grid)
    if layout.prefix:
        rows.append(_dense_bar("prefix", state[: layout.prefix], view.width))
    rows.append(view)
    if layout.suffix:
        rows.append(_dense_bar("suffix", state[layout.length - layout.suffix : layout.length], view.width))
    if made.keys.extra:
        rows.append(_dense_bar("pooled keys", state[layout.length :], view.width))
    names = ("not computed", "computed and masked", "seen, tile with a mask", "seen, tile without a mask", "the query")
    used = [i for i in (QUERY, FULL, PARTIAL, WASTED, SKIPPED) if (state == i).any()]
    rows.append(legend([Swatch(tuple(COLORS[i]), names[i]) for i in used]))
    return column(rows)


def _grid_view(made: TilePlan, state: NDArray[np.uint8]) -> Picture:
    """The grid's states as cells, tile borders as lines; the frames of a 3-D grid in rows of pictures."""
    grid = made.layout.keys.grid
    frames, height, width = (1,) * (3 - len(grid)) + grid
    if len(grid) == 1:
        # A long line is folded like text.
        width = min(grid[0], 2 ** math.ceil(math.log2(math.sqrt(grid[0])) + 1))
        height = -(-grid[0] // width)
    cell = max(2, min(28, _room(frames) // max(height, width)))
    owner = _owners(made)
    pictures: list[Picture] = []
    for t in range(frames):
        size = height * width
        cells = _padded(state[t * size : (t + 1) * size], size).reshape(height, width)
        tiles = _padded(owner[t * size : (t + 1) * size], size).reshape(height, width)
        image = _cells(cells, cell, tiles if cell >= 4 and max(made.keys.step) == 1 else None)
        _mark_query(image, cells, cell)
        pictures.append(column([text(f"frame {t}", size=12), image], gap=2) if frames > 1 else image)
    return row(pictures, wrap=1000, gap=GAP // 2) if frames > 1 else pictures[0]


def _mark_query(image: Image.Image, cells: NDArray[np.uint8], cell: int) -> None:
    """Draw the query larger than its cell where a cell is too small to be seen."""
    more = max(0, (7 - cell) // 2)
    for y, x in np.argwhere(cells == QUERY).tolist():
        box = (x * cell - more, y * cell - more, (x + 1) * cell + more, (y + 1) * cell + more)
        image.paste(tuple(COLORS[QUERY].tolist()), box)


def _room(frames: int) -> int:
    """Pixels for the longer side of a frame."""
    return 512 if frames == 1 else 240 if frames <= 8 else 160


def _padded(values: NDArray, size: int) -> NDArray:
    return np.pad(values, (0, size - len(values)), constant_values=255)


def _owners(made: TilePlan) -> NDArray[np.int64]:
    """Key tile of each grid token: [tokens]."""
    owner = np.empty(made.keys.length, np.int64)
    tokens = made.keys.tokens
    tile = np.broadcast_to(np.arange(len(tokens))[:, None], tokens.shape)
    owner[tokens[tokens >= 0]] = tile[tokens >= 0]
    keys = made.layout.keys
    return owner[keys.prefix : keys.prefix + keys.tokens]


def _cells(state: NDArray[np.uint8], cell: int, tiles: NDArray | None) -> Image.Image:
    """Square cells coloured by state (255: no cell), with a line between different tiles."""
    colors = np.full((*state.shape, 3), 255, np.uint8)
    colors[state < len(COLORS)] = COLORS[state[state < len(COLORS)]]
    pixels = colors.repeat(cell, 0).repeat(cell, 1)
    if tiles is not None:
        below = np.flatnonzero((tiles[1:] != tiles[:-1]).any(1)) + 1
        for y in below:
            cut = (tiles[y] != tiles[y - 1]).repeat(cell)
            pixels[y * cell, cut] = LINE
        for y in range(len(tiles)):
            cut = np.flatnonzero(tiles[y, 1:] != tiles[y, :-1]) + 1
            pixels[y * cell : (y + 1) * cell, cut * cell] = LINE
    return Image.fromarray(pixels)


def _dense_bar(name: str, state: NDArray[np.uint8], width: int) -> Picture:
    red, green, blue = COLORS[state[0]].tolist()
    color = (red, green, blue)
    bar = Image.new("RGB", (width, 22), color)
    label = text(
        f"{name}: {len(state)} token{'s' * (len(state) > 1)}", size=13, color=(255, 255, 255), background=color
    )
    bar.paste(label, (6, 3))
    return bar


def _map_panel(made: TilePlan) -> Picture:
    tiles = made.queries.tiles, made.keys.tiles
    # Where there are more tiles than pixels, a pixel mixes the colours of its tiles.
    shrink = -(-max(tiles) // 640)
    shares = tile_map(made, shrink)
    colors = (shares @ COLORS[[SKIPPED, PARTIAL, FULL]]).round().astype(np.uint8)
    cell = max(1, 512 // max(colors.shape[:2]))
    image = Image.fromarray(colors.repeat(cell, 0).repeat(cell, 1))
    full = int((made.lists.mask < 0).sum())
    total = tiles[0] * tiles[1]
    counts = (
        ("full", FULL, full),
        ("partial", PARTIAL, made.entries - full),
        ("skipped", SKIPPED, total - made.entries),
    )
    swatches = [Swatch(tuple(COLORS[i]), f"{name}: {count} ({count / total:.1%})") for name, i, count in counts]
    note = f"{tiles[0]} query tiles (down) x {tiles[1]} key tiles (across)"
    if shrink > 1:
        note += f", {shrink} x {shrink} per pixel"
    return column([text("Tile map", size=17), image, text(note, size=13), legend(swatches)])
