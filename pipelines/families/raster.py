"""The grids that position ids of tokens describe, in whatever dtype they come."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch

# Half of the distance between neighbouring numbers of bfloat16, relative to them: ids are rounded at most by that.
ROUNDING = 2.0**-8


class Block(NamedTuple):
    """Tokens that form a grid in raster order.

    Attributes:
        start: Index of the first.
        grid: Tokens per axis.
    """

    start: int
    grid: tuple[int, ...]

    @property
    def tokens(self) -> int:
        """Number of tokens."""
        return int(np.prod(self.grid))


class _Part(NamedTuple):
    """A block of the last axes.

    Attributes:
        block: Its place and size.
        inner: Its coordinates along these axes, equal for equal blocks.
    """

    block: Block
    inner: tuple[bytes, ...]


def blocks(ids: torch.Tensor, ends: torch.Tensor | None = None) -> list[Block]:
    """Split a sequence of tokens into grids in raster order.

    Along an axis of a grid the ids rise. Those of a wide grid in a short dtype repeat, because neighbours are rounded
    to the same number: equal neighbours count as rounded if the axis is even up to rounding.

    Args:
        ids: Coordinates [tokens, axes], the slowest axis first. Waits for the GPU.
        ends: Where each token ends, if that is known: its neighbour in a grid begins there.

    Returns:
        The grids in the order of the sequence, each as large as it gets; a token of none is one of one token.
    """
    values = ids.detach().double().cpu().numpy()
    limits = None if ends is None else ends.detach().double().cpu().numpy()
    parts = _rows(values, limits)
    for axis in range(values.shape[1] - 2, -1, -1):
        parts = _stack(parts, values, limits, axis)
    return [part.block for part in parts]


def whole(ids: torch.Tensor, ends: torch.Tensor | None = None) -> tuple[int, ...] | None:
    """The grid of tokens [tokens, axes] that form one grid in raster order, None if they form none."""
    found = blocks(ids, ends)
    return found[0].grid if len(found) == 1 else None


def largest(ids: torch.Tensor, ends: torch.Tensor | None = None, last: bool = False) -> Block:
    """The largest grid among tokens [tokens, axes]; of equal ones the first, or the `last`."""
    found = blocks(ids, ends)
    return max(reversed(found) if last else found, key=lambda block: block.tokens)


def _rows(values: np.ndarray, ends: np.ndarray | None) -> list[_Part]:
    """Runs of tokens along the last axis."""
    new = np.ones(len(values), dtype=bool)
    new[1:] = (values[1:, :-1] != values[:-1, :-1]).any(1) | (values[1:, -1] < values[:-1, -1])
    if ends is not None:
        new[1:] |= values[1:, -1] != ends[:-1, -1]
    starts = np.flatnonzero(new)
    found = []
    for start, end in zip(starts, [*starts[1:], len(values)], strict=True):
        axis = values[start:end, -1]
        if _is_axis(axis):
            found.append(_Part(Block(int(start), (len(axis),)), (axis.tobytes(),)))
        else:
            found += [_Part(Block(int(i), (1,)), (values[i, -1].tobytes(),)) for i in range(start, end)]
    return found


def _stack(parts: list[_Part], values: np.ndarray, ends: np.ndarray | None, axis: int) -> list[_Part]:
    """Runs of equal blocks along one more axis."""
    runs: list[list[_Part]] = []
    for part in parts:
        if runs and _follows(part, runs[-1][-1], values, ends, axis):
            runs[-1].append(part)
        else:
            runs.append([part])
    found = []
    for run in runs:
        along = values[[part.block.start for part in run], axis]
        for group in [run] if _is_axis(along) else [[part] for part in run]:
            first = group[0]
            inner = (values[[part.block.start for part in group], axis].tobytes(), *first.inner)
            found.append(_Part(Block(first.block.start, (len(group), *first.block.grid)), inner))
    return found


def _follows(part: _Part, before: _Part, values: np.ndarray, ends: np.ndarray | None, axis: int) -> bool:
    """Whether a block can be the next one along an axis."""
    if part.block.grid != before.block.grid or part.inner != before.inner:
        return False
    here, there = values[part.block.start], values[before.block.start]
    if ends is not None and here[axis] != ends[before.block.start, axis]:
        return False
    return bool((here[:axis] == there[:axis]).all() and here[axis] >= there[axis])


def _is_axis(along: np.ndarray) -> bool:
    """Whether numbers that do not fall are the coordinates of an axis, some of them rounded to the same."""
    if len(along) == 1 or bool((np.diff(along) > 0).all()):
        return True
    if along[0] == along[-1]:
        return False
    even = np.linspace(along[0], along[-1], len(along))
    return bool((np.abs(along - even) <= 2 * ROUNDING * np.abs(along).max()).all())
