"""Lists of routed patterns: built on the device from what the router chose, without waiting for it."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch

from visattn.keep import kept
from visattn.kernels.triton.arguments import Work
from visattn.kernels.triton.lists.program import Program, fill_kinds, first_tokens, pack, program
from visattn.patterns import DynamicPattern, Routes
from visattn.patterns.choice.blocks import Blocks
from visattn.patterns.choice.merging import Merged, merge
from visattn.plans import TilePlan


@dataclass(frozen=True, eq=False)
class Static:
    """What of a routed program does not depend on q and k.

    Attributes:
        base: The program of the dense tokens; its grid rows visit no grid column yet.
        first: First token of each column tile: int32 [column tiles].
        mask: Mask of each column tile, which hides its empty slots: int32 [column tiles].
        whole: Whether no grid column tile has empty slots, so that routed visits need no mask.
        short: Which column tiles have empty slots, where only some grid ones have: bool [column tiles], else None.
    """

    base: Program
    first: torch.Tensor
    mask: torch.Tensor
    whole: bool
    short: torch.Tensor | None


@kept
def static_part(plan: TilePlan, by_keys: bool, device: torch.device) -> Static:
    """What of a plan's program does not depend on q and k."""
    base = program(plan, by_keys, 1, device)
    columns = base.column_tiling
    kind, slots = fill_kinds(columns)
    rows = np.broadcast_to(slots[:, None, :], (len(slots), base.rows, columns.capacity))
    more = torch.from_numpy(pack(rows, base.rows, base.columns)).to(device)
    short: np.ndarray = np.logical_not(slots[kind].all(1))
    fits = columns.capacity == base.columns
    whole = fits and not short[columns.grid_tiles].any()
    mixed = fits and not whole and not short[columns.grid_tiles].all()

    def tensor(array: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(array.astype(np.int32)).to(device)

    mask = tensor(kind + len(base.masks))
    return Static(
        replace(base, masks=torch.cat([base.masks, more]), full=base.full or whole, partial=base.partial or not whole),
        tensor(first_tokens(columns)),
        mask,
        whole,
        torch.from_numpy(short).to(device) if mixed else None,
    )


def routed_program(plan: TilePlan, by_keys: bool, routes: Routes, merged: Merged | None = None) -> Program:
    """The program of a routed plan for one batch, without waiting for the device.

    Args:
        plan: A plan of a routed pattern.
        by_keys: Whether key tiles are the rows.
        routes: What `pattern.route` gave.
        merged: Which query blocks of a tile list each entry of `routes`, None where a tile is of one block.
    """
    groups, flat = routes.groups, routes.flat()
    tiles, counts = flat.tiles[:, 0], None if flat.counts is None else flat.counts[:, 0]
    static = static_part(plan, by_keys, tiles.device)
    owners, queries, number = tiles.shape
    first_row = plan.keys.grid_tiles.start if by_keys else plan.queries.grid_tiles.start
    rows = plan.keys.runs[1] if by_keys else queries
    # Whole tiles first, which need no mask. Routing keeps the order of its choice.
    short = static.short if isinstance(plan.pattern, DynamicPattern) and merged is None else None
    words = None if merged is None else merged.words.flatten(0, 1).flatten(1)
    if by_keys:
        own = None if short is None else short[plan.queries.grid_tiles]
        order, start, split, stop = _transposed(tiles, flat.listed(), first_row, rows, own)
        column = order // number + plan.queries.grid_tiles.start
        words = None if words is None else words.gather(1, order)
    else:
        start = torch.arange(rows, device=tiles.device)[None] * number
        stop = split = start + (number if counts is None else counts)
        if short is not None:
            tiles, whole = _whole_first(tiles, flat.listed(), short)
            split = start + whole
        column = tiles.flatten(1)
    base = static.base if short is None else replace(static.base, full=True)
    skip = len(base.bases)
    start, split, stop = start + skip, split + skip, stop + skip
    # Grid rows lie behind the dense ones, in their own order: without static visits the sort leaves them alone.
    bounds = base.bounds.expand(owners, -1, -1).clone()
    grid = bounds[:, base.dense_rows :]
    grid[..., 0], grid[..., 2] = start, stop
    grid[..., 1] = split if (static.whole or short is not None) and merged is None else start
    if merged is not None and words is not None:
        base = _with_words(base, merged, words)
    return replace(
        base,
        bounds=bounds,
        bases=torch.cat([base.bases.expand(owners, -1), static.first[column]], 1),
        mask_ids=torch.cat([base.mask_ids.expand(owners, -1), static.mask[column]], 1),
        bounds_batch=bounds[0].numel() if owners > 1 else 0,
        list_batch=skip + queries * number,
        groups=groups,
    )


def _with_words(base: Program, merged: Merged, words: torch.Tensor) -> Program:
    """A program whose grid entries have masks, and the words [owners, entries] behind those of the dense rows' visits.

    Every block sees what dense tokens visit, and they see every block.
    """
    everybody = words.new_full((len(words), len(base.bases)), -1)
    # Rows and columns may both be queries: slots behind those of a tile are empty.
    bits = torch.nn.functional.pad(merged.slots.to(torch.int32), (0, max(base.rows, base.columns) - len(merged.slots)))
    full = base.full and base.dense_rows > 0
    return replace(base, full=full, partial=True, words=torch.cat([everybody, words], 1), bits=bits)


def _whole_first(
    tiles: torch.Tensor, listed: torch.Tensor | None, short: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Lists [owners, query tiles, n] with their whole tiles in front, else in order, and how many those are."""
    number = tiles.shape[2]
    partial = short[tiles] if listed is None else short[tiles] & listed[:, 0]
    whole = ~short[tiles] if listed is None else ~short[tiles] & listed[:, 0]
    count = whole.sum(-1, keepdim=True)
    place = torch.where(whole, whole.cumsum(-1) - 1, count + partial.cumsum(-1) - 1)
    # What does not count goes behind the end.
    place = place.masked_fill(~(whole | partial), number)
    moved = tiles.new_zeros(*tiles.shape[:2], number + 1).scatter(2, place, tiles)
    # Zeros behind the lists are tiles like any other.
    return moved[..., :number], count[..., 0]


def _transposed(
    tiles: torch.Tensor, listed: torch.Tensor | None, first: int, rows: int, short: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """The entries that name each grid key tile: [owners, entries], and where its own start, turn partial and stop.

    Args:
        tiles: Key tiles of each grid query tile: [owners, query tiles, n].
        listed: Which of them count: bool [owners, 1, query tiles, n], None for all.
        first: The first grid key tile.
        rows: Grid key tiles.
        short: Which grid query tiles have empty slots and go behind the others, None for none.
    """
    queries = tiles.shape[1]
    # What does not count goes behind the lists of all key tiles.
    kept = tiles if listed is None else tiles.masked_fill(~listed[:, 0], first + rows)
    ranks = torch.zeros(queries, dtype=torch.int64, device=tiles.device) if short is None else short.long()
    keys, order = (2 * kept + ranks[:, None]).flatten(1).sort(dim=1, stable=True)
    wanted = 2 * torch.arange(first, first + rows, device=tiles.device).expand(len(tiles), -1)
    start, split, stop = (torch.searchsorted(keys, (wanted + more).contiguous()) for more in (0, 1, 2))
    return order, start, split, stop


class MergedLists:
    """The lists of one call of a pattern whose query blocks share tiles, made when a direction asks for them.

    Args:
        choice: Key blocks of each query block.
        blocks: The blocks.
        work: What calls that are alike share; its pattern cuts the tiles.
    """

    def __init__(self, choice: Routes, blocks: Blocks, work: Work) -> None:
        self._choice, self._blocks, self._work = choice, blocks, work
        self._merged: dict[TilePlan, Merged] = {}
        self._programs: dict[str, Program] = {}

    def program(self, direction: str) -> Program:
        """The lists of a direction."""
        if direction not in self._programs:
            plan = self._work.plan(direction)
            if plan not in self._merged:
                self._merged[plan] = merge(self._choice, plan, self._blocks)
            own = self._merged[plan]
            self._programs[direction] = routed_program(plan, direction == "key_grad", own.routes, own)
        return self._programs[direction]

    def addresses(self, direction: str) -> list[int]:
        """Its bounds, bases, masks and words."""
        return [t.data_ptr() for t in self.program(direction).own_lists]


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
        return [t.data_ptr() for t in self._programs[direction].own_lists]
