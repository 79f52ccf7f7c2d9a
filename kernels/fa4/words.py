"""Which key slots a query slot sees in partial blocks, as words that a mask function reads: intervals, or bits.

The kernel asks for every pair of a partial block, so a pair must cost little: an interval per axis is three loads, each
shared by a row or a column of the block, and a few operations on packed fields; bits are two loads for each pair.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from visattn.kernels.flex.visible import Intervals, is_product, visible
from visattn.layout import Layout
from visattn.patterns import ListedPattern, Pattern, SpannedPattern
from visattn.patterns.geometry import Bools
from visattn.plans import TilePlan
from visattn.tiling import Ints

# Slots of a key tile, and bits of a word.
COLUMNS, WORD = 128, 32
# Bits of a field by the number of axes, the highest a guard. Bit 31 is the sign, which marks keys that all see.
FIELD_BITS = {1: 30, 2: 15, 3: 10}


def guards(dims: int) -> int:
    """The highest bit of each field."""
    bits = FIELD_BITS[dims]
    return sum(1 << (bits * field + bits - 1) for field in range(dims))


@dataclass(frozen=True, eq=False)
class Packed:
    """Intervals per axis, an axis in each field of a word, in which `place - start` keeps the guard if it is no less.

    Attributes:
        starts: First visible place of each query slot, of all lists one behind the other: int32 [lists * query slots].
        ends: Last visible place, the guards added twice: int32 [lists * query slots].
        places: Of each key slot, the guards added, negative where every query sees it: int32 [key slots].
        dims: Axes.
    """

    starts: torch.Tensor
    ends: torch.Tensor
    places: torch.Tensor
    dims: int

    @property
    def guards(self) -> int:
        """The highest bit of each field."""
        return guards(self.dims)

    @property
    def tensors(self) -> list[torch.Tensor]:
        """What the mask function reads."""
        return [self.starts, self.ends, self.places]

    def __call__(self, i: torch.Tensor, j: torch.Tensor, first: int = 0) -> torch.Tensor:
        """Whether query slots see key slots, as the kernel computes it; `first` is a list's first query slot."""
        place = self.places[j]
        inside = (place - self.starts[first + i]) & (self.ends[first + i] - place) & self.guards
        return ((inside ^ self.guards) & ((place >> 31) ^ -1)) == 0


