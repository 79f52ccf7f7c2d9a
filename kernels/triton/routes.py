"""Lists of routed patterns: built on the device from what the router chose, without waiting for it."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch

from visattn.keep import kept
from visattn.kernels.triton.lists.program import Program, fill_kinds, first_tokens, pack, program
from visattn.plans import TilePlan


@dataclass(frozen=True, eq=False)
class Static:
    """What of a routed program does not depend on q and k.

    Attributes:
        base: The program of the dense tokens; its grid rows visit no grid column yet.
        first: First token of each column tile: int32 [column tiles].
        mask: Mask of each column tile, which hides its empty slots: int32 [column tiles].
        whole: Whether no grid column tile has empty slots, so that routed visits need no mask.
    """

    base: Program
    first: torch.Tensor
    mask: torch.Tensor
    whole: bool


@kept
def static_part(plan: TilePlan, by_keys: bool, device: torch.device) -> Static:
    """What of a plan's program does not depend on q and k."""
    base = program(plan, by_keys, 1, device)
    columns = base.column_tiling
    kind, slots = fill_kinds(columns)
    rows = np.broadcast_to(slots[:, None, :], (len(slots), base.rows, columns.capacity))
    more = torch.from_numpy(pack(rows, base.rows, base.columns)).to(device)
    whole = bool(slots[kind[columns.grid_tiles]].all()) and columns.capacity == base.columns

    def tensor(array: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(array.astype(np.int32)).to(device)

    mask = tensor(kind + len(base.masks))
    return Static(
        replace(base, masks=torch.cat([base.masks, more]), full=base.full or whole, partial=base.partial or not whole),
        tensor(first_tokens(columns)),
        mask,
        whole,
    )


def routed_program(plan: TilePlan, by_keys: bool, route: torch.Tensor) -> Program:
    """The program of a routed plan for one batch.

    Args:
        plan: A plan of a routed pattern.
        by_keys: Whether key tiles are the rows.
        route: What `pattern.route` gave: int64 [B, grid query tiles, n], key tiles without duplicates.
    """
    static = static_part(plan, by_keys, route.device)
    batch, queries, number = route.shape
    first_row = plan.keys.grid_tiles.start if by_keys else plan.queries.grid_tiles.start
    rows = plan.keys.runs[1] if by_keys else queries
    if by_keys:
        column, start, stop = _transposed(route, first_row, rows)
        column = column + plan.queries.grid_tiles.start
    else:
        column = route.flatten(1)
        start = torch.arange(rows, device=route.device)[None] * number
        stop = start + number
    base = static.base
    skip = len(base.bases)
    start, stop = start + skip, stop + skip
    # Grid rows lie behind the dense ones, in their own order: without static visits the sort leaves them alone.
    bounds = base.bounds.expand(len(start), -1, -1).clone()
    grid = bounds[:, base.dense_rows :]
    grid[..., 0], grid[..., 2] = start, stop
    grid[..., 1] = stop if static.whole else start
    return replace(
        base,
        bounds=bounds,
        bases=torch.cat([base.bases.expand(batch, -1), static.first[column]], 1),
        mask_ids=torch.cat([base.mask_ids.expand(batch, -1), static.mask[column]], 1),
        bounds_batch=bounds[0].numel() if len(start) > 1 else 0,
        list_batch=skip + queries * number,
    )


def _transposed(route: torch.Tensor, first: int, rows: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The grid query tiles that visit each grid key tile: [B, entries], and where each list starts and stops."""
    batch, _, number = route.shape
    keys, order = route.flatten(1).sort(dim=1, stable=True)
    wanted = torch.arange(first, first + rows, device=route.device).expand(batch, -1).contiguous()
    start, stop = (torch.searchsorted(keys, wanted, right=right) for right in (False, True))
    return order // number, start, stop


class Listed:
    """The lists of one call of a routed pattern, from what its `route` chose by torch's operators.

    Args:
        programs: The program of each direction.
    """

    def __init__(self, programs: dict[str, Program]) -> None:
        self._programs = programs

    def program(self, direction: str) -> Program:
        """The lists of a direction."""
        return self._programs[direction]

    def addresses(self, direction: str) -> list[int]:
        """Its bounds, bases and masks."""
        run = self._programs[direction]
        return [run.bounds.data_ptr(), run.bases.data_ptr(), run.mask_ids.data_ptr()]
