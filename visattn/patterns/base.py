"""What every pattern offers: its truth on a small grid and the tiles it visits on any grid."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from visattn.layout import Layout
from visattn.patterns.geometry import Bools, TilePairs
from visattn.tiling import Tiling, box_shape

if TYPE_CHECKING:
    import torch

    from visattn.plans import TilePlan

PerAxis = int | tuple[int, ...]


class Pattern(ABC):
    """A frozen dataclass that says which keys of a grid each query of that grid sees.

    Attributes:
        name: What `parse` and `str` call it.
    """

    name: ClassVar[str]
    # A composed pattern is not a list of key tiles: only the backend written for it runs it.
    composed: ClassVar[bool] = False
    # A routed pattern computes the grid part of its tile lists from q and k at run time.
    routed: ClassVar[bool] = False
    # A merging pattern changes the tokens that are projected to q, k and v: only `apply` to a UNet installs it.
    merges: ClassVar[bool] = False
    # Whether its weights are a function of the products q . k, so that extra channels of both can carry a bias.
    of_products: ClassVar[bool] = True

    @property
    def stepped(self) -> bool:
        """Whether it differs from denoising step to step."""
        return False

    @property
    def listed(self) -> Pattern | None:
        """The pattern whose key tiles it visits: itself, the sparse part of a composition, or None."""
        return None if self.composed else self

    @property
    def learnable(self) -> bool:
        """Whether it has parameters to train."""
        return False

    def parameter_shapes(self, heads: int, head_dim: int, grid: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
        """Shapes of its learnable parameters by name.

        Args:
            heads: Query heads.
            head_dim: Channels per head.
            grid: Tokens per axis; -1 for an axis whose length is not known yet. A parameter whose shape would
                depend on such an axis is left out.
        """
        return {}

    def initial_parameters(self, heads: int, head_dim: int, grid: tuple[int, ...]) -> dict[str, torch.Tensor]:
        """The values that missing parameters stand for, in float32; arguments as in `parameter_shapes`."""
        return {}

    @abstractmethod
    def check(self, grid: tuple[int, ...]) -> None:
        """Raise a ValueError if the pattern is not defined on this grid."""

    @abstractmethod
    def grid_mask(self, grid: tuple[int, ...]) -> Bools:
        """The pattern's truth: visibility of grid token j to grid token i, bool [tokens, tokens]."""

    @abstractmethod
    def tile_pairs(self, grid: tuple[int, ...], queries: Tiling, keys: Tiling) -> TilePairs:
        """The tile pairs with at least one visible pair of tokens, each exactly once.

        Args:
            grid: The grid of the layout; that of the tilings where `tiled_layout` changes nothing.
            queries: The query side cut in tiles.
            keys: The key side cut in tiles.
        """

    def covers(self, grid: tuple[int, ...]) -> bool:
        """Whether every token of this grid sees every other, so that dense attention is the same."""
        return False

    def tiled_layout(self, layout: Layout) -> Layout:
        """The layout whose grid is cut in tiles; a pattern over the flat sequence returns a 1-D one."""
        return layout

    def tile(self, grid: tuple[int, ...], volume: int = 64) -> tuple[int, ...]:
        """A good box of about `volume` tokens for tiles of this grid (of `tiled_layout`)."""
        return box_shape(grid, volume)

    def extra_keys(self, grid: tuple[int, ...]) -> int:
        """Key-only tokens (pooled keys) that the pattern appends; every grid token sees them."""
        return 0

    def append_keys(
        self,
        k: torch.Tensor,
        v: torch.Tensor,
        key_mask: torch.Tensor | None,
        layout: Layout,
        weight: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """Put the extra keys behind the others: k, v [B, S + extra, Hkv, D] and the key mask [B, S + extra]."""
        return k, v, key_mask

    def pool_shape(self, grid: tuple[int, ...]) -> tuple[int, ...] | None:
        """Sides of the pooling weight, None if the pattern pools no keys."""
        return None

    def rpb_shape(self, grid: tuple[int, ...]) -> tuple[int, ...] | None:
        """Sides of the relative position bias per head, None if the pattern takes none."""
        return None

    def step(self, grid: tuple[int, ...]) -> tuple[int, ...]:
        """Distance of neighbouring tokens in a tile per axis (the dilation)."""
        return (1,) * len(grid)

    def parts(self, grid: tuple[int, ...]) -> tuple[int, ...]:
        """Contiguous parts per axis whose borders no tile crosses (the regions of a routed pattern)."""
        return (1,) * len(grid)

    def routed_tiles(self, grid: tuple[int, ...], keys: Tiling) -> int:
        """Key tiles that a routed pattern adds to the list of each grid query tile at run time."""
        return 0

    def route(self, q: torch.Tensor, k: torch.Tensor, plan: TilePlan) -> torch.Tensor:
        """The key tiles that a routed pattern adds: int64 [B, grid query tiles, n], see `Routing.route`."""
        raise NotImplementedError(f"{self} is not routed")

    def __str__(self) -> str:
        parts = []
        for field in dataclasses.fields(self):  # type: ignore[arg-type]
            value = getattr(self, field.name)
            if value != field.default:
                parts.append(f"{field.name}={_format(value)}")
        return f"{self.name}({', '.join(parts)})" if parts else self.name


def _format(value: Any) -> str:
    if isinstance(value, tuple):
        return "x".join(str(int(v)) for v in value)
    if isinstance(value, bool) or value is None:
        return str(value).lower()
    return repr(value) if isinstance(value, float) else str(value)


def whole_numbers(value: Any, name: str, low: int, also: Sequence[int] = ()) -> PerAxis:
    """Check a parameter that is one whole number or one per axis; lists become tuples.

    Args:
        value: What the user gave.
        name: What the error calls it.
        low: Smallest number allowed.
        also: Further numbers allowed (-1 for a whole axis).

    Raises:
        ValueError: If it is anything else.
    """
    numbers = tuple(value) if isinstance(value, Sequence) and not isinstance(value, str) else (value,)
    try:
        whole = [int(n) for n in numbers]
        good = len(whole) > 0 and all(w == n and (w >= low or w in also) for w, n in zip(whole, numbers, strict=True))
    except (TypeError, ValueError):
        good, whole = False, []
    if not good:
        extra = "".join(f" or {n}" for n in also)
        raise ValueError(f"{name}={value!r} must be a whole number of at least {low}{extra}, or one per axis like 7x7")
    return tuple(whole) if isinstance(value, Sequence) else whole[0]


def per_axis(value: Any, dims: int, name: str) -> tuple[Any, ...]:
    """One value per grid axis; a scalar holds for every axis.

    Raises:
        ValueError: If the number of values is not the number of axes.
    """
    if not isinstance(value, tuple):
        return (value,) * dims
    if len(value) != dims:
        raise ValueError(
            f"{name}={_format(value)} has {len(value)} values but the grid has {dims} axes: give {dims} or 1"
        )
    return value
