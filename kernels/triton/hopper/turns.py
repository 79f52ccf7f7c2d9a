"""Whose turn it is to add to dQ of a query tile: lists of key tiles as the one-pass kernel walks them."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch

from visattn.keep import kept
from visattn.kernels.triton.lists.program import Program, program
from visattn.patterns.geometry import Bools
from visattn.plans import TilePlan
from visattn.tiling import Ints, Tiling


class Turns(NamedTuple):
    """Lists of key tiles by turns, in the order in which the programs of a sequence and head start.

    Attributes:
        run: The program of the same lists in another order.
        rows: Token of each slot of the key tiles, -1 for none: int32 [rows, slots].
        bounds: As those of `run`: int32 [rows, 4].
        bases: First token of each entry's query tile: int32 [entries].
        visits: Query tile of each entry among those of the grid, how many programs that start earlier visit it, its
            mask (-1 for none), 0: int32 [entries, 4].
        masks: As those of `run`, which leave open what slots without a key see: these see nothing.
        columns: Token of each slot of the query tiles, -1 for none: int32 [tiles, slots].
        partial: Whether any visit has a mask.
    """

    run: Program
    rows: torch.Tensor
    bounds: torch.Tensor
    bases: torch.Tensor
    visits: torch.Tensor
    masks: torch.Tensor
    columns: torch.Tensor
    partial: bool


@kept
def turns(plan: TilePlan, device: torch.device) -> Turns:
    """The lists of a plan by turns.

    Programs of neighbouring key tiles start one after the other, and each visits first whose turn comes first: with
    windows the n-th visit of each is the turn of about number n, so that programs that start together hardly wait.
    """
    here = program(plan, True, 1, torch.device("cpu"), False)
    rows, bounds, bases = here.tokens.numpy(), here.bounds.numpy(), here.bases.numpy()
    # Grid rows as they lie on the grid; those of dense tokens stay in front.
    grid = rows[here.dense_rows :]
    where = np.argsort(_tiles(plan.keys)[grid.max(1)], kind="stable") + here.dense_rows
    order = np.concatenate([np.arange(here.dense_rows), where])
    rows, bounds = rows[order], bounds[order]
    start, split, stop = bounds[:, 0], bounds[:, 1], bounds[:, 2]
    counts = stop - start
    row = np.repeat(np.arange(len(counts)), counts)
    entry = np.arange(len(row)) - np.repeat(np.cumsum(counts) - counts, counts) + np.repeat(start, counts)
    tile = _tiles(plan.queries)[bases[entry]] - plan.queries.grid_tiles.start
    by_tile = np.lexsort((row, tile))
    turn = np.empty(len(row), np.int64)
    turn[by_tile] = np.arange(len(row)) - np.searchsorted(tile[by_tile], tile[by_tile])
    mask = np.where(entry >= np.repeat(split, counts), here.mask_ids.numpy()[entry], -1)
    mask, masks = _of_filled(rows[row] >= 0, mask, here.masks.numpy())
    walk = np.lexsort((tile, turn, row))
    # Back to where each row's list lies.
    visits = np.zeros((len(bases), 4), np.int32)
    visits[entry, :3] = np.stack([tile, turn, mask], 1)[walk]
    ordered = np.zeros(len(bases), np.int32)
    ordered[entry] = bases[entry[walk]]
    tiles = plan.queries.grid_tiles
    columns = np.full((tiles.stop - tiles.start, here.columns), -1, np.int32)
    columns[:, : plan.queries.capacity] = plan.queries.tokens[tiles.start : tiles.stop]

    def put(x: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(np.ascontiguousarray(x)).to(device)

    run, partial = program(plan, True, 1, device, False), bool((mask >= 0).any())
    return Turns(run, put(rows), put(bounds), put(ordered), put(visits), put(masks), put(columns), partial)


def _of_filled(filled: Bools, mask: Ints, masks: Ints) -> tuple[Ints, Ints]:
    """Masks of visits under which rows without a key see nothing: of each visit, and the distinct ones.

    What such a row would add to dK and dV is not stored, but to dQ it is added.
    """
    kinds, kind = np.unique(filled, axis=0, return_inverse=True)
    padded = (kinds.sum(axis=1) < kinds.shape[1])[kind.ravel()]
    pairs, which = np.unique(np.stack([kind.ravel()[padded], mask[padded]], 1), axis=0, return_inverse=True)
    open_ones = np.concatenate([masks, np.full((1, *masks.shape[1:]), -1, masks.dtype)])
    more = np.where(kinds[pairs[:, 0], :, None], open_ones[pairs[:, 1]], 0)
    mask = mask.copy()
    mask[padded] = len(masks) + which.ravel()
    return mask, np.concatenate([masks, more.astype(masks.dtype)])


def _tiles(tiling: Tiling) -> Ints:
    """The tile of each token."""
    tile, slot = np.nonzero(tiling.tokens >= 0)
    found = np.full(int(tiling.tokens.max()) + 1, -1)
    found[tiling.tokens[tile, slot]] = tile
    return found
