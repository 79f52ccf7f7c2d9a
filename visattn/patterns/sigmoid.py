"""Sigmoid attention over the visible keys of any pattern that is a list of key tiles."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar

from visattn.layout import Layout
from visattn.patterns.base import Pattern
from visattn.patterns.dense import Dense
from visattn.patterns.geometry import Bools, TilePairs
from visattn.tiling import Tiling

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Sigmoid(Pattern):
    """out_i = sum_j sigmoid(scale q_i . k_j + b_i) v_j over the keys j that `sparse` shows query i; no normaliser.

    Source: Ramapuram et al., "Theory, Analysis, and Best Practices for Sigmoid Self-Attention" (2024), section 3,
    with b_i = -log(number of visible keys of i) as proposed there (pooled keys of clear count), or a constant. A
    learnable offset per head is added, 0 at first. Sums are float32 at least; tested in bfloat16 with queries and keys
    up to 80 in absolute value.

    Attributes:
        sparse: Who sees whom, a pattern that is a list of key tiles.
        bias: The constant b, or None for minus the logarithm of the number of visible keys.

    Raises:
        ValueError: If `sparse` is no list of tiles that is known without q and k, or the bias is not finite.
    """

    sparse: Pattern = field(default_factory=Dense)
    bias: float | None = None

    name: ClassVar[str] = "sigmoid"
    composed: ClassVar[bool] = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "sparse", inner_pattern(self.sparse, self.name))
        if self.bias is not None:
            if isinstance(self.bias, bool) or not isinstance(self.bias, int | float) or not math.isfinite(self.bias):
                raise ValueError(f"bias={self.bias!r} must be a finite number, or none for -log(visible keys)")
            object.__setattr__(self, "bias", float(self.bias))

    def __str__(self) -> str:
        bias = "" if self.bias is None else f", bias={self.bias!r}"
        return f"{self.name}(sparse={self.sparse}{bias})"

    @property
    def listed(self) -> Pattern:
        """The sparse pattern."""
        return self.sparse

    @property
    def learnable(self) -> bool:
        """Always: the offset per head."""
        return True

    def parameter_shapes(self, heads: int, head_dim: int, grid: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
        """`bias` [H], added to b; and those of the sparse pattern."""
        return {"bias": (heads,)} | self.sparse.parameter_shapes(heads, head_dim, grid)

    def initial_parameters(self, heads: int, head_dim: int, grid: tuple[int, ...]) -> dict[str, torch.Tensor]:
        """No offset."""
        import torch

        return {"bias": torch.zeros(heads)} | self.sparse.initial_parameters(heads, head_dim, grid)

    def check(self, grid: tuple[int, ...]) -> None:
        """Raise a ValueError if the sparse pattern is not defined on this grid."""
        self.sparse.check(grid)

    def extra_keys(self, grid: tuple[int, ...]) -> int:
        """Those of the sparse pattern."""
        return self.sparse.extra_keys(grid)

    def pool_shape(self, grid: tuple[int, ...]) -> tuple[int, ...] | None:
        """That of the sparse pattern."""
        return self.sparse.pool_shape(grid)

    def append_keys(
        self,
        k: torch.Tensor,
        v: torch.Tensor,
        key_mask: torch.Tensor | None,
        layout: Layout,
        weight: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """Append what the sparse pattern does."""
        return self.sparse.append_keys(k, v, key_mask, layout, weight)

    def grid_mask(self, grid: tuple[int, ...]) -> Bools:
        """That of the sparse pattern."""
        return self.sparse.grid_mask(grid)

    def tile_pairs(self, grid: tuple[int, ...], queries: Tiling, keys: Tiling) -> TilePairs:
        """Undefined."""
        raise ValueError(f"{self} has no tile plan of its own: plan its sparse pattern, {self.sparse}")


def inner_pattern(value: object, outer: str) -> Pattern:
    """Check the `sparse` of a composition; a text is parsed.

    Raises:
        ValueError: If it is no pattern, or no list of tiles that is known without q and k.
    """
    from visattn.patterns import parse

    pattern = parse(value)  # type: ignore[arg-type]
    if pattern.composed:
        raise ValueError(f"sparse={pattern} of {outer} is a composition: give a pattern that is a list of key tiles")
    if pattern.routed:
        raise ValueError(f"sparse={pattern} of {outer} computes its lists from q and k: give na, halo, clear or radial")
    return pattern
