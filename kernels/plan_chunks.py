"""A tile plan as chunks of query tiles with equally many key tiles, for engines made of plain operators."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch.utils.checkpoint import checkpoint

from visattn.keep import kept
from visattn.kernels.unchanged import once_more
from visattn.plans import TilePlan
from visattn.tiling import Ints

# Products of a query and a key that exist at a time, all samples and heads together (16 MiB in float32) ...
PRODUCTS = 2**22
# ... and on a GPU, where what a chunk costs the host matters: as many for each GiB of memory, and at most.
PER_GIB, MOST = 2**20, 2**26


@dataclass(frozen=True, eq=False)
class Chunk:
    """Some query tiles.

    Attributes:
        rows: Index of each query tile: [c].
        queries: Token of each slot, any token for empty slots: [c, T].
        tiles: Their key tiles: [c, m].
        keys: Token of each slot of those: any token for empty slots: [c, m * L].
        seen: Which of them a query sees: bool [c, T, m * L], False for empty key slots.
        valid: Which of them exist: bool [c, m * L].
    """

    rows: torch.Tensor
    queries: torch.Tensor
    tiles: torch.Tensor
    keys: torch.Tensor
    seen: torch.Tensor
    valid: torch.Tensor

    def shown(self, seen: torch.Tensor, key_mask: torch.Tensor | None) -> torch.Tensor:
        """Pairs [c, T, m * L] without the keys that are masked out: bool [1 or B, c, T, m * L]."""
        return seen[None] if key_mask is None else seen[None] & key_mask[:, self.keys][:, :, None]


@dataclass(frozen=True, eq=False)
class PlanTables:
    """What all chunks of a plan look up, on one device.

    Attributes:
        query_tokens: Token of each slot, -1 for none: [query tiles, T].
        key_tokens: The same of key tiles: [key tiles, L].
        masks: The plan's masks and a last one that is all True: [masks + 1, T, L].
        place: Where each token is among the slots of all query tiles, in the order of `rows`: [S].
        groups: Query tiles and their entries [n, m] in the lists, by number of entries.
    """

    query_tokens: torch.Tensor
    key_tokens: torch.Tensor
    masks: torch.Tensor
    place: torch.Tensor
    groups: tuple[tuple[Ints, Ints], ...]


@kept
def plan_tables(plan: TilePlan, device: torch.device, partial: bool = False) -> PlanTables:
    """The tables of a plan; with `partial` only the entries with a mask and real key tiles count."""
    lists = plan.lists
    keep = np.ones(len(lists.tile), bool)
    if partial:
        keep = (lists.mask >= 0) & (lists.tile < plan.keys.tiles - plan.keys.runs[3])
    index = np.flatnonzero(keep)
    counts = np.bincount(lists.rows[keep], minlength=plan.queries.tiles)
    start = np.concatenate([[0], np.cumsum(counts)])
    groups = []
    for count in np.unique(counts):
        rows = np.flatnonzero(counts == count)
        groups.append((rows, index[start[rows][:, None] + np.arange(count)]))
    order = np.concatenate([rows for rows, _ in groups])
    tokens = plan.queries.tokens[order].ravel()
    place = np.empty(plan.layout.length, np.int64)
    place[tokens[tokens >= 0]] = np.flatnonzero(tokens >= 0)
    everything = np.ones((1, plan.queries.capacity, plan.keys.capacity), bool)
    masks = np.concatenate([plan.masks, everything])
    arrays = (plan.queries.tokens, plan.keys.tokens, masks, place)
    return PlanTables(*(torch.from_numpy(a).to(device) for a in arrays), groups=tuple(groups))


def products(device: torch.device) -> int:
    """Products that exist at a time on a device; by all of its memory, so that equal calls are cut alike."""
    if device.type != "cuda":
        return PRODUCTS
    memory = torch.cuda.get_device_properties(device).total_memory
    return max(PRODUCTS, min(MOST, PER_GIB * memory // 2**30))


def chunks(plan: TilePlan, tables: PlanTables, weight: int, fixed: int = 0) -> Iterator[Chunk]:
    """Cut a plan in chunks of at most `products`, but at least one query tile.

    Args:
        plan: The plan.
        tables: Its tables.
        weight: Samples times heads.
        fixed: Numbers per sample, head and query tile that a chunk needs besides its products.
    """
    device = tables.masks.device
    most = products(device)
    for rows, entries in tables.groups:
        each = entries.shape[1] * plan.queries.capacity * plan.keys.capacity + fixed
        size = max(1, most // max(1, weight * each))
        for start in range(0, len(rows), size):
            part, entry = rows[start : start + size], entries[start : start + size]
            tiles = torch.from_numpy(plan.lists.tile[entry]).to(device)
            which = torch.from_numpy(plan.lists.mask[entry]).to(device)
            index = torch.from_numpy(part).to(device)
            keys = tables.key_tokens[tiles].flatten(1)
            seen = tables.masks[which].transpose(1, 2).flatten(2)
            queries = tables.query_tokens[index].clamp(min=0)
            yield Chunk(index, queries, tiles, keys.clamp(min=0), seen, keys >= 0)


def run_chunks(
    plan: TilePlan,
    tables: PlanTables,
    weight: int,
    compute: Callable[[Chunk], torch.Tensor],
    read: Sequence[torch.Tensor | None] | None,
    fixed: int = 0,
) -> torch.Tensor:
    """Results of all query tiles as tokens.

    Args:
        plan: The plan.
        tables: Its tables.
        weight: Samples times heads.
        compute: Gives [B, c, T, ...] for a chunk; runs again in the backward, which keeps nothing of it.
        read: The tensors that it reads, where gradients will be asked for; None elsewhere.
        fixed: As in `chunks`.

    Returns:
        [B, S, ...].
    """
    run = compute if read is None else _checkpointed(once_more(compute, read))
    parts = [run(chunk).flatten(1, 2) for chunk in chunks(plan, tables, weight, fixed)]
    return torch.cat(parts, 1)[:, tables.place]


def _checkpointed(compute: Callable[[Chunk], torch.Tensor]) -> Callable[[Chunk], torch.Tensor]:
    return lambda chunk: checkpoint(compute, chunk, use_reentrant=False, preserve_rng_state=False)


def tiled(x: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Tokens of tiles [n, T] from [B, S, H, D]: [B, H, n, T, D]."""
    return x[:, tokens].permute(0, 3, 1, 2, 4)
