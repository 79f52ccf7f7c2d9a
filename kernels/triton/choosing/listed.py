"""The lists of one call of a dynamic pattern: those of query tiles by a kernel, those of key tiles by torch."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from visattn.kernels.triton.arguments import Work
from visattn.kernels.triton.choosing.lists import write_lists
from visattn.kernels.triton.choosing.pooled import Rest
from visattn.kernels.triton.choosing.tables import Tables, tables, writes_lists
from visattn.kernels.triton.lists.program import Program
from visattn.kernels.triton.routes import routed_program
from visattn.kernels.triton.start import launch_like, on
from visattn.patterns import DynamicPattern, Routes

# Common entries that are copied at once.
COPY = 128
# Entries up to which a list is the work of a single warp, and of four.
SHORT, LONG = 256, 2048


class DynamicLists:
    """What one call chose, and the lists of each direction, written when they are asked for.

    Args:
        routes: Key blocks of each query block, as `DynamicPattern.choose` gives them.
        work: What calls that are alike share.
        rest: The pooled keys of what is not listed, None for `rest=drop`.
    """

    def __init__(self, routes: Routes, work: Work, rest: Rest | None = None) -> None:
        self._routes, self._work, self.rest = routes, work, rest
        self._programs: dict[Any, Program] = {}

    def program(self, direction: str) -> Program:
        """The lists that a kernel walks."""
        plan, step = self._work.plan(direction), self._work.configs[direction].per_step
        # Where query tiles are the same in two directions, so are their lists.
        key = direction if direction == "key_grad" else (plan, step)
        if key not in self._programs:
            self._programs[key] = self._made(direction)
        return self._programs[key]

    def addresses(self, direction: str) -> list[int]:
        """Where their bounds, bases and masks are."""
        return [t.data_ptr() for t in self.program(direction).own_lists]

    def _made(self, direction: str) -> Program:
        plan, pattern = self._work.plan(direction), self._work.pattern
        assert isinstance(pattern, DynamicPattern)
        tiles, counts = self._routes
        if direction != "key_grad" and writes_lists(pattern, plan):
            step = self._work.configs[direction].per_step
            return listed_program(tables(plan, pattern.blocks(plan.layout.grid), step, tiles.device), self._routes)
        wide = Routes(tiles.long(), None if counts is None else counts.long())
        return routed_program(plan, direction == "key_grad", pattern.spread(wide, plan))


def listed_program(table: Tables, routes: Routes) -> Program:
    """The program of query tiles, without waiting for the device.

    Args:
        table: Its tables.
        routes: Key blocks of each query block: [B, G, blocks, n].
    """
    base, (tiles, counts) = table.base, routes
    tiles = tiles.flatten(0, 1).to(torch.int32).contiguous()
    counts = None if counts is None else counts.flatten(0, 1).to(torch.int32).contiguous()
    owners, grid_rows, skip, step = len(tiles), len(table.row_blocks), len(base.bases), base.tiles
    length = tiles.shape[2] * table.per
    entries = -(-max(length, 1) // step) * step
    total = skip + owners * grid_rows * entries
    if total >= 2**31:
        raise ValueError(
            f"lists of {owners} heads, {grid_rows} query tiles and {entries} key tiles each have {total} entries, more "
            "than 32 bits count: let each block list fewer (most=), or cut the batch"
        )
    bounds = tiles.new_empty((owners, base.row_tiles, 4))
    bases, mask_ids = tiles.new_empty(total), tiles.new_empty(total)
    power = max(step, 1 << (length - 1).bit_length())
    given = {
        "choice": tiles, "counts": tiles if counts is None else counts,
        "bounds": bounds, "bases": bases, "mask_ids": mask_ids,
        "fixed_bounds": base.bounds, "fixed": base.bases, "fixed_masks": base.mask_ids,
        "row_blocks": table.row_blocks, "first": table.first, "masks": table.masks,
        "blocks": table.blocks, "number": tiles.shape[2], "per": table.per,
        "dense_rows": base.dense_rows, "grid_rows": grid_rows, "skip": skip, "entries": entries,
        "filler": table.filler, "everything": table.everything, "nothing": table.nothing,
        "COUNTED": counts is not None, "ENTRIES": power, "STEP": step, "COPY": COPY,
    }  # fmt: skip
    with on(tiles.device):
        launch_like(
            write_lists, (base.row_tiles, owners), given, 1 if power <= SHORT else 4 if power <= LONG else 8, None
        )
    # Without a mask only where every list is a whole number of steps of whole tiles.
    plain = table.even and counts is None and length % step == 0
    return replace(
        base,
        bounds=bounds,
        bases=bases,
        mask_ids=mask_ids,
        full=base.full or table.whole,
        partial=base.partial or not plain,
        bounds_batch=bounds[0].numel() if owners > 1 else 0,
        list_batch=0,
        groups=routes.groups,
    )
