"""Values of pattern parameters: checked, and in the one form that equal patterns share."""

from __future__ import annotations

import dataclasses
import math
import numbers
from collections.abc import Sequence
from typing import Any, get_args, get_origin, get_type_hints

import numpy as np

from visattn.given import counted, said
from visattn.layout import LARGEST

PerAxis = int | tuple[int, ...]
# torch's generators take no larger one.
LARGEST_SEED = 2**64 - 1
# What engines compute in holds no larger number.
LARGEST_REAL = float(np.finfo(np.float32).max)


# What a pattern may have beside tokens (samples, agents, clusters, features) where the grid has fewer tokens.
MANY = 2**16


def is_axes(value: Any) -> bool:
    """Whether a value is one of something per axis: a sequence, but no text and no bytes."""
    return isinstance(value, Sequence) and not isinstance(value, str | bytes | bytearray | memoryview)


def whole_numbers(value: Any, name: str, low: int, also: Sequence[int] = (), high: int = LARGEST) -> PerAxis:
    """Check a parameter that is one whole number or one per axis; lists become tuples.

    Args:
        value: What the user gave.
        name: What the error calls it.
        low: Smallest number allowed.
        also: Further numbers allowed (-1 for a whole axis).
        high: Largest number allowed.

    Raises:
        ValueError: If it is anything else.
    """
    found, limits = _whole(tuple(value) if is_axes(value) else (value,), low, also, high)
    if found is None:
        raise ValueError(f"{name}={said(value)} must be a whole number of {limits}, or one per axis like 7x7")
    return found if is_axes(value) else found[0]


def whole_number(value: Any, name: str, low: int, why: str = "", high: int = LARGEST) -> int:
    """Check a parameter that is one whole number, never one per axis (for which `why` is the reason).

    Raises:
        ValueError: If it is anything else.
    """
    many = is_axes(value)
    found, limits = _whole(() if many else (value,), low, (), high)
    if found is None:
        raise ValueError(
            f"{name}={said(value)} must be one whole number of {limits}" + f": {why}" * (bool(why) and many)
        )
    return found[0]


def _whole(given: tuple[Any, ...], low: int, also: Sequence[int], high: int) -> tuple[tuple[int, ...] | None, str]:
    """Whole numbers in their form, None where they are none or out of range; and the limits to tell."""
    limits = f"at least {low}" + "".join(f" or {n}" for n in also)
    try:
        # int makes numbers of text and bytes, too.
        words = any(isinstance(n, bool | np.bool_ | str | bytes | bytearray) for n in given)
        whole = tuple(int(n) for n in given)
        if not whole or words or any(w != n for w, n in zip(whole, given, strict=True)):
            return None, limits
    except (TypeError, ValueError, OverflowError):
        return None, limits
    if max(whole) > high:
        return None, f"at most {high}"
    return (whole if all(n >= low or n in also for n in whole) else None), limits


def check_many(number: int, tokens: int, what: str, many: int = MANY) -> None:
    """Raise a ValueError for more of something than there are tokens, where that is more than `many` too.

    Args:
        number: How many.
        tokens: Of the grid.
        what: What the error calls them, like "samples=10 random keys".
        many: So many there may be on any grid.
    """
    if number > max(tokens, many):
        raise ValueError(f"{what} are more than the {tokens} tokens of the grid, and more than {many}: give fewer")


def is_number(value: object) -> bool:
    """Whether a value is a real number that float32 holds, and no boolean."""
    if not isinstance(value, numbers.Real) or isinstance(value, bool):
        return False
    try:
        # Comparisons with what is no number are false.
        return abs(float(value)) <= LARGEST_REAL
    except OverflowError:
        return False


def real_number(value: Any) -> float:
    """A number as the float that stands for all its spellings: 1 is 1.0, and -0.0 is 0.0."""
    return float(value) + 0.0


