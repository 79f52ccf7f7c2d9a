"""Circular windows (CLEAR), with pooled keys for what lies outside, in one to three dimensions."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from visattn.patterns.balls import AxisDistance, ball_mask, ball_pairs, distances
from visattn.patterns.geometry import Bools, TilePairs
from visattn.patterns.kinds import PooledPattern
from visattn.patterns.values import PerAxis, aligned, check_many, flags, per_axis, whole_number, whole_numbers
from visattn.tiling import Tiling

if TYPE_CHECKING:
    import torch

# Tokens of a pooled cell, each of which has a weight, on any grid.
CELL = 2**24


@dataclass(frozen=True)
class Clear(PooledPattern):
    """Each query sees the keys nearer than `radius`, and the mean of every cell of the grid if `pool` is given.

    Source: Liu et al., "CLEAR: Conv-Like Linearization Revs Pre-Trained Diffusion Transformers Up" (2024),
    section 3.3 (circular window) and section 3.5 with the released code (pooled keys, one learnable weight per
    token of a cell: the `pool_weight` of `attention`).

    Where a cell is cut by the border, its weights are scaled up by slots over tokens, so the mean stays a mean.

    Attributes:
        radius: Euclidean distance in tokens that a key must stay below; 1 is the query itself.
        pool: Tokens of a pooled cell per axis (-1 is the whole axis), None for no pooled keys.
        circular: Whether that axis wraps around: distances there are the shorter way round. Pooled cells do not wrap.

    Where keys are on a grid of their own, distances are in keys, from the query's centre: both grids span the same
    extent, and an axis of n queries and m keys has its query i at key (i + 0.5) * m / n - 0.5.

    Raises:
        ValueError: If a parameter is out of range, here or on the grid it is used with.
    """

    radius: int
    pool: PerAxis | None = None
    circular: bool | tuple[bool, ...] = False

    name: ClassVar[str] = "clear"
    two_grids: ClassVar[bool] = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "radius", whole_number(self.radius, "radius", 1, "the window is a circle"))
        if self.pool is not None:
            object.__setattr__(self, "pool", whole_numbers(self.pool, "pool", 1, also=(-1,)))
        object.__setattr__(self, "circular", flags(self.circular, "circular"))
        pools = {} if self.pool is None else {"pool": self.pool}
        for name, value in aligned(pools | {"circular": self.circular}, self).items():
            object.__setattr__(self, name, value)

    def check(self, grid: tuple[int, ...], keys: tuple[int, ...] | None = None) -> None:
        """Raise a ValueError if the number of axes differs, or grids differ so that distances are no whole numbers."""
        self.pool_shape(keys or grid)
        per_axis(self.circular, len(grid), "circular")
        self.distances(grid, keys)

    def distances(self, grid: tuple[int, ...], keys: tuple[int, ...] | None = None) -> tuple[list[AxisDistance], int]:
        """Distances along each axis, and the squared radius in their unit."""
        return distances(grid, keys or grid, per_axis(self.circular, len(grid), "circular"), self.radius)

    def pool_shape(self, grid: tuple[int, ...]) -> tuple[int, ...] | None:
        """Tokens of a pooled cell per axis."""
        if self.pool is None:
            return None
        cell = tuple(n if c == -1 else c for n, c in zip(grid, per_axis(self.pool, len(grid), "pool"), strict=True))
        # A weight each.
        check_many(math.prod(cell), math.prod(grid), f"{self}: {math.prod(cell):.3g} tokens of a cell", CELL)
        return cell

    @property
    def learnable(self) -> bool:
        """Whether it pools, in cells of a known size."""
        sides = self.pool if isinstance(self.pool, tuple) else (self.pool,)
        return self.pool is not None and -1 not in sides

    def parameter_shapes(self, heads: int, head_dim: int, grid: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
        """`pool_weight`: one weight per token of a cell [pool per axis]."""
        shape = self.pool_shape(grid)
        return {} if shape is None or min(shape) < 1 else {"pool_weight": shape}

    def initial_parameters(self, heads: int, head_dim: int, grid: tuple[int, ...]) -> dict[str, torch.Tensor]:
        """Equal weights: the mean."""
        import torch

        shapes = self.parameter_shapes(heads, head_dim, grid)
        return {
            name: torch.full(shape, 1 / math.prod(shape), dtype=torch.float32, device="cpu")
            for name, shape in shapes.items()
        }

    def covers(self, grid: tuple[int, ...], keys: tuple[int, ...] | None = None) -> bool:
        """Whether the farthest corner is inside the circle, and nothing is pooled."""
        axes, limit = self.distances(grid, keys)
        return self.pool is None and sum(axis.largest for axis in axes) < limit

    def grid_mask(self, grid: tuple[int, ...], keys: tuple[int, ...] | None = None) -> Bools:
        """Squared distance below the squared radius."""
        return ball_mask(*self.distances(grid, keys))

    def tile_pairs(self, grid: tuple[int, ...], queries: Tiling, keys: Tiling) -> TilePairs:
        """Tiles that the circles of a query tile touch."""
        return ball_pairs(*self.distances(grid, keys.layout.grid), queries, keys)
