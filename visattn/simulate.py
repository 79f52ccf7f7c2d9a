"""What a pattern costs on a layout before anything runs, and which stride and tile make it cost less."""

from __future__ import annotations

import dataclasses
import itertools
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from visattn.layout import Layout
from visattn.patterns import Neighborhood, Pattern, RoutedPattern, SharingPattern, parse
from visattn.patterns.values import whole_number
from visattn.plans import Tile, TilePlan, check_listed, plan

Box = tuple[int, ...]

# Tiles of fewer tokens leave matrix units idle; larger ones do not fit the fast memory of a core.
SMALLEST_TILE, LARGEST_TILE = 16, 256
SIDES = (1, 2, 4, 8, 16, 32, 64)


@dataclass(frozen=True)
class Simulation:
    """What a pattern visits on a layout with one choice of tiles.

    Attributes:
        pattern: The pattern's text.
        grid: Tokens per axis.
        prefix: Dense tokens before the grid.
        suffix: Dense tokens after the grid.
        query_tile: Box of tokens per query tile.
        key_tile: Box of tokens per key tile.
        density: Visible share of all (query, key) pairs.
        flop_bound: How many times fewer operations than dense attention the visible pairs need.
        tile_bound: The same for the visited tiles, empty slots of short tiles included.
        full_share: Share of the visited tile pairs that need no mask.
        query_tiles: Number of query tiles.
        key_tiles: Number of key tiles.
        visited: Visited pairs of tiles.
        masks: Distinct partial masks.
        planning_seconds: Time that making the plan took (next to none if it was cached).
        note: Which of these numbers depend on q and k, empty where none does.
        key_layout: Where the keys sit if they are other tokens than the queries, else empty.
    """

    pattern: str
    grid: Box
    prefix: int
    suffix: int
    query_tile: Box
    key_tile: Box
    density: float
    flop_bound: float
    tile_bound: float
    full_share: float
    query_tiles: int
    key_tiles: int
    visited: int
    masks: int
    planning_seconds: float
    note: str = ""
    key_layout: str = ""

    def to_dict(self) -> dict[str, Any]:
        """As JSON."""
        return dataclasses.asdict(self)


def simulate(pattern: Pattern | str, layout: Layout, tile: Tile | tuple[Tile, Tile] | None = None) -> Simulation:
    """Plan a pattern and count.

    Args:
        pattern: A pattern or its text.
        layout: The tokens.
        tile: As in `plan`.

    Raises:
        ValueError: If pattern, layout and tile do not fit together, or the pattern is no list of tiles.
    """
    pattern = parse(pattern)
    if isinstance(pattern, SharingPattern):
        return _shared(pattern, simulate(pattern.of, layout, tile))
    check_listed(pattern)
    start = time.perf_counter()
    made = plan(pattern, layout, tile)
    return _simulation(made, time.perf_counter() - start)


def _shared(pattern: SharingPattern, inside: Simulation) -> Simulation:
    """What a pattern visits that shares between steps: the mean over a refresh and the steps after it."""
    mean = f"means over {pattern.every} steps, of which one computes anew; tiles are those of {pattern.of}"
    return dataclasses.replace(
        inside,
        pattern=str(pattern),
        density=pattern.mean(inside.density, 1.0),
        flop_bound=1 / pattern.mean(1 / inside.flop_bound, 1.0),
        tile_bound=1 / pattern.mean(1 / inside.tile_bound, 1.0),
        note="; ".join(filter(None, (mean, inside.note))),
    )


def _simulation(made: TilePlan, seconds: float) -> Simulation:
    return Simulation(
        pattern=str(made.pattern),
        grid=made.layout.grid,
        prefix=made.layout.prefix,
        suffix=made.layout.suffix,
        key_layout="" if made.layout.key_layout is None else str(made.layout.key_layout),
        query_tile=made.queries.shape,
        key_tile=made.keys.shape,
        density=made.density,
        flop_bound=made.flop_bound,
        tile_bound=made.tile_bound,
        full_share=made.full_share,
        query_tiles=made.queries.tiles,
        key_tiles=made.keys.tiles,
        visited=made.entries,
        masks=len(made.masks),
        planning_seconds=seconds,
        note=made.pattern.estimated if isinstance(made.pattern, RoutedPattern) else "",
    )


@dataclass(frozen=True)
class Advice:
    """Strides and tiles that make a pattern cheaper.

    Attributes:
        now: The pattern as given.
        better: Choices whose grid part needs no mask at all ("fully block-sparse"), best first.
        reason: Where `better` is empty or changes the window: why.
    """

    now: Simulation
    better: tuple[Simulation, ...]
    reason: str = ""

    def to_dict(self) -> dict[str, Any]:
        """As JSON."""
        return dataclasses.asdict(self)


