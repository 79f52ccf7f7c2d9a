"""Numbers that change over a run, written like `0.5..0.05` in the text of a pattern or of an option."""

from __future__ import annotations

import re

# Changes of a pattern: plans of its lists are made anew at each.
LEVELS = 8
_RANGE = re.compile(r"(\d+(?:\.\d+)?)\.\.(\d+(?:\.\d+)?)")


def varies(text: str) -> bool:
    """Whether a text has numbers that change."""
    return _RANGE.search(text) is not None


def at(text: str, share: float) -> str:
    """A text with each `a..b` at a share of its way: a at 0, b from 1 on, in between by equal factors.

    Whole numbers stay whole. Equal factors: half as many lists are a step of the same size from 50 % as from 10 %.

    Raises:
        ValueError: If an end is 0.
    """

    def number(found: re.Match[str]) -> str:
        first, last = float(found[1]), float(found[2])
        if not (first and last):
            raise ValueError(f"{found[0]!r} in {text!r} must go from and to something above 0")
        if share <= 0 or share >= 1:
            return found[1 if share <= 0 else 2]
        between = first * (last / first) ** share
        return f"{between:.4g}" if "." in found[1] + found[2] else str(round(between))

    return _RANGE.sub(number, text)


def stepped(done: float, end: float, levels: int = LEVELS) -> float:
    """How far a range is that reaches its end when a share `end` of the run is over, in equal steps."""
    return 1.0 if done >= end else int(done / end * levels) / levels
