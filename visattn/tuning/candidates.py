"""Which patterns a search tries: windows scaled to the grid, blocks by scores, attention that steps share, dense."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache

from visattn.patterns import ListedPattern, SharingPattern, StaticPattern
from visattn.staged import with_precision
from visattn.tuning.subject import DENSE

# Windows as shares of an axis, in tiles of a window's stride.
SHARES = (0.125, 0.25, 0.375, 0.5, 0.75)
KEPT = (0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.7)
COVERED = (0.5, 0.7, 0.85, 0.95)
# Blocks, and windows as shares of an axis, in 8 bits: quantising takes the same time whatever is left out.
ROUNDED, WIDEST = (0.2, 0.3, 0.5, 0.7), 0.75
# Blocks of 64 keys, and of 128 queries, which fill the rows of a tile on a GPU.
BLOCKS, WIDE = {1: "64", 2: "8x8", 3: "4x4x4"}, {1: "128", 2: "8x16", 3: "4x4x8"}
# Steps that share attention; windows and blocks whose difference to dense attention they share; steps that share the
# output itself.
SHARED, NARROW, FEW, BROADCAST = (2, 3, 4), SHARES[:3], (0.05, 0.1, 0.2), (2, 3)
# How many times longer than dense attention a candidate takes that nothing would choose, whatever its error is.
HOPELESS = 1.15
# Fewest tokens for which blocks can be chosen.
FEWEST = 256


def candidates(grid: tuple[int, ...], every: int = 1, precisions: Sequence[str] = ()) -> tuple[str, ...]:
    """Patterns for a grid, dense first.

    Args:
        grid: Tokens per axis.
        every: Steps for which lists are kept where blocks are chosen, and that share attention at most.
        precisions: What wide windows, the whole grid among them, and many blocks are also computed in.
    """
    side = {1: 64, 2: 8, 3: 4}[len(grid)]
    found, rounded = [DENSE], []
    strides = [min(side, max(1, n // 4)) for n in grid]
    # A window of the whole grid is dense attention in 8 bits.
    for share in (*SHARES, 1.0):
        window = _window(share, grid, strides)
        # In 3D a second one has every frame, and a window in each.
        both = [window, [grid[0], *window[1:]]] if len(grid) == 3 and share < 1 else [window]
        texts = [f"na(window={_sizes(each)}, stride={_sizes(strides)})" for each in both]
        found += texts if share < 1 else []
        rounded += texts if share >= WIDEST else []
    if math.prod(grid) >= FEWEST:
        kept = f", every={every}, drift=inf" if every > 1 else ""
        for blocks in ("", f", block={WIDE[len(grid)]}, key_block={BLOCKS[len(grid)]}"):
            found += [f"topk(keep={keep}, rest={rest}{blocks}{kept})" for keep in KEPT for rest in ("mean", "drop")]
            found += [f"topp(p={p}, rest={rest}{blocks}{kept})" for p in COVERED for rest in ("mean", "drop")]
        # Means of the rest are not for 8 bits.
        rounded += [f"topk(keep={keep}{blocks}{kept})" for keep in ROUNDED]
    found += [f"{text} in {precision}" for precision in precisions for text in rounded]
    found += _shared(grid, strides, every)
    # A share of few blocks may be less than what is listed anyway.
    return checked([text for text in found if _fits(text, grid)], grid)


def _window(share: float, grid: tuple[int, ...], strides: Sequence[int]) -> list[int]:
    """A window of a share of each axis, in whole strides."""
    wide = [max(1, math.ceil(share * n)) for n in grid]
    return [min(-(-w // s) * s, n) for w, s, n in zip(wide, strides, grid, strict=True)]


def _shared(grid: tuple[int, ...], strides: Sequence[int], most: int) -> list[str]:
    """Patterns that share attention between steps, `most` of them at most."""
    inside = [f"na(window={_sizes(_window(share, grid, strides))}, stride={_sizes(strides)})" for share in NARROW]
    if math.prod(grid) >= FEWEST:
        inside += [f"topk(keep={keep}, block={WIDE[len(grid)]}, key_block={BLOCKS[len(grid)]})" for keep in FEW]
    shared = [f"residual(of={of}, every={every}, drift=inf)" for every in SHARED if every <= most for of in inside]
    return shared + [f"broadcast(every={every}, drift=inf)" for every in BROADCAST if every <= most]


def checked(texts: Sequence[str], grid: tuple[int, ...]) -> tuple[str, ...]:
    """Canonical texts of patterns, each once, with dense first.

    Raises:
        ValueError: If a text is no pattern, or it is not for the grid or for some steps alone.
    """
    found = [DENSE]
    for text in texts:
        pattern, precision = with_precision(text)
        pattern.check(grid)
        if pattern.learnable or pattern.needs_weights:
            raise ValueError(f"candidate {pattern} has parameters to train, which a search does not: leave it out")
        if precision is not None or not pattern.covers(grid):
            found.append(canonical(text))
    return tuple(dict.fromkeys(found))


def canonical(text: str) -> str:
    """The one text of a candidate.

    Raises:
        ValueError: If it is no pattern.
    """
    pattern, precision = with_precision(text)
    return str(pattern) if precision is None else f"{pattern} in {precision}"


@lru_cache(maxsize=1024)
def kind_of(name: str) -> str:
    """What candidates of one kind share: the name of the pattern, of one inside that steps share, and the precision."""
    pattern, precision = with_precision(name)
    kind = f"{pattern.name} of {pattern.of.name}" if isinstance(pattern, SharingPattern) else pattern.name
    return kind if precision is None else f"{kind} in {precision}"


@lru_cache(maxsize=1024)
def is_steady(name: str) -> bool:
    """Whether a candidate takes as long whatever the values are."""
    pattern, _ = with_precision(name)
    pattern = pattern.of if isinstance(pattern, SharingPattern) else pattern
    return isinstance(pattern, StaticPattern) or pattern.name == "topk" or not isinstance(pattern, ListedPattern)


def _fits(text: str, grid: tuple[int, ...]) -> bool:
    try:
        with_precision(text)[0].check(grid)
    except ValueError:
        return False
    return True


def _sizes(values: Sequence[int]) -> str:
    return "x".join(map(str, values)) if len(values) > 1 else f"({values[0]},)"
