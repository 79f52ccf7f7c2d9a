"""Names of modules that differ in numbers alone, as names with ranges of numbers."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

# Of each number in a name, which ones.
Box = tuple[frozenset[int], ...]


def folded(names: Iterable[str]) -> list[tuple[str, int]]:
    """Names with ranges, like `blocks.0-3,7.attn`, and how many names each stands for.

    Each of the names is in exactly one of them, and they stand for no others; the first ones of each decide the order.
    """
    shapes: dict[tuple[str | None, ...], list[Box]] = {}
    for name in names:
        parts = name.split(".")
        shape = tuple(None if _is_number(part) else part for part in parts)
        shapes.setdefault(shape, []).append(tuple(frozenset({int(p)}) for p in parts if _is_number(p)))
    return [_written(shape, box) for shape, boxes in shapes.items() for box in _merged(boxes)]


def _is_number(part: str) -> bool:
    # Leading zeros would be lost.
    return part.isascii() and part.isdigit() and str(int(part)) == part


def _merged(boxes: Sequence[Box]) -> list[Box]:
    """As few boxes as one pass over the numbers finds, the last ones first: they cover the same and nothing else."""
    found = list(dict.fromkeys(boxes))
    for at in reversed(range(len(found[0]))):
        same: dict[Box, frozenset[int]] = {}
        for box in found:
            rest = box[:at] + box[at + 1 :]
            same[rest] = same.get(rest, frozenset()) | box[at]
        found = [(*rest[:at], own, *rest[at:]) for rest, own in same.items()]
    return found


def _written(shape: Sequence[str | None], box: Box) -> tuple[str, int]:
    numbers, count = iter(box), 1
    for own in box:
        count *= len(own)
    return ".".join(_ranges(next(numbers)) if part is None else part for part in shape), count


def _ranges(numbers: Iterable[int]) -> str:
    """Numbers as `0-3,7`."""
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ",".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)
