"""A pattern that was chosen on one grid, for another: windows, halos and radii keep their share of the axis."""

from __future__ import annotations

import dataclasses
import math
from functools import lru_cache
from typing import Any

from visattn.patterns import Clear, Halo, Neighborhood, Pattern, PerHead, SharingPattern
from visattn.patterns.perhead import Part
from visattn.patterns.values import per_axis

Grid = tuple[int, ...]


@lru_cache(maxsize=512)
def scaled(pattern: Pattern, grid: Grid, other: Grid) -> Pattern:
    """The pattern of a larger or smaller grid that stands for a pattern.

    A window of w of n tokens becomes w * m / n of m, rounded up to a multiple of its stride, or to an odd number where
    it is odd and has none; its stride, its dilation and the block of a halo are shapes of tiles and stay. Halos and
    radii are rounded up, a radius by the geometric mean of the axes. Shares (of blocks, of attention) hold on any grid,
    as do counts of agents or regions, and stay.

    Args:
        pattern: A pattern of `grid`.
        grid: Tokens per axis it was chosen on.
        other: Those of the other grid.

    Raises:
        ValueError: If the grids have different numbers of axes.
    """
    if len(grid) != len(other):
        raise ValueError(
            f"{pattern} was chosen on grid {_text(grid)}, which has other axes than {_text(other)}: choose one for that"
        )
    factors = [m / n for n, m in zip(grid, other, strict=True)]
    if isinstance(pattern, Neighborhood):
        rows = zip(pattern.axes(grid), other, factors, strict=True)
        return _with(pattern, window=tuple(_window(*axis, m, factor) for axis, m, factor in rows))
    if isinstance(pattern, Halo):
        halos = per_axis(pattern.halo, len(grid), "halo")
        return _with(pattern, halo=tuple(math.ceil(h * f - 1e-9) for h, f in zip(halos, factors, strict=True)))
    if isinstance(pattern, Clear):
        mean = math.prod(factors) ** (1 / len(factors))
        return _with(pattern, radius=max(1, math.ceil(pattern.radius * mean - 1e-9)))
    if isinstance(pattern, PerHead):
        heads: Any = tuple(Part(part.heads, scaled(part.pattern, grid, other)) for part in pattern.heads)
        return _with(pattern, heads=heads, rest=scaled(pattern.rest, grid, other))
    if isinstance(pattern, SharingPattern):
        return _with(pattern, of=scaled(pattern.of, grid, other))
    return pattern


def _window(window: int, stride: int, dilation: int, causal: bool, length: int, factor: float) -> int:
    wide = max(1, math.ceil(window * factor - 1e-9))
    if stride > 1:
        wide = -(-wide // stride) * stride
    elif window % 2 and not wide % 2:
        wide += 1
    return min(wide, length // dilation) if dilation > 1 else wide


def _with(pattern: Any, **changed: Any) -> Pattern:
    return dataclasses.replace(pattern, **changed)


def _text(grid: Grid) -> str:
    return "x".join(map(str, grid))
