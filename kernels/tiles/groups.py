"""Query tiles whose key lists are equally long, as batches of small attention problems: where each token sits."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch

from visattn.patterns import Routes
from visattn.patterns.choice.merging import Merged
from visattn.plans import TilePlan
from visattn.tiling import Ints


@dataclass(eq=False)
class Group:
    """Problems of one shape: n query tiles of T tokens that each see L keys.

    The keys are the first `whole` tokens in order, or a box around each tile (`base` + `offsets`), or a list of key
    tiles (`key_tiles` into `tile_tokens`). Token indices count within one sample; -1 is an empty slot of a short tile.

    Attributes:
        queries: Query tokens: [n, T].
        whole: Number of leading tokens that are the keys, 0 for one of the other two forms.
        base: First key of each tile's box: [n, 1].
        offsets: Keys of a box, relative to its first: [1, keys].
        key_tiles: Key tiles of each query tile [n, m], or of each sample's tiles if `routed` [B * n, m].
        tile_tokens: Tokens of all key tiles: [tiles, slots].
        fixed: Key tokens that every tile sees behind those (dense and pooled ones): [E].
        shared: Visibility for all tiles alike, bool [T, L], or None where every key is visible.
        mask: Index into `masks` of each key tile: [n, m].
        masks: Distinct masks of a key tile, the last one all True: bool [masks, T, slots].
        rpb_index: Where the bias of each pair sits in the flattened rpb (one past its end means 0): [T, L].
        short_queries: Whether `queries` has empty slots.
        short_keys: Whether empty key slots must be hidden beyond what the masks say.
        routed: Whether `key_tiles` differ from sample to sample.
        counts: Of a routed group, how many of its m key tiles each problem sees [B * n], None for all.
        rest: Of a routed group, what is added to the scores of the last keys (pooled ones), -inf for those that are not
            seen: [B * n, R]; None without such keys.
        words: Of a routed group whose tiles hold several query blocks, which of them list each key tile, a bit each:
            int64 [B * n, m]; None where a tile is of one block.
        bits: With `words`, the bit of each query slot: int64 [T].
        in_order: Of a routed group, whether queries see no later token of the listed tiles.
    """

    queries: torch.Tensor
    whole: int = 0
    base: torch.Tensor | None = None
    offsets: torch.Tensor | None = None
    key_tiles: torch.Tensor | None = None
    tile_tokens: torch.Tensor | None = None
    fixed: torch.Tensor | None = None
    shared: torch.Tensor | None = None
    mask: torch.Tensor | None = None
    masks: torch.Tensor | None = None
    rpb_index: torch.Tensor | None = None
    short_queries: bool = False
    short_keys: bool = False
    routed: bool = False
    counts: torch.Tensor | None = None
    rest: torch.Tensor | None = None
    words: torch.Tensor | None = None
    bits: torch.Tensor | None = None
    in_order: bool = False

    @property
    def listed(self) -> bool:
        """Whether the keys are listed and the same for every sample."""
        return not self.whole and not self.routed

    @property
    def length(self) -> int:
        """Keys per problem."""
        own = self.whole
        if self.offsets is not None:
            own = self.offsets.shape[1]
        elif self.key_tiles is not None and self.tile_tokens is not None:
            own = self.key_tiles.shape[1] * self.tile_tokens.shape[1]
        return own + (0 if self.fixed is None else len(self.fixed))

    def keys(self, sample: torch.Tensor, tile: torch.Tensor) -> torch.Tensor | None:
        """Key tokens of some problems: [problems, L]; None where they are the leading ones."""
        if self.offsets is not None and self.base is not None:
            keys = self.base[tile] + self.offsets
        elif self.key_tiles is not None and self.tile_tokens is not None:
            row = sample * len(self.queries) + tile if self.routed else tile
            keys = self.tile_tokens[self.key_tiles[row]].flatten(1)
        else:
            return None
        return keys if self.fixed is None else torch.cat([keys, self.fixed.expand(len(tile), -1)], 1)

    def lengths(self, problem: torch.Tensor) -> torch.Tensor | None:
        """Which keys the counts and the rest of a routed group let some problems see: bool [problems, L], or None."""
        if self.counts is None and self.rest is None:
            return None
        shown = torch.ones(len(problem), self.length, dtype=torch.bool, device=problem.device)
        if self.counts is not None and self.key_tiles is not None and self.tile_tokens is not None:
            number, slots = self.key_tiles.shape[1], self.tile_tokens.shape[1]
            listed = torch.arange(number, device=problem.device) < self.counts[problem, None]
            shown[:, : number * slots] = listed.repeat_interleave(slots, 1)
        if self.rest is not None:
            shown[:, self.length - self.rest.shape[1] :] = self.rest[problem].isfinite()
        return shown

    def rows_see(self, problem: torch.Tensor | slice, number: int) -> torch.Tensor | None:
        """Which tokens of their first `number` key tiles the queries of some problems see: bool [problems, T, tokens].

        None where all queries of a tile see the same; what is hidden from all of them is not told.
        """
        if self.key_tiles is None or self.tile_tokens is None or (self.words is None and not self.in_order):
            return None
        seen, slots = None, self.tile_tokens.shape[1]
        if self.words is not None and self.bits is not None:
            listed = ((self.words[problem][:, None, :number] >> self.bits[:, None]) & 1) != 0
            seen = listed.repeat_interleave(slots, 2)
        if self.in_order:
            tile = torch.arange(len(self.key_tiles), device=self.queries.device)[problem] % len(self.queries)
            queries, keys = self.queries[tile][..., None], self.tile_tokens[self.key_tiles[problem][:, :number]]
            # What an empty slot of queries sees does not matter, as long as it sees something.
            earlier = (keys.flatten(1)[:, None] <= queries) | (queries < 0)
            seen = earlier if seen is None else seen & earlier
        return seen

    def cut(self, size: int) -> Iterator[tuple[Group, torch.Tensor]]:
        """The problems of a routed group in batches, the longest lists first, as [problems] and a group so long.

        Args:
            size: Keys of a batch.
        """
        assert self.counts is not None and self.key_tiles is not None and self.tile_tokens is not None
        # The tile engine makes its batches on the host.
        order = self.counts.sort(descending=True, stable=True).indices
        counts = self.counts[order].tolist()
        each, more, start = (
            self.tile_tokens.shape[1],
            self.length - self.key_tiles.shape[1] * self.tile_tokens.shape[1],
            0,
        )
        while start < len(counts):
            # A batch without any key still has results.
            number = max(1, counts[start])
            stop = start + max(1, size // max(1, number * each + more))
            words = None if self.words is None else self.words[:, :number]
            yield replace(self, key_tiles=self.key_tiles[:, :number], words=words), order[start:stop]
            start = stop

    def visible(self, tile: torch.Tensor | None) -> torch.Tensor | None:
        """Visibility of the keys of some tiles: bool [1 or problems, T, L]; None where all are visible.

        Without `tile` it is that of all tiles, if they are alike.
        """
        if self.mask is None or self.masks is None:
            return None if self.shared is None else self.shared[None]
        return self.masks[self.mask[tile]].transpose(1, 2).flatten(2)


@dataclass(frozen=True, eq=False)
class Problems:
    """All problems of a call.

    Attributes:
        groups: The problems by shape.
        kept: Batches that were cut before, by what they depend on; see `tiles_batches`.
    """

    groups: tuple[Group, ...]
    kept: dict[Any, Any] = field(default_factory=dict, repr=False)

    @cached_property
    def routed(self) -> tuple[Group, ...]:
        """Those that differ from sample to sample."""
        return tuple(group for group in self.groups if group.routed)


def whole_sequence(queries: Ints, keys: int, device: torch.device) -> Group:
    """One problem: these query tokens see the first `keys` tokens."""
    return Group(torch.from_numpy(queries[None]).to(device), whole=keys)


def listed_sequence(queries: Ints, keys: Ints, device: torch.device) -> Group:
    """One problem: these query tokens see these key tokens."""
    own = torch.zeros(1, 1, dtype=torch.int64, device=device)
    tokens = torch.from_numpy(keys[None]).to(device)
    return Group(torch.from_numpy(queries[None]).to(device), key_tiles=own, tile_tokens=tokens)


def list_groups(plan: TilePlan, device: torch.device) -> Iterator[Group]:
    """The problems of the grid's query tiles of any plan, by number of key tiles and by their masks.

    Tiles that share all masks make a group of their own, where the mask is stored once; the rest looks its
    masks up tile by tile.
    """
    grid = np.arange(plan.queries.tiles)[plan.queries.grid_tiles]
    counts = plan.lists.counts[grid]
    masks = torch.from_numpy(np.concatenate([plan.masks, np.ones_like(plan.masks[:1])])).to(device)
    tokens = torch.from_numpy(plan.keys.tokens).to(device)
    for count in np.unique(counts[counts > 0]):
        tiles = grid[counts == count]
        entry = plan.lists.start[tiles][:, None] + np.arange(count)
        for members in _by_masks(plan.lists.mask[entry]):
            yield _list_group(plan, tiles[members], entry[members], tokens, masks)


def _by_masks(mask: Ints, least: int = 4) -> Iterator[Ints]:
    """Rows of `mask` by equal content where at least `least` agree, then the others together."""
    _, which, size = np.unique(mask, axis=0, return_inverse=True, return_counts=True)
    which = which.ravel()
    for i in np.flatnonzero(size >= least):
        yield np.flatnonzero(which == i)
    rest = np.flatnonzero(size[which] < least)
    if len(rest):
        yield rest


def _list_group(plan: TilePlan, tiles: Ints, entry: Ints, tokens: torch.Tensor, masks: torch.Tensor) -> Group:
    queries, mask, device = plan.queries.tokens[tiles], plan.lists.mask[entry], tokens.device
    group = Group(
        queries=torch.from_numpy(queries).to(device),
        key_tiles=torch.from_numpy(plan.lists.tile[entry]).to(device),
        tile_tokens=tokens,
        short_queries=bool((queries < 0).any()),
    )
    if (mask >= 0).any():
        index = torch.from_numpy(mask).to(device)
        if (mask == mask[0]).all():
            group.shared = masks[index[0]].transpose(0, 1).flatten(1)
        else:
            group.mask, group.masks = index, masks
    return group


def routed_group(
    plan: TilePlan,
    routes: Routes,
    fixed: torch.Tensor | None,
    rest: torch.Tensor | None = None,
    merged: Merged | None = None,
    in_order: bool = False,
) -> Group:
    """The problems of a routed pattern's grid query tiles.

    Args:
        plan: A plan of the pattern.
        routes: Key tiles that the pattern chose, one list per sample for all heads.
        fixed: Dense and pooled key tokens, or None; those with a weight in `rest` come last.
        rest: What is added to the scores of pooled keys: [B, 1, grid query tiles, R], or None.
        merged: Which query blocks of a tile list each key tile, None where a tile is of one block.
        in_order: Whether queries see no later token of the tiles.
    """
    assert routes.groups == 1, "heads that choose for themselves are samples of their own"
    queries = plan.queries.tokens[plan.queries.grid_tiles]
    return Group(
        queries=torch.from_numpy(queries).to(routes.tiles.device),
        key_tiles=routes.tiles.flatten(0, 2),
        tile_tokens=torch.from_numpy(plan.keys.tokens).to(routes.tiles.device),
        fixed=fixed,
        short_queries=bool((queries < 0).any()),
        short_keys=bool((plan.keys.tokens[plan.keys.grid_tiles] < 0).any()),
        routed=True,
        counts=None if routes.counts is None else routes.counts.flatten(),
        rest=None if rest is None else rest.flatten(0, 2),
        words=None if merged is None else merged.words.flatten(0, 2),
        bits=None if merged is None else merged.slots,
        in_order=in_order,
    )
