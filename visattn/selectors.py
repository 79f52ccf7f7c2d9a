"""Layers by index, slice, range or name."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from visattn.given import said

RANGE = re.compile(r"(\d+)(?:(-)(\d*))?")
Selector = int | slice | str
# What `layers` may be, None for all.
Layers = Selector | Iterable[Selector] | None


class SiteName(NamedTuple):
    """An attention module: its path in the model, and the path of the layer it belongs to."""

    path: str
    layer: str


def selectors_of(value: Any, argument: str = "layers") -> tuple[Selector, ...]:
    """What an argument selects, text at its commas.

    Raises:
        ValueError: If that is nothing, or no selector.
    """
    if isinstance(value, str):
        return tuple(part.strip() for part in value.split(","))
    if isinstance(value, Mapping):
        raise ValueError(f"{argument}={said(value)} is a mapping: pass it as pattern=, which gives each layer its own")
    # A tensor of one number says that it can be iterated over.
    if not isinstance(value, int | slice | Iterable) or getattr(value, "ndim", 1) == 0:
        raise ValueError(f"{argument}={said(value)} is no index, slice, range like '0-3' or name, nor several of these")
    values = (value,) if isinstance(value, int | slice) else tuple(value)
    if isinstance(value, bytes | bytearray | memoryview):
        raise ValueError(f"{argument}={said(value)} are bytes: pass text like '0-3'")
    if not values:
        raise ValueError(f"{argument}={said(value)} names no layer: give some, like '0-3', or None for all")
    for part in values:
        if isinstance(part, bool) or not isinstance(part, int | slice | str):
            raise ValueError(f"{argument}: {said(part)} is not an index, a slice, a range like '0-3' or a name")
    return values


def pick(selectors: tuple[Selector, ...], sites: Sequence[SiteName], layers: list[str], model: str) -> set[int]:
    """Indices of the sites that the selectors name.

    Raises:
        ValueError: If one of them names none, or a range a layer that is not there.
    """
    chosen: set[int] = set()
    for selector in selectors:
        _check_range(selector, len(layers), model)
        picked = _pick_layers(selector, layers)
        if picked is None:
            names = str(selector)
            found = {
                i
                for i, site in enumerate(sites)
                if fnmatch.fnmatchcase(site.path, names) or fnmatch.fnmatchcase(site.layer, names)
            }
        else:
            found = {i for i, site in enumerate(sites) if site.layer in picked}
        if not found:
            raise ValueError(
                f"layers: {selector!r} selects nothing in {model}; its {len(layers)} layers: {_listed(layers)}"
            )
        chosen |= found
    return chosen


def _check_range(selector: Selector, number: int, model: str) -> None:
    """Raise a ValueError if a range begins at one of so many layers and ends behind the last of them."""
    match = RANGE.fullmatch(selector) if isinstance(selector, str) else None
    if match and match[3] and int(match[1]) < number <= int(match[3]):
        raise ValueError(
            f"layers: {selector!r} ends at layer {int(match[3])}, and {model} has {number} layers, 0 to {number - 1}: "
            f"write '{int(match[1])}-' for all layers from {int(match[1])} on"
        )


def _pick_layers(selector: Selector, layers: list[str]) -> set[str] | None:
    """The layers that an index, slice or range selects; None if the selector is a name."""
    if isinstance(selector, slice):
        return set(layers[selector])
    if isinstance(selector, int):
        return {layers[selector]} if -len(layers) <= selector < len(layers) else set()
    match = RANGE.fullmatch(selector)
    if not match:
        return None
    first = int(match[1])
    last = first if not match[2] else int(match[3]) if match[3] else len(layers)
    return set(layers[first : last + 1])


def _listed(names: Sequence[str]) -> str:
    shown = [f"{i} {name}" for i, name in enumerate(names)]
    return ", ".join(shown if len(shown) <= 8 else [*shown[:6], "...", shown[-1]])
