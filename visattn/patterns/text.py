"""Patterns as text: `parse("na(window=7x7, stride=2)")` and back with `str`."""

from __future__ import annotations

import dataclasses
import difflib
import re
from collections.abc import Mapping
from typing import Any

from visattn.patterns.base import Pattern


def parse_pattern(text: str, known: Mapping[str, type[Pattern]]) -> Pattern:
    """Build the pattern that `text` names; the inverse of `str(pattern)`.

    Args:
        text: `name` or `name(parameter=value, ...)`; a value is a number, 7x7, true, false, none, a word, or a
            pattern inside the pattern, bare or in quotes: `sigmoid(sparse=na(window=7x7))`. The first parameter may
            go without its name: `na(7x7)`.
        known: Pattern classes by name.

    Raises:
        ValueError: If the text does not parse or names an unknown pattern or parameter.
    """
    match = re.fullmatch(r"\s*([A-Za-z_]\w*)\s*(?:\((.*)\))?\s*", text, re.DOTALL)
    if not match:
        raise ValueError(f"pattern {text!r} is not of the form name(parameter=value, ...), like na(window=7x7)")
    name, inside = match.group(1).lower(), match.group(2) or ""
    if name not in known:
        raise ValueError(f"unknown pattern {name!r}{_nearest(name, known)}; patterns: {', '.join(sorted(known))}")
    kind = known[name]
    types = {f.name: str(f.type) for f in dataclasses.fields(kind)}  # type: ignore[arg-type]
    fields = list(types)
    given: dict[str, Any] = {}
    for position, part in enumerate(p for p in _split(inside) if p.strip()):
        key, equals, value = (s.strip() for s in _named(part))
        if not equals and position == 0 and fields:
            key, value = fields[0], key
        elif not equals:
            raise ValueError(f"{part.strip()!r} in {text!r} is not of the form parameter=value")
        if key not in fields:
            raise ValueError(
                f"{name} has no parameter {key!r}{_nearest(key, fields)}; parameters: {', '.join(fields) or 'none'}"
            )
        if key in given:
            raise ValueError(f"{key!r} is given twice in {text!r}")
        given[key] = _value(value, types[key], f"{key}={value} in {text!r}", known)
    try:
        return kind(**given)
    except TypeError:
        required = [f.name for f in dataclasses.fields(kind) if f.default is dataclasses.MISSING]  # type: ignore[arg-type]
        missing = [f for f in required if f not in given]
        raise ValueError(f"{name} needs {' and '.join(missing)}, like {name}({missing[0]}=...)") from None


def _nearest(name: str, known: Any) -> str:
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.4)
    return f" (did you mean {close[0]!r}?)" if close else ""


def _split(inside: str) -> list[str]:
    """The parts between the commas that are not inside the parentheses of an inner pattern."""
    parts, depth = [""], 0
    for letter in inside:
        depth += (letter == "(") - (letter == ")")
        if letter == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += letter
    return parts


def _named(part: str) -> tuple[str, str, str]:
    """Parameter, "=" and value; an inner pattern without a parameter's name has no "=" of its own."""
    match = re.match(r"\s*\w+\s*=", part)
    return part.partition("=") if match or "(" not in part else (part, "", "")


def _value(text: str, wanted: str, where: str, known: Mapping[str, type[Pattern]]) -> Any:
    """A value of a field whose annotation is `wanted`."""
    text = re.sub(r"^([\"'])(.*)\1$", r"\2", text, flags=re.DOTALL)
    low = text.lower()
    if low in ("true", "false", "none"):
        return {"true": True, "false": False, "none": None}[low]
    if "Pattern" in wanted:
        return parse_pattern(text, known)
    if "str" in wanted and re.fullmatch(r"[a-z_]\w*", low):
        return low
    if re.fullmatch(r"-?\d+(x-?\d+)+", low):
        return tuple(int(part) for part in low.split("x"))
    for kind in (int, float):
        try:
            return kind(low)
        except ValueError:
            continue
    raise ValueError(
        f"{where} is not {'a word' if 'str' in wanted else 'a number, sizes like 7x7, true, false or none'}"
    )
