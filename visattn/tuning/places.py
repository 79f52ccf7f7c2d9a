"""Candidates that are for some layers alone, as `visattn maps` finds them head by head."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping

from visattn.tuning.candidates import canonical
from visattn.tuning.subject import DENSE

# Between a pattern and the layers, in a line of a file of candidates.
AT = " @ "
Only = Mapping[str, frozenset[str]]


def read_lines(lines: Iterable[str]) -> tuple[tuple[str, ...], Only]:
    """Candidates of the lines of a file.

    Args:
        lines: Patterns, or "PATTERN @ LAYER, LAYER" for layers or modules of such names alone.

    Returns:
        Canonical texts, each once, and the names behind those that are for some alone.

    Raises:
        ValueError: If a line has no pattern, none behind the "@" or an unknown one.
    """
    found: dict[str, set[str] | None] = {}
    for line in lines:
        text, at, names = f" {line} ".partition(AT)
        places = {each.strip() for each in names.split(",")}
        if not text.strip() or (at and "" in places):
            raise ValueError(f"candidate {line!r} is not of the form PATTERN, or PATTERN @ LAYER, LAYER")
        name = canonical(text.strip())
        known = found.get(name, set())
        # A line without layers is for all, whatever another one says; dense attention always is.
        found[name] = known | places if at and known is not None and name != DENSE else None
    return tuple(found), {name: frozenset(some) for name, some in found.items() if some is not None}


def by_layer(only: Only, layers: Collection[str], modules: Mapping[str, str]) -> Only:
    """The layers of each candidate that is for some alone.

    Args:
        only: What `read_lines` gave.
        layers: Of the model.
        modules: Layer of each attention module.

    Raises:
        ValueError: If the model has no layer or module of a name.
    """
    found = {}
    for name, places in only.items():
        unknown = sorted(places - {*layers, *modules})
        if unknown:
            raise ValueError(
                f"candidate {name} is for {unknown[0]!r}, which is no layer here: give one of {', '.join(layers)}, or "
                "a module of theirs by its whole name"
            )
        found[name] = frozenset(modules.get(place, place) for place in places)
    return found


def names_at(layer: str, candidates: Iterable[str], only: Only) -> list[str]:
    """Those of some candidates that are for a layer."""
    return [name for name in candidates if name not in only or layer in only[name]]
