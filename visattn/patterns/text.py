"""Patterns as text: `parse("na(window=7x7, stride=2)")` and back with `str`."""

from __future__ import annotations

import dataclasses
import re
from functools import lru_cache
from typing import Any, get_args, get_type_hints

from visattn.given import said
from visattn.patterns.base import Pattern
from visattn.patterns.meant import example, nearest, open_brackets
from visattn.patterns.presets import PRESETS
from visattn.patterns.registry import KINDS
from visattn.patterns.values import as_text
from visattn.registry import REGISTRY

# A word, which may have sizes in parentheses, or several of those: mean, parts(4x4), self+near(1).
WORDS = re.compile(r"[a-z_]\w*(\([\dx]+\))?(\+[a-z_]\w*(\([\dx]+\))?)*")


def parse(text: str | Pattern) -> Pattern:
    """Build the pattern that a text like `na(window=7x7)` names; a pattern passes through.

    The inverse of `str(pattern)`. A text is `name` or `name(parameter=value, ...)`; the first parameter may go without
    its name: `na(7x7)`. A value is a number, 7x7 or (7, 7) with a value per axis, (7,) for a single axis, true, false,
    none, a word, a pattern inside the pattern, bare or in quotes: `sigmoid(sparse=na(window=7x7))`, several in
    brackets, or one for some heads in braces: `best(of=[na(9x9), topk(0.1)])`, `perhead(heads={0-3: dense})`.

    Args:
        text: The text, or a pattern.

    The names of published methods stand for patterns with their defaults (`visattn patterns` lists them).

    Returns:
        The pattern; the same object for the same text.

    Raises:
        ValueError: If the text names an unknown pattern or parameter, or a value is out of range.
    """
    if isinstance(text, Pattern):
        return text
    if isinstance(text, type) and issubclass(text, Pattern):
        raise ValueError(f"pattern {text.__qualname__} is a class: pass an instance, {text.__qualname__}(...)")
    if not isinstance(text, str):
        raise ValueError(
            f"pattern {said(text)} is a {type(text).__name__}: pass a Pattern or a text like 'na(window=7x7)'"
        )
    return _parsed(text, REGISTRY.version)


# Calls with a text name the same few patterns, once per layer and step. The version is part of the key: what a name
# stands for may change.
@lru_cache(maxsize=512)
def _parsed(text: str, version: int) -> Pattern:
    if odd := open_brackets(text):
        raise ValueError(f"pattern {text!r} {odd}")
    match = re.fullmatch(r"\s*([A-Za-z_]\w*)\s*(?:\((.*)\))?\s*", text, re.DOTALL)
    if not match:
        raise ValueError(f"pattern {text!r} is not of the form name(parameter=value, ...), like na(window=7x7)")
    name, inside = match.group(1).lower(), match.group(2) or ""
    if name not in KINDS and name in PRESETS:
        if inside.strip():
            raise ValueError(
                f"{name} takes no parameters: it stands for {PRESETS[name].pattern}, which you can write with others"
            )
        return parse(PRESETS[name].pattern)
    if name not in KINDS:
        raise ValueError(_unknown(name))
    kind = KINDS[name]
    types = _types(kind)
    fields = list(types)
    given: dict[str, Any] = {}
    for position, part in enumerate(p for p in _split(inside) if p.strip()):
        key, equals, value = (s.strip() for s in _named(part))
        if not equals and position == 0 and fields:
            key, value = fields[0], key
        elif not fields:
            raise ValueError(f"{name} has no parameters, and {text!r} has {part.strip()!r}: write {name}")
        elif not equals:
            sizes = "; values per axis stand together, like 7x7" * bool(re.fullmatch(r"\s*-?\d+\s*", part))
            raise ValueError(f"{part.strip()!r} in {text!r} is not of the form parameter=value{sizes}")
        if key not in fields:
            raise ValueError(
                f"{name} has no parameter {key!r}{nearest(key, fields)}; parameters: {', '.join(fields) or 'none'}"
            )
        if key in given:
            raise ValueError(f"{key!r} is given twice in {text!r}: give it once")
        given[key] = _value(value, types[key], f"{key}={value} in {text!r}")
    missing = [f.name for f in dataclasses.fields(kind) if _required(f) and f.name not in given]  # type: ignore[arg-type]
    if missing:
        shown = [f"{key}={as_text(value)}" for key, value in given.items()]
        shown += [f"{key}={example(types[key])}" for key in missing]
        raise ValueError(f"{name} needs {' and '.join(missing)}, like {name}({', '.join(shown)})")
    return kind(**given)


