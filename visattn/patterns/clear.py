"""Circular windows (CLEAR), with pooled keys for what lies outside, in one to three dimensions."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from visattn.patterns.geometry import Bools, TilePairs
from visattn.patterns.kinds import PooledPattern
from visattn.patterns.offsets import offset_mask, offset_pairs, squared
from visattn.patterns.values import PerAxis, per_axis, whole_numbers
from visattn.tiling import Tiling

if TYPE_CHECKING:
    import torch


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

    Raises:
        ValueError: If a parameter is out of range, here or on the grid it is used with.
    """

    radius: int
    pool: PerAxis | None = None

    name: ClassVar[str] = "clear"

    def __post_init__(self) -> None:
        radius = whole_numbers(self.radius, "radius", 1)
        if isinstance(radius, tuple):
            raise ValueError(f"radius={self.radius!r} must be one whole number: the window is a circle")
        object.__setattr__(self, "radius", radius)
        if self.pool is not None:
            object.__setattr__(self, "pool", whole_numbers(self.pool, "pool", 1, also=(-1,)))

    def check(self, grid: tuple[int, ...]) -> None:
        """Raise a ValueError if the number of axes differs."""
        self.pool_shape(grid)

    def pool_shape(self, grid: tuple[int, ...]) -> tuple[int, ...] | None:
        """Tokens of a pooled cell per axis."""
        if self.pool is None:
            return None
        return tuple(n if c == -1 else c for n, c in zip(grid, per_axis(self.pool, len(grid), "pool"), strict=True))

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
        return {name: torch.full(shape, 1 / math.prod(shape)) for name, shape in shapes.items()}

    def covers(self, grid: tuple[int, ...]) -> bool:
        """Whether the farthest corner is inside the circle, and nothing is pooled."""
        return self.pool is None and sum((n - 1) ** 2 for n in grid) < self.radius**2

    def grid_mask(self, grid: tuple[int, ...]) -> Bools:
        """Squared distance below the squared radius."""
        return offset_mask(squared(grid), self.radius**2)

    def tile_pairs(self, grid: tuple[int, ...], queries: Tiling, keys: Tiling) -> TilePairs:
        """Tiles that the circles of a query tile touch."""
        return offset_pairs(squared(grid), self.radius**2, queries, keys)