def advise(
    pattern: Pattern | str,
    layout: Layout,
    tile: Tile | tuple[Tile, Tile] | None = None,
    *,
    volume: int = 64,
    reach: int = 8,
    most: int = 5,
) -> Advice:
    """Search strides and tiles that make a neighborhood pattern fully block-sparse at the same window.

    A window is a whole number of key tiles for every query of a tile only where the stride is a multiple of the
    query tile, and the offset between window and stride falls on a key tile ("Generalized Neighborhood
    Attention", 2025, section 3). Tiles have power-of-two sides. If no choice does it, the nearest window that
    has one is proposed, and said to be another window.

    Args:
        pattern: A neighborhood pattern or its text.
        layout: The tokens; only the grid is searched, prefix and suffix are counted.
        tile: The tiles of `now`, as in `plan`.
        volume: Tokens per tile that suit the hardware; choices near it come first.
        reach: How far from the given window, per axis, another one is tried.
        most: How many choices to return.

    Raises:
        ValueError: If the pattern is no neighborhood pattern, or does not fit the layout.
    """
    volume, most = whole_number(volume, "volume", 1), whole_number(most, "most", 1)
    # Farther windows than the grid has tokens on an axis are none.
    reach = min(whole_number(reach, "reach", 0), max(layout.grid) if isinstance(layout, Layout) else 0)
    pattern = parse(pattern)
    now = simulate(pattern, layout, tile)
    if not isinstance(pattern, Neighborhood):
        raise ValueError(
            f"only na(...) has a stride to advise on; {pattern} has none: pass a window, or ask for no advice"
        )
    if layout.key_layout is not None:
        return Advice(now, (), "queries and keys are other tokens: advice is for one sequence")
    axes = pattern.axes(layout.grid)
    causal = [i for i, axis in enumerate(axes) if axis[3]]
    if causal:
        return Advice(now, (), f"axis {causal[0]} is causal: its diagonal always needs a mask")
    for distance in range(reach + 1):
        choices = [
            _axis_choices(n, axis, circular, distance)
            for n, axis, circular in zip(layout.grid, axes, pattern.rings(layout.grid), strict=True)
        ]
        found = list(_best(itertools.product(*choices), volume, most))
        if found:
            better = tuple(_build(pattern, layout, choice) for choice in found)
            changed = f"no tile fits this window: the nearest that has one is up to {distance} away" if distance else ""
            return Advice(now, better, changed)
    return Advice(
        now,
        (),
        f"no window within {reach} of this one is fully block-sparse: a power of two must divide "
        "the grid, the window and the offset between window and stride",
    )


@dataclass(frozen=True)
class _AxisChoice:
    window: int
    stride: int
    query: int
    key: int
    change: int
    other_stride: bool
    waste: float  # query slots per token: above 1 where the last tile is short


def _axis_choices(length: int, axis: tuple[int, int, int, bool], circular: bool, distance: int) -> list[_AxisChoice]:
    """Windows near this one with a stride and tile sides that need no mask on this axis."""
    window, own, dilation, _ = axis
    if window == length:
        windows = [window]
    else:
        windows = [w for d in range(distance + 1) for w in {window - d, window + d} if 0 < w * dilation <= length]
    best: dict[tuple[int, int], _AxisChoice] = {}
    for w, query, key in itertools.product(windows, SIDES, SIDES):
        if (query, key) in best or max(query, key) > length or length % key:
            continue
        finest = [1] if w == length else range(query, w + 1, query)
        for stride in (own, *finest):
            if _needs_no_mask(length, Neighborhood(w, stride, dilation, circular=circular), query, key):
                best[query, key] = _AxisChoice(
                    w, stride, query, key, abs(w - window), stride != own, -(-length // query) * query / length
                )
                break
    return list(best.values())


def _needs_no_mask(length: int, pattern: Neighborhood, query: int, key: int) -> bool:
    return plan(pattern, Layout(length), ((query,), (key,))).full_share == 1.0


def _best(choices: Iterator[tuple[_AxisChoice, ...]], volume: int, most: int) -> Iterator[tuple[_AxisChoice, ...]]:
    """Choices with useful tiles, one per volume: near the wanted volume or with the given stride, then fine strides."""

    def volumes(choice: tuple[_AxisChoice, ...]) -> tuple[int, int]:
        return math.prod(axis.query for axis in choice), math.prod(axis.key for axis in choice)

    def rank(choice: tuple[_AxisChoice, ...]) -> tuple[float, ...]:
        query, key = volumes(choice)
        far = abs(math.log2(query / volume)) + abs(math.log2(key / volume))
        # The given stride is worth a key tile of a quarter of the size.
        far += 2 * any(axis.other_stride for axis in choice)
        far += 4 * math.log2(math.prod(axis.waste for axis in choice))
        sides = [side for axis in choice for side in (axis.query, axis.key)]
        return sum(axis.change for axis in choice), far, math.prod(a.stride for a in choice), max(sides) / min(sides)

    useful = [c for c in choices if all(SMALLEST_TILE <= v <= LARGEST_TILE for v in volumes(c))]
    seen: set[tuple[int, int]] = set()
    for choice in sorted(useful, key=rank):
        if volumes(choice) not in seen:
            seen.add(volumes(choice))
            yield choice
        if len(seen) == most:
            return


def _build(pattern: Neighborhood, layout: Layout, choice: tuple[_AxisChoice, ...]) -> Simulation:
    def sides(name: str) -> Box:
        return tuple(getattr(axis, name) for axis in choice)

    changed = dataclasses.replace(pattern, window=sides("window"), stride=sides("stride"))
    return simulate(changed, layout, (sides("query"), sides("key")))