def drift_of(value: Any) -> float:
    """Check how far means of blocks may move before lists are chosen again; infinity is for any way.

    Raises:
        ValueError: If it is no number above 0.
    """
    infinite = isinstance(value, float) and value == math.inf
    if not (is_number(value) or infinite) or value <= 0:
        raise ValueError(
            f"drift={said(value)} must be a number above 0, like 0.3: a share of the norm of the means; inf never looks"
        )
    return real_number(value)


def flag(value: Any, name: str) -> bool:
    """Check a parameter that is true or false; 1 and 0 mean the same.

    Raises:
        ValueError: If it is anything else.
    """
    if not isinstance(value, numbers.Real | np.bool_) or value not in (0, 1):
        raise ValueError(f"{name}={said(value)} must be true or false")
    return bool(value)


def flags(value: Any, name: str) -> bool | tuple[bool, ...]:
    """Check a parameter that is true or false, or one of them per axis; lists become tuples.

    Raises:
        ValueError: If it is anything else.
    """
    if is_axes(value) and value:
        return tuple(flag(each, name) for each in value)
    return flag(value, name)


def aligned(values: dict[str, Any], what: object = "") -> dict[str, Any]:
    """Values per axis in canonical form: the first alone says how many axes there are.

    Several spellings mean the same once one parameter has a value per axis: window 7x7 with stride 2 or 2x2. The
    first parameter then gets one value per axis, and the others stay tuples only where they differ by axis.

    Args:
        values: Parameters by name, each one value or a tuple of one per axis.
        what: What the error calls them, the pattern itself.

    Raises:
        ValueError: If two of them have different numbers of axes.
    """
    lengths = {len(value) for value in values.values() if isinstance(value, tuple)}
    if not lengths:
        return values
    if len(lengths) > 1:
        *others, last = (name for name, value in values.items() if isinstance(value, tuple))
        raise ValueError(f"{what}: {', '.join(others)} and {last} must have equally many axes (or be scalars)")
    first, *rest = values
    return {first: per_axis(values[first], lengths.pop(), first)} | {name: uniform(values[name]) for name in rest}


def axis_values(pattern: Any) -> dict[str, Any]:
    """The parameters of a pattern that may have a value per axis, by name; those that are None are left out."""
    hints = get_type_hints(type(pattern))
    found = {f.name: getattr(pattern, f.name) for f in dataclasses.fields(pattern) if _has_tuples(hints[f.name])}
    return {name: value for name, value in found.items() if value is not None}


def _has_tuples(hint: Any) -> bool:
    return any(get_origin(kind) is tuple for kind in get_args(hint))


def uniform(value: Any) -> Any:
    """One value for a tuple that repeats it, anything else as it is."""
    return value[0] if isinstance(value, tuple) and len(set(value)) == 1 else value


def per_axis(value: Any, dims: int, name: str) -> tuple[Any, ...]:
    """One value per grid axis; a scalar holds for every axis.

    Raises:
        ValueError: If the number of values is not the number of axes.
    """
    if not isinstance(value, tuple):
        return (value,) * dims
    if len(value) != dims:
        give = f"{dims} or 1" if dims > 1 else "1 value"
        said_values, axes = counted(len(value), "value"), counted(dims, "axis", "axes")
        raise ValueError(f"{name}={as_text(value)} has {said_values} but the grid has {axes}: give {give}")
    return value


def as_text(value: Any) -> str:
    """A value as `parse` reads it: 7x7, (7,) for the value of a single axis, true, none, 0.5."""
    if isinstance(value, tuple) and value and not all(isinstance(each, int | float | np.number) for each in value):
        # Patterns, or pairs of heads and a pattern.
        opening, closing = "{}" if isinstance(value[0], tuple) else "[]"
        return f"{opening}{', '.join(str(each) for each in value)}{closing}"
    if isinstance(value, tuple):
        return f"({as_text(value[0])},)" if len(value) == 1 else "x".join(str(int(v)) for v in value)
    if isinstance(value, bool) or value is None:
        return str(value).lower()
    return repr(value) if isinstance(value, float) else str(value)
