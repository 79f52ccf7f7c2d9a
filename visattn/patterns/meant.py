"""What somebody may have meant by a text that names no pattern."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any

from visattn.patterns.base import Pattern

# How alike two names are at least, from 0 to 1: below that a guess names something that only shares letters.
ALIKE = 0.6
# What others call our patterns.
ELSEWHERE = {
    **dict.fromkeys(("neighborhood", "neighbourhood", "natten", "gna", "window", "local", "sliding", "swin"), "na"),
    **dict.fromkeys(("full", "sdpa", "softmax", "attention", "stock"), "dense"),
}
BRACKETS = "()", "[]", "{}"


def nearest(name: str, known: Iterable[str]) -> str:
    """The known names that are most like one, as a question in brackets; empty if none is like it."""
    names = list(known)
    found = difflib.get_close_matches(name, names, n=3, cutoff=ALIKE)
    # Those that are as near as the nearest: of "topc" nobody knows whether it was topk or topp.
    best = [each for each in found if _likeness(name, each) == _likeness(name, found[0])]
    meant = ELSEWHERE.get(name)
    best = [meant] if meant in names else sorted(best)
    return f" (did you mean {' or '.join(map(repr, best))}?)" if best else ""


def open_brackets(text: str) -> str:
    """Which bracket of a text has no partner, in words; empty if none."""
    for left, right in BRACKETS:
        opened, closed = text.count(left), text.count(right)
        if opened != closed:
            return f"has {opened} {left!r} and {closed} {right!r}: every bracket needs its partner"
    return ""


def example(kinds: tuple[Any, ...]) -> str:
    """A value for a parameter that has one of these types."""
    if int in kinds:
        return "7"
    inner = next((kind for kind in kinds if isinstance(kind, type)), Pattern)
    if not issubclass(inner, Pattern):
        return "{0-3: dense, 4-: na(window=7)}"
    if Ellipsis in kinds:
        return "[na(window=7), dense]"
    return "topk(keep=0.1)" if inner.__name__ == "DynamicPattern" else "na(window=7)"


def _likeness(one: str, other: str) -> float:
    return difflib.SequenceMatcher(None, other, one).ratio()
