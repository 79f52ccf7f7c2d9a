"""Which patterns a search tries: windows scaled to the grid, blocks chosen by scores at several densities, dense."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache

import torch

from visattn.patterns import ListedPattern, StaticPattern
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
# Fewest tokens for which blocks can be chosen.
FEWEST = 256


def candidates(grid: tuple[int, ...], every: int = 1, precisions: Sequence[str] = ()) -> tuple[str, ...]:
    """Patterns for a grid, dense first.

    Args:
        grid: Tokens per axis.
        every: Steps for which lists are kept where blocks are chosen.
        precisions: What wide windows, the whole grid among them, and many blocks are also computed in.
    """
    side = {1: 64, 2: 8, 3: 4}[len(grid)]
    found, rounded = [DENSE], []
    strides = [min(side, max(1, n // 4)) for n in grid]
    # A window of the whole grid is dense attention in 8 bits.
    for share in (*SHARES, 1.0):
        wide = [max(1, math.ceil(share * n)) for n in grid]
        window = [min(-(-w // s) * s, n) for w, s, n in zip(wide, strides, grid, strict=True)]
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
    # A share of few blocks may be less than what is listed anyway.
    return checked([text for text in found if _fits(text, grid)], grid)


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
        if precision is not None:
            found.append(f"{pattern} in {precision}")
        elif not pattern.covers(grid):
            found.append(str(pattern))
    return tuple(dict.fromkeys(found))


def precisions_of(device: torch.device) -> tuple[str, ...]:
    """The 8-bit precisions that a device is faster in."""
    if device.type != "cuda":
        return ()
    capability = torch.cuda.get_device_capability(device)
    return ("int8", "fp8") if capability >= (8, 9) else ("int8",) if capability >= (8, 0) else ()


@lru_cache(maxsize=1024)
def kind_of(name: str) -> str:
    """What candidates of one kind share: the name of the pattern and the precision."""
    pattern, precision = with_precision(name)
    return pattern.name if precision is None else f"{pattern.name} in {precision}"


@lru_cache(maxsize=1024)
def is_steady(name: str) -> bool:
    """Whether a candidate takes as long whatever the values are."""
    pattern, _ = with_precision(name)
    return isinstance(pattern, StaticPattern) or pattern.name == "topk" or not isinstance(pattern, ListedPattern)


def _fits(text: str, grid: tuple[int, ...]) -> bool:
    try:
        with_precision(text)[0].check(grid)
    except ValueError:
        return False
    return True


def _sizes(values: Sequence[int]) -> str:
    return "x".join(map(str, values)) if len(values) > 1 else f"({values[0]},)"
