"""The patterns that a text can name."""

from __future__ import annotations

from visattn.patterns.base import Pattern

# Pattern classes by name; filled by `register` alone.
KINDS: dict[str, type[Pattern]] = {}


def register(*kinds: type[Pattern]) -> None:
    """Let `parse` build patterns of these classes by their names.

    Raises:
        ValueError: If another class has the name.
    """
    for kind in kinds:
        other = KINDS.setdefault(kind.name, kind)
        if other is not kind:
            raise ValueError(f"pattern {kind.name!r} is {other.__module__}.{other.__qualname__}: take another name")
