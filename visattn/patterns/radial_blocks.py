"""The block mask of radial attention, block row by block row: never tokens x tokens."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from visattn.keep import kept
from visattn.patterns.geometry import Bools
from visattn.tiling import Ints

# A frame at a distance is dropped where its share of a window is narrower than this many tokens.
SPLIT_BELOW = 128


def window_width(distance: int, tokens: int, decay: float, block: int) -> float | None:
    """How far apart in their frames two tokens that are `distance` frames apart may be; None where none may.

    Args:
        distance: Frames between query and key.
        tokens: Tokens of a frame.
        decay: Factor on the width.
        block: Least width beyond neighbouring frames.
    """
    share = 2 ** tokens.bit_length() / 2 ** distance.bit_length()
    if share < SPLIT_BELOW and distance % int(SPLIT_BELOW / share):
        return None
    return float(tokens) if distance <= 1 else max(decay * share, float(block))


@kept
def block_mask(frames: int, tokens: int, decay: float, sink: bool, block: int) -> Bools:
    """Which key blocks each query block of a video sees: [blocks, blocks].

    A block is kept where, of the key tokens that any of its queries may see, more than 60 % are seen by more
    than a third of a block's queries. As in the original this is decided for each pair of frames that meets in
    the block. Frames shorter than half a block could never reach the third that way: there it is decided for
    all tokens of the block together, and blocks always see themselves.
    A last block that the video does not fill is dense: the original fills it up with text.

    Args:
        frames: Frames of the video.
        tokens: Tokens of a frame.
        decay: Factor on the widths.
        sink: Whether every query sees the first frame.
        block: Tokens of a block.
    """
    length = frames * tokens
    blocks = -(-length // block)
    mask = np.zeros((blocks, blocks), bool)
    widths = [window_width(r, tokens, decay, block) for r in range(frames)]
    by_frame = 2 * tokens >= block
    # Where a key block begins and, if frames are judged apart, also where a frame begins in one.
    edges = np.arange(0, length, block)
    if by_frame:
        edges = np.union1d(edges, np.arange(0, length, tokens))
    stretches = _Stretches.of(edges, length, tokens) if by_frame else None
    for row in range(blocks):
        pieces = _pieces(row * block, min((row + 1) * block, length), tokens)
        if stretches is None:
            together = np.zeros(length, np.int64)
            for frame, first, last in pieces:
                _count(together, frame, first, last, widths, sink, tokens)
            mask[row] = _kept(together, edges, block)
            continue
        for frame, first, last in pieces:
            reach = np.array([_reach(frame, other, widths, sink, tokens) for other in range(frames)])
            mask[row, edges[stretches.kept(first, last, reach, block)] // block] = True
    np.fill_diagonal(mask, True)
    if length % block:
        mask[-1] = mask[:, -1] = True
    mask.setflags(write=False)
    return mask


def _pieces(start: int, stop: int, tokens: int) -> Iterator[tuple[int, int, int]]:
    """The frames that tokens [start, stop) belong to: frame, first and last token in that frame."""
    while start < stop:
        frame, first = divmod(start, tokens)
        last = min(tokens, first + stop - start) - 1
        yield frame, first, last
        start += last - first + 1


def _reach(frame: int, other: int, widths: list[float | None], sink: bool, tokens: int) -> int:
    """How far apart in their frames a query and a key of another frame may be; -1 where none is seen."""
    width = tokens if sink and other == 0 else widths[abs(frame - other)]
    return -1 if width is None else int(min(width, tokens))


class _Stretches(NamedTuple):
    """Key tokens between edges, each inside of one frame.

    Attributes:
        frame: Their frame: [stretches].
        first: Their first token in it.
        last: Their last one.
    """

    frame: Ints
    first: Ints
    last: Ints

    @classmethod
    def of(cls, edges: Ints, length: int, tokens: int) -> _Stretches:
        """Those of edges, which are where frames begin among others."""
        frame, first = np.divmod(edges, tokens)
        return cls(frame, first, first + np.diff(edges, append=length) - 1)

    def kept(self, first: int, last: int, reach: Ints, block: int) -> Bools:
        """`_kept` for the queries `first` to `last` of a frame.

        Of these, key x is seen by min(2 reach + 1, x + reach - first + 1, last - x + reach + 1, last - first + 1): by
        at least so many where x is in one interval.

        Args:
            first: First query in its frame.
            last: Last one.
            reach: How far each frame is seen, -1 where it is not: [frames].
            block: Tokens of a block.
        """
        reach, third = reach[self.frame], block // 3 + 1
        some, many = (self._inside(first - reach + n - 1, last + reach - n + 1) for n in (1, third))
        enough = (reach >= 0) & (2 * reach + 1 >= third) & (last - first + 1 >= third)
        return enough & (many > 0.6 * some)

    def _inside(self, low: Ints, high: Ints) -> Ints:
        """How many tokens of each stretch lie in an interval of each: [stretches]."""
        low, high = np.maximum(low, self.first), np.minimum(high, self.last)
        return np.maximum(high - low + 1, 0)


def _count(
    hits: np.ndarray, frame: int, first: int, last: int, widths: list[float | None], sink: bool, tokens: int
) -> None:
    """Add to each key token how many of the queries `first` to `last` of a frame may see it."""
    for other in range(len(widths)):
        reach = _reach(frame, other, widths, sink, tokens)
        if reach < 0:
            continue
        low, high = max(0, first - reach), min(tokens - 1, last + reach)
        index = np.arange(low, high + 1)
        seen = np.minimum(index + reach, last) - np.maximum(index - reach, first) + 1
        hits[other * tokens + low : other * tokens + high + 1] += seen


def _kept(hits: np.ndarray, edges: np.ndarray, block: int) -> Bools:
    """The rule of the original, for each stretch of key tokens between edges."""
    some = np.add.reduceat((hits > 0).astype(np.int64), edges)
    many = np.add.reduceat((3 * hits > block).astype(np.int64), edges)
    return many > 0.6 * some
