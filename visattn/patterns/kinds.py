"""The kinds of patterns, each with the hooks that its backends need."""

from __future__ import annotations

import math
from abc import abstractmethod
from typing import TYPE_CHECKING, ClassVar, Protocol

import numpy as np

from visattn.layout import Layout
from visattn.patterns.base import Pattern
from visattn.patterns.geometry import Bools, Spans, TilePairs, product_mask, product_pairs
from visattn.patterns.routes import Routes
from visattn.tiling import Tiling, box_shape

if TYPE_CHECKING:
    import torch


class ListedPattern(Pattern):
    """A pattern that is a list of key tiles for each query tile: the engines for lists run it.

    Attributes:
        dense_pairs: Whether dense tokens see each other; of a sequence that is cut over devices only on one of them.
    """

    dense_pairs: bool = True

    @abstractmethod
    def tile_pairs(self, grid: tuple[int, ...], queries: Tiling, keys: Tiling) -> TilePairs:
        """The tile pairs with at least one visible pair of tokens that are known without q and k, each once.

        Args:
            grid: The grid of the queries' layout; that of their tiling where `tiled_layout` changes nothing.
            queries: The query side cut in tiles.
            keys: The key side cut in tiles.
        """

    def tiled_layout(self, layout: Layout) -> Layout:
        """The layout whose grid is cut in tiles; a pattern over the flat sequence returns a 1-D one."""
        return layout

    def tile(self, grid: tuple[int, ...], volume: int = 64) -> tuple[int, ...]:
        """A good box of about `volume` tokens for tiles of this grid (of `tiled_layout`)."""
        return box_shape(grid, volume)

    def side_tile(self, grid: tuple[int, ...], volume: int, keys: bool) -> tuple[int, ...]:
        """The same for tiles of keys, or of queries, where an engine may cut the two sides differently."""
        return self.tile(grid, volume)


class StaticPattern(ListedPattern):
    """A listed pattern that the grid alone decides: `check`, `grid_mask` and `tile_pairs` are all it needs."""

    @abstractmethod
    def grid_mask(self, grid: tuple[int, ...], keys: tuple[int, ...] | None = None) -> Bools:
        """The pattern's truth: visibility of grid token j to grid token i, bool [queries, keys].

        Args:
            grid: The grid of the queries.
            keys: That of the keys where it is another one, which only patterns with `two_grids` are asked for.
        """


class SpannedPattern(StaticPattern):
    """A static pattern that is one interval of keys per axis; `spans` gives mask, tiles and boxes of any backend."""

    @abstractmethod
    def spans(self, grid: tuple[int, ...], keys: tuple[int, ...] | None = None) -> list[Spans]:
        """The visible positions of each query, per axis; arguments as in `grid_mask`."""

    def step(self, grid: tuple[int, ...]) -> tuple[int, ...]:
        """Distance of neighbouring tokens in a tile per axis (the dilation)."""
        return (1,) * len(grid)

    def triangular(self, grid: tuple[int, ...]) -> bool:
        """Whether every token sees itself and all tokens before it in the flat sequence, and nothing else.

        That is a grid with one axis of more than a token, of which it is true. Two such axes that are both causal do
        not do it: a token does not see all of the rows before its own.
        """
        if sum(n > 1 for n in grid) != 1:
            return False
        return all(axis.triangular for axis in self.spans(grid))

    def grid_mask(self, grid: tuple[int, ...], keys: tuple[int, ...] | None = None) -> Bools:
        """AND over the axes of one interval each."""
        return product_mask(self.spans(grid) if keys is None else self.spans(grid, keys))

    def tile_pairs(self, grid: tuple[int, ...], queries: Tiling, keys: Tiling) -> TilePairs:
        """Tiles that the intervals of a query tile touch."""
        key_grid = keys.layout.grid
        return product_pairs(self.spans(grid) if key_grid == grid else self.spans(grid, key_grid), queries, keys)


class BiasedPattern(SpannedPattern):
    """A spanned pattern that takes a relative position bias (the `rpb` of `attention`)."""

    @abstractmethod
    def rpb_shape(self, grid: tuple[int, ...]) -> tuple[int, ...]:
        """Sides of the bias per head: [H, *sides]."""

    def wraps(self, grid: tuple[int, ...]) -> bool:
        """Whether an axis is circular, so that keys and queries have more than one distance there."""
        return any(axis.circular for axis in self.spans(grid))