@dataclass(frozen=True, eq=False)
class Bits:
    """Any mask: of each pair of tiles its number, of each mask its bits.

    Attributes:
        pair: Columns of the table, then the mask of each pair of tiles, of all lists one behind the other:
            int32 [1 + lists * query tiles * key tiles].
        words: Bits of a mask, row by row: int32 [masks * rows * COLUMNS / WORD].
        rows: Slots of a query tile.
    """

    pair: torch.Tensor
    words: torch.Tensor
    rows: int

    @property
    def tensors(self) -> list[torch.Tensor]:
        """What the mask function reads."""
        return [self.pair, self.words]

    def __call__(self, i: torch.Tensor, j: torch.Tensor, first: int = 0) -> torch.Tensor:
        """Whether query slots see key slots, as the kernel computes it; `first` is a list's first query tile."""
        mask = self.pair[1 + (first + i // self.rows) * self.pair[0] + j // COLUMNS]
        column = j % COLUMNS
        word = self.words[(mask * self.rows + i % self.rows) * (COLUMNS // WORD) + column // WORD]
        return ((word >> (column % WORD)) & 1) == 1


Words = Packed | Bits
Int32s = NDArray[np.int32]


def packs(pattern: Pattern, layout: Layout) -> bool:
    """Whether the masks of a pattern are surely said by intervals."""
    if pattern.covers(*layout.grids):
        return True
    if not isinstance(pattern, SpannedPattern) or not is_product(pattern):
        return False
    spans = pattern.spans(*layout.grids)
    most = (1 << (FIELD_BITS[len(spans)] - 1)) - 1
    return all(not axis.circular and axis.step * max(axis.length, axis.key_length) < most for axis in spans)


def words_of(patterns: Sequence[ListedPattern], plans: Sequence[TilePlan], device: torch.device) -> Words:
    """The masks of plans of equal tiles in their cheapest form.

    Args:
        patterns: The patterns.
        plans: Their plans, one behind the other in what is indexed by queries.
        device: Where the words go.
    """
    return _packed(patterns, plans, device) or _bits(plans, device)


def _packed(patterns: Sequence[ListedPattern], plans: Sequence[TilePlan], device: torch.device) -> Packed | None:
    """Intervals as fields; None if these are no intervals, do not fit their fields or differ in the keys' places."""
    parts, dims, places = [], len(plans[0].queries.shape), None
    for pattern, each in zip(patterns, plans, strict=True):
        if pattern.covers(*each.layout.grids):
            # Places of tokens count from 1.
            slots, first = each.queries.tokens.size, guards(dims) >> (FIELD_BITS[dims] - 1)
            parts.append((np.full(slots, first), np.full(slots, guards(dims) - first + 2 * guards(dims))))
            continue
        seen = visible(pattern, each, torch.device("cpu"))
        fields = _fields(seen) if isinstance(seen, Intervals) and len(seen.place) == dims else None
        if fields is None or (places is not None and not np.array_equal(places, fields[2])):
            return None
        places = fields[2]
        parts.append(fields[:2])
    if places is None:
        return None
    starts, ends = (torch.from_numpy(_int32(np.concatenate(side))).to(device) for side in zip(*parts, strict=True))
    return Packed(starts, ends, torch.from_numpy(_int32(places)).to(device), dims)


def _fields(seen: Intervals) -> tuple[Ints, Ints, Ints] | None:
    """Words of starts, ends and places; places count from 1, for 0 is what no query sees."""
    dims = len(seen.place)
    bits, guard = FIELD_BITS[dims], guards(dims)
    most = (1 << (bits - 1)) - 1
    start, stop, place = (t.numpy().astype(np.int64) for t in (seen.start, seen.stop, seen.place))
    # Dense queries have an interval around everything, keys that nobody or everybody sees a place before it.
    start, stop, place = np.maximum(start, 0) + 1, np.minimum(stop, most), np.maximum(place, -1) + 1
    if start.max(initial=0) > most or place.max(initial=0) > most:
        return None
    shift = (1 << (bits * np.arange(dims)))[:, None]
    starts, ends, places = ((axis * shift).sum(0) for axis in (start, stop, place))
    ends, places = ends + 2 * guard, places + guard
    if seen.dense is not None:
        places = np.where(seen.dense.numpy(), places - 2**31, places)
    return starts, ends, places


def _bits(plans: Sequence[TilePlan], device: torch.device) -> Bits:
    """Tables of masks; number 0 sees nothing."""
    rows, columns = plans[0].queries.capacity, plans[0].keys.tiles
    pairs, masks = [np.array([columns])], [np.zeros((1, rows, COLUMNS), bool)]
    for each in plans:
        pair = np.zeros((each.queries.tiles, columns), np.int64)
        first = sum(map(len, masks))
        lists = each.lists.where(partial=True)
        pair[lists.rows, lists.tile] = first + lists.mask
        pairs.append(pair.ravel())
        masks.append(each.masks)
    pair, words = _int32(np.concatenate(pairs)), _packed_bits(np.concatenate(masks))
    return Bits(torch.from_numpy(pair).to(device), torch.from_numpy(words).to(device), rows)


def _packed_bits(masks: Bools) -> Int32s:
    """Bits as words, the first column lowest: int32 [masks * rows * COLUMNS / WORD]."""
    lowest_first = np.packbits(masks.reshape(-1, COLUMNS), axis=1, bitorder="little")
    return np.ascontiguousarray(lowest_first).view("<u4").ravel().astype(np.uint32).view(np.int32)


def _int32(words: Ints) -> Int32s:
    """The lowest 32 bits of each word."""
    return (words & 0xFFFFFFFF).astype(np.uint32).view(np.int32)