def _listed(text: str, where: str) -> tuple[Any, ...]:
    """The patterns of [a, b], or the pairs of heads and pattern of {0-3: a, 4-: b}."""
    parts = [part.strip() for part in _split(text[1:-1]) if part.strip()]
    if text[0] == "[":
        return tuple(parse(part) for part in parts)
    pairs = [part.partition(":") for part in parts]
    if any(not colon for _, colon, _ in pairs):
        raise ValueError(f"{where}: write heads: pattern in braces, like {{0-3: dense, 4-: na(window=7x7)}}")
    return tuple((heads.strip(), parse(pattern.strip())) for heads, _, pattern in pairs)


def _required(field: dataclasses.Field[Any]) -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def _unknown(name: str) -> str:
    """What is said of a name that no pattern has: what it may have meant, else every name."""
    near = nearest(name, (*KINDS, *PRESETS))
    if near:
        return f"unknown pattern {name!r}{near}; `visattn patterns` lists all"
    return (
        f"unknown pattern {name!r}; patterns: {', '.join(sorted(KINDS))}; "
        f"names that stand for one: {', '.join(sorted(PRESETS))}"
    )


def _split(inside: str) -> list[str]:
    """The parts between the commas that are not inside the brackets of an inner pattern or list."""
    parts, depth = [""], 0
    for letter in inside:
        depth += (letter in "([{") - (letter in ")]}")
        if letter == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += letter
    return parts


def _named(part: str) -> tuple[str, str, str]:
    """Parameter, "=" and value; an inner pattern without a parameter's name has no "=" of its own."""
    match = re.match(r"\s*\w+\s*=", part)
    return part.partition("=") if match or "(" not in part else (part, "", "")


def _types(kind: type[Pattern]) -> dict[str, tuple[Any, ...]]:
    """The types that each parameter of a pattern may have."""
    hints = get_type_hints(kind)
    return {f.name: get_args(hints[f.name]) or (hints[f.name],) for f in dataclasses.fields(kind)}  # type: ignore[arg-type]


def _value(text: str, wanted: tuple[Any, ...], where: str) -> Any:
    """A value of a parameter that has one of the `wanted` types."""
    text = re.sub(r"^([\"'])(.*)\1$", r"\2", text, flags=re.DOTALL)
    if text[:1] + text[-1:] in ("[]", "{}"):
        return _listed(text, where)
    low = text.lower()
    if low in ("true", "false", "none"):
        return {"true": True, "false": False, "none": None}[low]
    if any(isinstance(kind, type) and issubclass(kind, Pattern) for kind in wanted):
        return parse(text)
    if str in wanted and WORDS.fullmatch(plain := re.sub(r"\s+", "", low)):
        return plain
    if re.fullmatch(r"-?\d+(x-?\d+)+", low):
        return tuple(int(part) for part in low.split("x"))
    if re.fullmatch(r"\(.+\)", low, re.DOTALL):
        return tuple(_value(part.strip(), wanted, where) for part in low[1:-1].rstrip(", ").split(","))
    for number in (int, float):
        try:
            return number(low)
        except ValueError:
            continue
    raise ValueError(f"{where} is not {'a word' if str in wanted else 'a number, sizes like 7x7, true, false or none'}")
