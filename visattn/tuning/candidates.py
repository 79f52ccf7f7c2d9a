"""Which patterns a search tries: windows scaled to the grid, blocks chosen by scores at several densities, dense."""

from __future__ import annotations

import math
from collections.abc import Sequence

from visattn.patterns import parse
from visattn.tuning.subject import DENSE

# Windows as shares of an axis, in tiles of a window's stride.
SHARES = (0.125, 0.25, 0.375, 0.5, 0.75)
KEPT = (0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.7)
COVERED = (0.5, 0.7, 0.85, 0.95)
# Fewest tokens for which blocks can be chosen.
FEWEST = 256


def candidates(grid: tuple[int, ...], every: int = 1) -> tuple[str, ...]:
    """Patterns for a grid, dense first.

    Args:
        grid: Tokens per axis.
        every: Above 1, all that choose blocks are there a second time, with lists that are kept for so many steps.
    """
    side = {1: 64, 2: 8, 3: 4}[len(grid)]
    found = [DENSE]
    for share in SHARES:
        wide = [max(1, math.ceil(share * n)) for n in grid]
        strides = [min(side, max(1, n // 4)) for n in grid]
        window = [min(-(-w // s) * s, n) for w, s, n in zip(wide, strides, grid, strict=True)]
        found.append(f"na(window={_sizes(window)}, stride={_sizes(strides)})")
        if len(grid) == 3:
            # Every frame, a window in each.
            window = [grid[0], *window[1:]]
            found.append(f"na(window={_sizes(window)}, stride={_sizes(strides)})")
    if math.prod(grid) >= FEWEST:
        for kept in ("", f", every={every}, drift=inf")[: 1 + (every > 1)]:
            found += [f"topk(keep={keep}, rest={rest}{kept})" for keep in KEPT for rest in ("mean", "drop")]
            found += [f"topp(p={p}, rest={rest}{kept})" for p in COVERED for rest in ("mean", "drop")]
    return checked(found, grid)


def checked(texts: Sequence[str], grid: tuple[int, ...]) -> tuple[str, ...]:
    """Canonical texts of patterns, each once, with dense first.

    Raises:
        ValueError: If a text is no pattern, or it is not for the grid or for some steps alone.
    """
    found = [DENSE]
    for text in texts:
        pattern = parse(text)
        pattern.check(grid)
        if pattern.learnable or pattern.needs_weights:
            raise ValueError(f"candidate {pattern} has parameters to train, which a search does not: leave it out")
        if not pattern.covers(grid):
            found.append(str(pattern))
    return tuple(dict.fromkeys(found))


def _sizes(values: Sequence[int]) -> str:
    return "x".join(map(str, values)) if len(values) > 1 else f"({values[0]},)"
