"""Grid positions as the relative position bias of a neighborhood pattern counts them."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch

from visattn.keep import kept
from visattn.kernels.triton.lists.program import NOWHERE, int32_table, slot_sums
from visattn.layout import Layout
from visattn.patterns import BiasedPattern, Pattern
from visattn.patterns.geometry import Spans
from visattn.tiling import Ints, Tiling


@dataclass(frozen=True, eq=False)
class Positions:
    """One number per token such that the bias entry of a pair is key's number - query's number + centre.

    Attributes:
        tokens: The number of each token, far outside for dense tokens: int32 [S + extra].
        weights: What one step along each axis adds.
        centre: Entry of a query's bias with itself.
        entries: Bias entries per head.
    """

    tokens: torch.Tensor
    weights: tuple[int, ...]
    centre: int
    entries: int

    def offsets(self, tiling: Tiling) -> torch.Tensor:
        """The number of each slot of a box, minus that of slot 0: int32 [slots]."""
        return _offsets(tiling, self.weights, self.tokens.device)


@kept
def _offsets(tiling: Tiling, weights: tuple[int, ...], device: torch.device) -> torch.Tensor:
    """Copied to the device once: a copy in every call would wait for the device, and no CUDA graph could hold it."""
    return int32_table(slot_sums(tiling, weights), device)


@kept
def positions(pattern: Pattern, layout: Layout, device: torch.device) -> Positions:
    """The positions of a pattern that takes a relative position bias."""
    assert isinstance(pattern, BiasedPattern)
    sides = pattern.rpb_shape(layout.grid)
    weights = tuple(math.prod(sides[i + 1 :]) for i in range(len(sides)))
    number = np.zeros(1, np.int64)
    for n, step, weight in zip(layout.grid, pattern.step(layout.grid), weights, strict=True):
        number = (number[:, None] + np.arange(n) // step * weight).ravel()
    tokens = np.full(layout.length, NOWHERE)
    tokens[layout.prefix : layout.prefix + layout.tokens] = number
    centre = sum((side // 2) * weight for side, weight in zip(sides, weights, strict=True))
    return Positions(int32_table(tokens, device), weights, centre, math.prod(sides))


@kept
def partners(pattern: Pattern, layout: Layout, device: torch.device) -> torch.Tensor:
    """Key token of each grid query for each bias entry, -1 where it sees none there: int32 [entries, tokens]."""
    assert isinstance(pattern, BiasedPattern)
    sides = pattern.rpb_shape(layout.grid)
    key = np.zeros((1, 1), np.int64)
    for axis, side in zip(pattern.spans(layout.grid), sides, strict=True):
        on_axis = _axis_partners(axis, side)
        both = (key[:, None, :, None] >= 0) & (on_axis[None, :, None, :] >= 0)
        key = np.where(both, key[:, None, :, None] * axis.length + on_axis[None, :, None, :], -1)
        key = key.reshape(key.shape[0] * side, -1)
    key = np.where(key >= 0, key + layout.prefix, -1)
    return int32_table(key, device)


def _axis_partners(spans: Spans, side: int) -> Ints:
    """Key index of each query of one axis for each relative position: [side, length], -1 where it sees none."""
    index = np.arange(spans.length)
    position = index // spans.step + (np.arange(side) - side // 2)[:, None]
    key = position * spans.step + index % spans.step
    return np.where((position >= spans.start) & (position < spans.stop) & (key < spans.length), key, -1)
