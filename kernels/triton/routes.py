"""Lists of routed patterns: built on the device from what the router chose, without waiting for it."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
import torch

from visattn.keep import kept
from visattn.kernels.triton.arguments import Work
from visattn.kernels.triton.lists.program import Program, fill_kinds, first_tokens, int32_table, pack, program
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
        order: Of a causal line, else None.
    """

    base: Program
    first: torch.Tensor
    mask: torch.Tensor
    whole: bool
    short: torch.Tensor | None
    order: Order | None = None


@dataclass(frozen=True, eq=False)
class Order:
    """How masks of a causal line follow from where two tiles begin.

    Attributes:
        queries: First token of each query tile: int64 [tiles].
        keys: The same of key tiles.
        masks: How far behind the mask of a column tile the one is that hides later tokens too, by how far a query tile
            begins behind a key tile: int32, from -`first` tokens on in steps of `step`; 0 where nothing is later.
        first: Tokens.
        step: Tokens.
    """

    queries: torch.Tensor
    keys: torch.Tensor
    masks: torch.Tensor
    first: int
    step: int

    def moved(self, queries: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
        """How far behind the masks of pairs of tiles are: int32, like `queries` and `keys`, which broadcast."""
        distance = self.queries[queries] - self.keys[keys]
        return self.masks[((distance + self.first) // self.step).clamp(0, len(self.masks) - 1)]


@kept
def static_part(plan: TilePlan, by_keys: bool, device: torch.device, in_order: bool = False) -> Static:
    """What of a plan's program does not depend on q and k.

    Args:
        plan: The plan.
        by_keys: Whether key tiles are the rows.
        device: Where the tensors go.
        in_order: Whether the grid is a causal line.
    """
    base = program(plan, by_keys, 1, device)
    columns = base.column_tiling
    kind, slots = fill_kinds(columns)
    rows = np.broadcast_to(slots[:, None, :], (len(slots), base.rows, columns.capacity))
    order = None
    if in_order:
        order, rows = _order(plan, by_keys, rows, device)
    more = torch.from_numpy(pack(rows, base.rows, base.columns)).to(device)
    short: np.ndarray = np.logical_not(slots[kind].all(1))
    fits = columns.capacity == base.columns
    whole = fits and not short[columns.grid_tiles].any()
    mixed = fits and not whole and not short[columns.grid_tiles].all()

    mask = int32_table(kind + len(base.masks), device)
    cut = base.partial or not whole or in_order
    return Static(
        replace(base, masks=torch.cat([base.masks, more]), full=base.full or whole, partial=cut),
        int32_table(first_tokens(columns), device),
        mask,
        whole,
        torch.from_numpy(short).to(device) if mixed else None,
        order,
    )


def _order(plan: TilePlan, by_keys: bool, rows: np.ndarray, device: torch.device) -> tuple[Order, np.ndarray]:
    """Masks of a causal line by the distance of two tiles, and all masks: those of column tiles come first.

    Args:
        plan: The plan.
        by_keys: Whether key tiles are the rows.
        rows: Masks of the kinds of column tiles: bool [kinds, rows, columns].
        device: Where the tensors go.
    """
    queries, keys = plan.queries.capacity, plan.keys.capacity
    # From where no query sees a key to where every query sees all.
    step = math.gcd(queries, keys)
    distances = np.arange(-queries, keys + step, step)
    seen = np.arange(keys) <= distances[:, None, None] + np.arange(queries)[:, None]
    seen = seen.transpose(0, 2, 1) if by_keys else seen
    own = np.zeros((len(distances), *rows.shape[1:]), bool)
    own[:, : seen.shape[1]] = seen
    whole = seen.all((1, 2))
    masks = np.where(whole, 0, len(rows) * np.cumsum(~whole))
    both = own[~whole][:, None] & rows
    first = [torch.from_numpy(first_tokens(side).astype(np.int64)).to(device) for side in (plan.queries, plan.keys)]
    table = int32_table(masks, device)
    return Order(first[0], first[1], table, queries, step), np.concatenate([rows, both.reshape(-1, *rows.shape[1:])])


def routed_program(
    plan: TilePlan, by_keys: bool, routes: Routes, merged: Merged | None = None, in_order: bool = False
) -> Program:
    """The program of a routed plan for one batch, without waiting for the device.

    Args:
        plan: A plan of a routed pattern.
        by_keys: Whether key tiles are the rows.
        routes: What `pattern.route` gave.
        merged: Which query blocks of a tile list each entry of `routes`, None where a tile is of one block.
        in_order: Whether the grid is a causal line.
    """
    groups, flat = routes.groups, routes.flat()
    tiles, counts = flat.tiles[:, 0], None if flat.counts is None else flat.counts[:, 0]
    static = static_part(plan, by_keys, tiles.device, in_order)
    owners, queries, number = tiles.shape
    first_query = plan.queries.grid_tiles.start
    first_row = plan.keys.grid_tiles.start if by_keys else first_query
    rows = plan.keys.runs[1] if by_keys else queries
    query = torch.arange(first_query, first_query + queries, device=tiles.device)[:, None]
    # Whole tiles first, which need no mask. Routing keeps the order of its choice.
    sorts = isinstance(plan.pattern, DynamicPattern) and merged is None
    partial = _partial(static, by_keys, query, tiles) if sorts else None
    words = None if merged is None else merged.words.flatten(0, 1).flatten(1)
    if by_keys:
        order, start, split, stop = _transposed(tiles, flat.listed(), first_row, rows, partial)
        column = order // number + first_query
        pairs = column, tiles.flatten(1).gather(1, order)
        words = None if words is None else words.gather(1, order)
    else:
        start = torch.arange(rows, device=tiles.device)[None] * number
        stop = split = start + (number if counts is None else counts)
        if partial is not None:
            tiles, whole = _whole_first(tiles, flat.listed(), partial)
            split = start + whole
        column = tiles.flatten(1)
        pairs = query.expand(tiles.shape).flatten(1), column
    masks = static.mask[column] if static.order is None else static.mask[column] + static.order.moved(*pairs)
    base = static.base if partial is None else replace(static.base, full=True)
    skip = len(base.bases)
    start, split, stop = start + skip, split + skip, stop + skip
    # Grid rows lie behind the dense ones, in their own order: without static visits the sort leaves them alone.
    bounds = base.bounds.expand(owners, -1, -1).clone()
    grid = bounds[:, base.dense_rows :]
    grid[..., 0], grid[..., 2] = start, stop
    grid[..., 1] = split if (static.whole or partial is not None) and merged is None else start
    if merged is not None and words is not None:
        base = _with_words(base, merged, words)
    return replace(
        base,
        bounds=bounds,
        bases=torch.cat([base.bases.expand(owners, -1), static.first[column]], 1),
        mask_ids=torch.cat([base.mask_ids.expand(owners, -1), masks], 1),
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


def _partial(static: Static, by_keys: bool, query: torch.Tensor, tiles: torch.Tensor) -> torch.Tensor | None:
    """Which visits need a mask, where only some do: bool, broadcasts to [owners, query tiles, n]; None elsewhere.

    Args:
        static: Of the plan.
        by_keys: Whether key tiles are the rows.
        query: Each grid query tile: [query tiles, 1].
        tiles: Key tiles that each lists: [owners, query tiles, n].
    """
    short = None if static.short is None else static.short[query if by_keys else tiles]
    if static.order is None or not (static.whole or short is not None):
        return short
    later = static.order.moved(query, tiles) > 0
    return later if short is None else later | short


def _whole_first(
    tiles: torch.Tensor, listed: torch.Tensor | None, partial: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Lists [owners, query tiles, n] with what needs no mask in front, else in order, and how much that is."""
    number = tiles.shape[2]
    whole = ~partial if listed is None else ~partial & listed[:, 0]
    partial = partial if listed is None else partial & listed[:, 0]
    count = whole.sum(-1, keepdim=True)
    place = torch.where(whole, whole.cumsum(-1) - 1, count + partial.cumsum(-1) - 1)
    # What does not count goes behind the end.
    place = place.masked_fill(~(whole | partial), number)
    moved = tiles.new_zeros(*tiles.shape[:2], number + 1).scatter(2, place, tiles)
    # Zeros behind the lists are tiles like any other.
    return moved[..., :number], count[..., 0]


def _transposed(
    tiles: torch.Tensor, listed: torch.Tensor | None, first: int, rows: int, partial: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """The entries that name each grid key tile: [owners, entries], and where its own start, turn partial and stop.

    Args:
        tiles: Key tiles of each grid query tile: [owners, query tiles, n].
        listed: Which of them count: bool [owners, 1, query tiles, n], None for all.
        first: The first grid key tile.
        rows: Grid key tiles.
        partial: Which of them need a mask and go behind the others, None for none; broadcasts to `tiles`.
    """
    # What does not count goes behind the lists of all key tiles.
    kept = 2 * (tiles if listed is None else tiles.masked_fill(~listed[:, 0], first + rows))
    keys, order = (kept if partial is None else kept + partial.long()).flatten(1).sort(dim=1, stable=True)
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
            in_order = self._blocks.in_order
            self._programs[direction] = routed_program(plan, direction == "key_grad", own.routes, own, in_order)
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
