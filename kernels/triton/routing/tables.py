"""What routed lists do not take from q and k: tokens of regions, tiles of regions, fixed visits."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
import torch

from visattn.keep import kept
from visattn.kernels.triton.lists.program import Program, int32_table
from visattn.kernels.triton.routes import static_part
from visattn.patterns.routing import Routing, regions_of_tiles, token_regions
from visattn.plans import TilePlan


@dataclass(frozen=True, eq=False)
class Side:
    """The lists of one plan, for query tiles or for key tiles as rows.

    Attributes:
        base: The program of the dense tokens; of query tiles with the bounds of all rows, which q and k do not change.
        row_tiles: Row tiles of each region, counted from the first of the grid: int32 [regions, tiles].
        first: First token of each column tile, by region for lists of query tiles: int32.
        masks: Mask of each of these.
        regions_of: Region of each query tile: int32 [grid query tiles].
        per: Column tiles of a region.
        rows: Row tiles of a region.
        queries: Query tiles of the grid.
        skip: Entries that are fixed.
        length: Entries of a sample.
        whole: Whether no entry that is chosen needs a mask.
    """

    base: Program
    row_tiles: torch.Tensor
    first: torch.Tensor
    masks: torch.Tensor
    regions_of: torch.Tensor
    per: int
    rows: int
    queries: int
    skip: int
    length: int
    whole: bool


@kept
def side(pattern: Routing, plan: TilePlan, by_keys: bool, device: torch.device) -> Side:
    """The tables of a plan of a routed pattern, with key tiles as rows if `by_keys`."""
    static = static_part(plan, by_keys, device)
    parts, regions = pattern.parts(plan.layout.grid), math.prod(pattern.parts(plan.layout.grid))
    rows, columns = (plan.keys, plan.queries) if by_keys else (plan.queries, plan.keys)

    row_tiles, column_tiles = (
        np.argsort(regions_of_tiles(t, parts), kind="stable").reshape(regions, -1) for t in (rows, columns)
    )
    grid = torch.arange(columns.grid_tiles.start, columns.grid_tiles.stop, device=device)
    listed = grid if by_keys else grid[torch.from_numpy(column_tiles).to(device)]
    per, number = column_tiles.shape[1], rows.runs[1]
    base, skip = static.base, len(static.base.bases)
    entries = pattern.chosen(plan.layout.grid) * per
    if not by_keys:
        bounds = base.bounds.clone()
        start = skip + entries * torch.arange(number, dtype=torch.int32, device=device)
        own = bounds[base.dense_rows :]
        own[:, 0], own[:, 2] = start, start + entries
        own[:, 1] = own[:, 2] if static.whole else start
        base = replace(base, bounds=bounds)
    queries = plan.queries.runs[1]
    chosen_tiles = queries * pattern.chosen(plan.layout.grid) * (plan.keys.runs[1] // regions)
    return Side(
        base=base,
        row_tiles=int32_table(row_tiles, device),
        first=static.first[listed].contiguous(),
        masks=static.mask[listed].contiguous(),
        regions_of=int32_table(regions_of_tiles(plan.queries, parts), device),
        per=per,
        rows=row_tiles.shape[1],
        queries=queries,
        skip=skip,
        length=skip + chosen_tiles,
        whole=static.whole,
    )


@kept
def region_tokens(pattern: Routing, prefix: int, grid: tuple[int, ...], device: torch.device) -> torch.Tensor:
    """The tokens of each region, -1 where it has fewer than others: int32 [regions, tokens]."""
    of = token_regions(pattern, grid, torch.device("cpu")).numpy()
    counts = np.bincount(of)
    tokens = np.full((len(counts), counts.max()), -1)
    for region in range(len(counts)):
        own = np.flatnonzero(of == region)
        tokens[region, : len(own)] = prefix + own
    return int32_table(tokens, device)