class PooledPattern(StaticPattern):
    """A static pattern that may append pooled keys, one per cell of the grid, which every grid token sees."""

    @abstractmethod
    def pool_shape(self, grid: tuple[int, ...]) -> tuple[int, ...] | None:
        """Tokens of a cell per axis, the sides of the pooling weight; None if it pools no keys."""

    def extra_keys(self, grid: tuple[int, ...]) -> int:
        """Number of pooled keys."""
        cell = self.pool_shape(grid)
        return 0 if cell is None else math.prod(-(-n // c) for n, c in zip(grid, cell, strict=True))

    def append_keys(
        self,
        k: torch.Tensor,
        v: torch.Tensor,
        key_mask: torch.Tensor | None,
        layout: Layout,
        weight: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """Put the pooled keys and values behind the others, see `pooling.append_pooled`.

        Returns:
            k and v [B, N + extra, Hkv, D] and the key mask [B, N + extra] or None.
        """
        from visattn.patterns.pooling import append_pooled

        layout = layout.keys
        cell = self.pool_shape(layout.grid)
        if cell is None:
            return k, v, key_mask
        if weight is None:
            # A mean does not change where a cell is cut to the axis, and needs no padding there.
            cell = tuple(min(c, n) for c, n in zip(cell, layout.grid, strict=True))
        return append_pooled(k, v, key_mask, layout, cell, weight)


class Tiled(Protocol):
    """A layout cut in tiles on both sides, as a `visattn.plans.TilePlan` is."""

    @property
    def layout(self) -> Layout:
        """The tokens."""
        ...

    @property
    def queries(self) -> Tiling:
        """The query side."""
        ...

    @property
    def keys(self) -> Tiling:
        """The key side."""
        ...


class RoutedPattern(ListedPattern):
    """A listed pattern that computes the grid part of its lists from q and k.

    What it always visits may come from `tile_pairs`; dense tokens are listed by the plan for every pattern.
    """

    @abstractmethod
    def visible_pairs(self, grid: tuple[int, ...]) -> int:
        """Visible pairs of grid tokens to expect, for estimates."""

    @abstractmethod
    def routed_tiles(self, grid: tuple[int, ...], keys: Tiling) -> int:
        """Key tiles that `route` is expected to add to the list of each grid query tile, for estimates."""

    @abstractmethod
    def route(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        plan: Tiled,
        key_mask: torch.Tensor | None = None,
        scale: float | None = None,
    ) -> Routes:
        """The key tiles that are chosen for each grid query tile.

        What the key mask hides takes no part in the choice, neither as a key nor as a query: padding decides
        nothing. In a sample with hidden grid tokens every query tile with valid tokens lists valid keys if there are
        any. The work depends on shapes alone and does not wait for the device.

        Args:
            q: Queries [B, S, H, D].
            k: Keys [B, S, Hkv, D].
            plan: A plan of this pattern.
            key_mask: bool [B, S], True where a token is valid; None means all.
            scale: Factor on the logits, D**-0.5 if None.

        Returns:
            The lists, by groups of heads. Short key tiles are not fully visible: their empty slots must be masked.
        """

    @abstractmethod
    def routed_grid_mask(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        layout: Layout,
        key_mask: torch.Tensor | None = None,
        scale: float | None = None,
    ) -> torch.Tensor:
        """The pattern's truth for these q, k and key mask: visibility of grid tokens.

        Hidden keys stay visible in it where their neighbours are: the key mask is a mask of its own.

        Returns:
            bool [B, tokens, tokens], or [B, H, tokens, tokens] where heads choose for themselves.
        """

    @property
    def pools_rest(self) -> bool:
        """Whether grid queries see one pooled key for each grid tile that they do not list (`patterns.choice.rest`)."""
        return False

    @property
    def estimated(self) -> str:
        """What a plan's numbers cannot say before q and k are known, in a sentence; empty if they say all."""
        return ""

    def check_tiles(self, grid: tuple[int, ...], queries: tuple[int, ...], keys: tuple[int, ...]) -> None:
        """Raise a ValueError if query and key tiles of these sizes cannot carry the lists.

        Args:
            grid: Tokens per axis of the layout that is cut in tiles.
            queries: Box of a query tile.
            keys: Box of a key tile.
        """

    def parts(self, grid: tuple[int, ...]) -> tuple[int, ...]:
        """Contiguous parts per axis whose borders no tile crosses (the regions)."""
        return (1,) * len(grid)

    def tile_pairs(self, grid: tuple[int, ...], queries: Tiling, keys: Tiling) -> TilePairs:
        """None: `route` lists them all."""
        none = np.empty(0, np.int64)
        masks = np.empty((0, queries.capacity, keys.capacity), bool)
        return TilePairs(none, none, none, masks, self.visible_pairs(grid))


class ComposedPattern(Pattern):
    """A pattern that no list of key tiles describes: only the backend written for it runs it."""

    # Whether its weights are a function of the products q . k, so that extra channels of both can carry a bias.
    of_products: ClassVar[bool] = True
    # Whether engines for lists run a part of it, so that this part may be in 8 bits.
    runs_lists: ClassVar[bool] = False

    @property
    def inner(self) -> StaticPattern | None:
        """The pattern whose key tiles it visits, if it is built around one."""
        return None

    @abstractmethod
    def instead(self, grid: tuple[int, ...]) -> str:
        """What it is instead of a list of key tiles, for errors: "a product with sums over all keys"."""


class MergingPattern(Pattern):
    """A pattern that merges the tokens that are projected to q, k and v: only `apply` to a UNet installs it."""

    @property
    def stepped(self) -> bool:
        """Whether it differs from denoising step to step."""
        return False


def reads_products(pattern: Pattern) -> bool:
    """Whether its weights are a function of the products q . k: channels of zeros change nothing then."""
    return bool(getattr(pattern, "of_products", True))


def pooled_part(pattern: Pattern) -> PooledPattern | None:
    """What pools keys in a pattern: itself or what it is composed around, None if neither does."""
    part = pattern.inner if isinstance(pattern, ComposedPattern) else pattern
    return part if isinstance(part, PooledPattern) else None


def with_pooled_keys(
    pattern: Pattern,
    k: torch.Tensor,
    v: torch.Tensor,
    key_mask: torch.Tensor | None,
    layout: Layout,
    weight: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Keys, values and key mask with the keys that a pattern pools, see `PooledPattern.append_keys`."""
    if not isinstance(pattern, PooledPattern):
        return k, v, key_mask
    return pattern.append_keys(k, v, key_mask, layout, weight)
