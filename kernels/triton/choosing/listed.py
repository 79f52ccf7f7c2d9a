"""The lists of one call of a dynamic pattern: those of query tiles by a kernel, those of key tiles by torch."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

import torch

from visattn.keep import CALL_BYTES, STORE
from visattn.kernels.triton.again import Again
from visattn.kernels.triton.arguments import Work
from visattn.kernels.triton.choosing.lists import write_lists
from visattn.kernels.triton.choosing.pooled import Rest
from visattn.kernels.triton.choosing.tables import Tables, tables, writes_lists
from visattn.kernels.triton.lists.program import Program
from visattn.kernels.triton.routes import routed_program
from visattn.kernels.triton.start import launch_like, on, recording
from visattn.patterns import DynamicPattern, Routes
from visattn.plans import TilePlan

# Common entries that are copied at once.
COPY = 128
# Entries up to which a list is the work of a single warp, and of four.
SHORT, LONG = 256, 2048


class Way(NamedTuple):
    """How the lists of a direction are made, which calls that are alike share.

    Attributes:
        plan: Its tiles.
        key: What directions with the same lists have in common.
        table: What the kernel that writes them reads; None where operators of torch make them.
    """

    plan: TilePlan
    key: Any
    table: Tables | None


def way_of(work: Work, direction: str, device: torch.device) -> Way:
    """How the lists of a direction are made, found once."""
    found = work.ways.get(direction)
    if found is None:
        plan, pattern, step = work.plan(direction), work.pattern, work.configs[direction].per_step
        assert isinstance(pattern, DynamicPattern)
        written = direction != "key_grad" and writes_lists(pattern, plan)
        table = tables(plan, pattern.blocks(plan.layout.grid), step, device) if written else None
        # Where query tiles are the same in two directions, so are their lists.
        found = work.ways[direction] = Way(plan, direction if direction == "key_grad" else (plan, step), table)
    return found


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
        # Lists that were written again: they are tensors only where somebody asks for their program.
        self._written: dict[Any, Written] = {}

    def program(self, direction: str) -> Program:
        """The lists that a kernel walks."""
        way = way_of(self._work, direction, self._routes.tiles.device)
        if way.key not in self._programs:
            written = self._written.get(way.key)
            self._programs[way.key] = self._made(way) if written is None else written.program()
        return self._programs[way.key]

    def addresses(self, direction: str) -> list[int]:
        """Where their bounds, bases and masks are."""
        way = way_of(self._work, direction, self._routes.tiles.device)
        if way.key not in self._programs:
            if way.key not in self._written and way.table is not None:
                written = written_again(way.table, self._routes)
                if written is not None:
                    self._written[way.key] = written
            if way.key in self._written:
                return self._written[way.key].addresses()
        return [t.data_ptr() for t in self.program(direction).own_lists]

    def _made(self, way: Way) -> Program:
        if way.table is not None:
            return listed_program(way.table, self._routes)
        tiles, counts = self._routes
        wide = Routes(tiles.long(), None if counts is None else counts.long())
        pattern = self._work.pattern
        assert isinstance(pattern, DynamicPattern)
        in_order = pattern.blocks(way.plan.layout.grid).in_order
        return routed_program(way.plan, way.key == "key_grad", pattern.spread(wide, way.plan), in_order=in_order)


class Prepared(NamedTuple):
    """What writes the lists of query tiles of calls that are alike.

    Attributes:
        again: The launch.
        program: Those of the first call, whose own tensors are stand-ins without memory.
    """

    again: Again
    program: Program


class Written(NamedTuple):
    """Lists in one buffer.

    Attributes:
        by: What wrote them.
        buffer: Where they are.
    """

    by: Prepared
    buffer: torch.Tensor

    def addresses(self) -> list[int]:
        """Where their bounds, bases and masks are."""
        return self.by.again.addresses(self.buffer)

    def program(self) -> Program:
        """The lists as tensors."""
        bounds, bases, mask_ids = self.by.again.tensors(self.buffer)
        return replace(self.by.program, bounds=bounds, bases=bases, mask_ids=mask_ids)


def _key(table: Tables, routes: Routes) -> Any:
    """What calls have in common whose lists one launch writes; None where the kernel reads copies."""
    tiles, counts = routes
    given = (tiles,) if counts is None else (tiles, counts)
    if any(t.dtype != torch.int32 or not t.is_contiguous() for t in given):
        return None
    return listed_program, table, tiles.shape, len(given)


def written_again(table: Tables, routes: Routes) -> Written | None:
    """The lists of query tiles by the launch of an earlier call like this one, None where there was none."""
    key = _key(table, routes)
    entry = None if key is None else STORE.find(key)
    if entry is None:
        return None
    tiles, counts = routes
    made = entry.value.again(tiles) if counts is None else entry.value.again(tiles, counts)
    return None if made is None or made.buffer is None else Written(entry.value, made.buffer)


def listed_program(table: Tables, routes: Routes) -> Program:
    """The program of query tiles, without waiting for the device.

    Args:
        table: Its tables.
        routes: Key blocks of each query block: [B, G, blocks, n].
    """
    base, (tiles, counts), key = table.base, routes, _key(table, routes)
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
    with on(tiles.device), recording() as launches:
        launch_like(
            write_lists, (base.row_tiles, owners), given, 1 if power <= SHORT else 4 if power <= LONG else 8, None
        )
    # Without a mask only where every list is a whole number of steps of whole tiles.
    plain = table.even and counts is None and length % step == 0
    made = replace(
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
    if key is not None and all(start is not None for start, _ in launches):
        own = (tiles,) if counts is None else (tiles, counts)
        again = Again(launches, own, (), (bounds, bases, mask_ids))
        # What is kept holds no list of this call.
        empty = {name: getattr(made, name).to("meta") for name in ("bounds", "bases", "mask_ids")}
        STORE.put(key, Prepared(again, replace(made, **empty)), CALL_BYTES)
    return made
