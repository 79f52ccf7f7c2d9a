"""Bi-level routing (BiFormer): each region attends to the regions that resemble it most."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch

from visattn.keep import kept
from visattn.layout import Layout
from visattn.operands import repeated, wide_dtype
from visattn.patterns.kinds import RoutedPattern, Tiled
from visattn.patterns.routes import Routes
from visattn.patterns.values import PerAxis, per_axis, whole_numbers
from visattn.tiling import Ints, Tiling, box_shape


@dataclass(frozen=True)
class Routing(RoutedPattern):
    """Queries of a region see the `topk` regions whose mean key has the largest product with their mean query.

    Source: Zhu et al., "BiFormer: Vision Transformer with Bi-Level Routing Attention" (CVPR 2023), section 3.2.
    All heads together choose (the means have heads * head_dim channels), the choice is not differentiated, and
    dense tokens neither take part in it nor are left out by it. A positive scale of the products would not
    change the choice; the scale of the attention is that of `attention` (BiFormer's is channels ** -0.5).

    Tokens that a key mask hides (padding) are in no mean and their regions are chosen last; in a sample with hidden
    grid tokens every region with valid tokens sees itself, whatever it resembles.

    Where the regions do not divide an axis their sides differ by at most one token, so that none is empty. The
    means are over real tokens. (BiFormer pads with zeros instead: pad the input to have that.)

    Attributes:
        regions: Regions per axis; more than an axis has tokens is one per token.
        topk: Regions that a region sees; more than there are is all of them.

    Raises:
        ValueError: If a parameter is out of range, here or on the grid it is used with.
    """

    regions: PerAxis
    topk: int

    name: ClassVar[str] = "routing"

    def __post_init__(self) -> None:
        object.__setattr__(self, "regions", whole_numbers(self.regions, "regions", 1))
        topk = whole_numbers(self.topk, "topk", 1)
        if isinstance(topk, tuple):
            raise ValueError(f"topk={self.topk!r} must be one whole number: a region sees that many regions")
        object.__setattr__(self, "topk", topk)

    @property
    def joins_heads(self) -> bool:
        """All heads choose together."""
        return True

    def check(self, grid: tuple[int, ...]) -> None:
        """Raise a ValueError if the number of axes differs."""
        self.parts(grid)

    def parts(self, grid: tuple[int, ...]) -> tuple[int, ...]:
        """Regions per axis, at most the axis."""
        return tuple(min(r, n) for r, n in zip(per_axis(self.regions, len(grid), "regions"), grid, strict=True))

    def chosen(self, grid: tuple[int, ...]) -> int:
        """Regions that each region sees."""
        return min(self.topk, math.prod(self.parts(grid)))

    def covers(self, grid: tuple[int, ...]) -> bool:
        """Whether every region sees all regions."""
        return self.topk >= math.prod(self.parts(grid))

    def tile(self, grid: tuple[int, ...], volume: int = 64) -> tuple[int, ...]:
        """A region where it is small enough, else a box of which regions hold few short ones."""
        region = tuple(-(-n // r) for n, r in zip(grid, self.parts(grid), strict=True))
        if math.prod(region) <= 2 * volume:
            return region
        box = box_shape(region, volume)
        return tuple(-(-side // -(-side // b)) for side, b in zip(region, box, strict=True))

    def visible_pairs(self, grid: tuple[int, ...]) -> int:
        """What regions of average size see."""
        return round(math.prod(grid) ** 2 * self.chosen(grid) / math.prod(self.parts(grid)))

    def routed_tiles(self, grid: tuple[int, ...], keys: Tiling) -> int:
        """Key tiles that `route` lists for each grid query tile."""
        return self.chosen(grid) * (keys.runs[1] // math.prod(self.parts(grid)))

    def route(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        plan: Tiled,
        key_mask: torch.Tensor | None = None,
        scale: float | None = None,
    ) -> Routes:
        """The key tiles of the regions that each query tile's region sees, one list for all heads."""
        return self.routes_of(self.choose(q, k, plan.layout, key_mask), plan)

    def routes_of(self, choice: torch.Tensor, plan: Tiled) -> Routes:
        """The key tiles that each query tile lists where regions see these: see `choose` and `route`."""
        region, tiles = _tables(self, plan, choice.device)
        return Routes(tiles[choice].flatten(2)[:, region][:, None])

    def routed_grid_mask(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        layout: Layout,
        key_mask: torch.Tensor | None = None,
        scale: float | None = None,
    ) -> torch.Tensor:
        """Every token of a region sees every token of the regions that it chose."""
        token_region = token_regions(self, layout.grid, q.device)
        choice = self.choose(q, k, layout, key_mask)
        sees = torch.zeros(*choice.shape[:2], choice.shape[1], dtype=torch.bool, device=q.device)
        # With a tensor of ones: torch.jit.trace finds no operator for a bool.
        sees = sees.scatter(2, choice, torch.ones_like(choice, dtype=torch.bool))
        return sees[:, token_region][:, :, token_region]

    def choose(
        self, q: torch.Tensor, k: torch.Tensor, layout: Layout, key_mask: torch.Tensor | None = None
    ) -> torch.Tensor:
        """The regions that each region sees, best first: int64 [B, regions, chosen]."""
        with torch.no_grad():
            inner = slice(layout.prefix, layout.prefix + layout.tokens)
            q, k = q[:, inner], k[:, inner]
            valid = None if key_mask is None else _Valid(self, layout.grid, key_mask[:, inner])
            mean_q, mean_k = (self._valid_means(t, layout, valid) for t in (q, k))
            mean_k = repeated(mean_k, q.shape[2])
            affinity = mean_q.flatten(2) @ mean_k.flatten(2).transpose(1, 2)
            if valid is not None:
                affinity = valid.ranked(affinity)
            return affinity.topk(self.chosen(layout.grid), -1).indices

    def _valid_means(self, x: torch.Tensor, layout: Layout, valid: _Valid | None) -> torch.Tensor:
        """Mean of the tokens of each region that take part: [B, tokens, H, D] -> [B, regions, H, D]."""
        if valid is None:
            return self._means(x, layout)
        mean = self._means(x.masked_fill(~valid.part[..., None, None], 0), layout)
        # Where all take part the factor is exactly 1, and this the mean without a key mask.
        factor = valid.tokens.to(mean.dtype) / valid.count.to(mean.dtype)
        return mean * factor[..., None, None]

    def _means(self, x: torch.Tensor, layout: Layout) -> torch.Tensor:
        """Mean of each region: [B, tokens, H, D] -> [B, regions, H, D], in float32 at least."""
        wide, shape, regions = wide_dtype(x), x.shape, self.parts(layout.grid)
        x = x.flatten(2).unflatten(1, layout.grid)
        if all(n % parts == 0 for n, parts in zip(layout.grid, regions, strict=True)):
            for i, parts in enumerate(regions):
                x = x.unflatten(1 + 2 * i, (parts, -1))
            x = x.mean([2 + 2 * i for i in range(layout.dims)], dtype=wide)
            return x.reshape(shape[0], -1, *shape[2:])
        x = x.to(wide)
        for i, (n, parts) in enumerate(zip(layout.grid, regions, strict=True)):
            # One small product per axis: deterministic on every device, whatever the sides.
            x = (_averages(n, parts, wide, x.device) @ x.movedim(1 + i, -2)).movedim(-2, 1 + i)
        return x.reshape(shape[0], -1, *shape[2:])


class _Valid:
    """What a key mask leaves of the regions of a grid.

    Attributes:
        part: Tokens that take part in the mean of their region: bool [B, tokens]. All do where none is valid, so that
            such queries, whose keys nobody sees, choose by themselves.
        count: How many those are: int64 [B, regions].
        tokens: Tokens of each region: int64 [B, regions].
    """

    def __init__(self, pattern: Routing, grid: tuple[int, ...], mask: torch.Tensor) -> None:
        region = token_regions(pattern, grid, mask.device).expand(len(mask), -1)
        none = torch.zeros(len(mask), math.prod(pattern.parts(grid)), dtype=torch.int64, device=mask.device)
        self.tokens, valid = (none.scatter_add(1, region, t.long()) for t in (torch.ones_like(mask), mask))
        self._hidden, self._padded = valid == 0, ~mask.all(1)
        self.part = mask | self._hidden.gather(1, region)
        self.count = torch.where(self._hidden, self.tokens, valid)

    def ranked(self, affinity: torch.Tensor) -> torch.Tensor:
        """Affinities [B, regions, regions] in which hidden regions come last, and in a padded sample the own first."""
        own = torch.eye(affinity.shape[1], dtype=torch.bool, device=affinity.device) & self._padded[:, None, None]
        affinity = affinity.masked_fill(own, float("inf"))
        return affinity.masked_fill(self._hidden[:, None], float("-inf"))


@kept
def _averages(length: int, parts: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """The matrix that averages each part of an axis, [parts, length]; copied to a device once, not in every call."""
    part = part_of(length, parts)
    rows = np.zeros((parts, length))
    rows[part, np.arange(length)] = 1 / np.bincount(part)[part]
    return torch.from_numpy(rows).to(device, dtype)


def part_of(length: int, parts: int) -> Ints:
    """Which of `parts` contiguous parts, whose lengths differ by at most one, each token is in: [length]."""
    return np.searchsorted(np.arange(1, parts + 1) * length // parts, np.arange(length), side="right")


def regions_of_tiles(tiling: Tiling, parts: Sequence[int]) -> Ints:
    """Region of each grid tile, none of which lies in two: [tiles].

    Args:
        tiling: The tiles, equally many in each region.
        parts: Regions along each axis.
    """
    region = np.zeros(1, np.int64)
    for tiles, number in zip(tiling.grid_shape, parts, strict=True):
        region = (region[:, None] * number + np.arange(tiles) // (tiles // number)).ravel()
    return region


@kept
def _tables(pattern: Routing, plan: Tiled, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Region of each grid query tile [tiles]; key tiles of each region [regions, tiles per region]."""
    parts = pattern.parts(plan.layout.grid)
    order = np.argsort(regions_of_tiles(plan.keys, parts), kind="stable") + plan.keys.grid_tiles.start
    tables = regions_of_tiles(plan.queries, parts), order.reshape(math.prod(parts), -1)
    return torch.from_numpy(tables[0]).to(device), torch.from_numpy(tables[1]).to(device)


@kept
def token_regions(pattern: Routing, grid: tuple[int, ...], device: torch.device) -> torch.Tensor:
    """Region of each token of a grid, [tokens]; copied to a device once, not in every call."""
    region = np.zeros(1, np.int64)
    for n, parts in zip(grid, pattern.parts(grid), strict=True):
        region = (region[:, None] * parts + part_of(n, parts)).ravel()
    return torch.from_numpy(region).to(device)
