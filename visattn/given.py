"""Checks of what users give: each names the value, what was expected and the fix, in one line."""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

# Letters of a value that an error shows at most.
SHOWN = 100


def said(value: object) -> str:
    """A value as an error shows it: its repr in one line, shortened; of a tensor or an array kind and shape."""
    shape = getattr(value, "shape", None)
    if isinstance(shape, tuple) and hasattr(value, "dtype") and shape:
        return f"{type(value).__name__} {list(shape)}"
    text = " ".join(repr(value).split())
    return text if len(text) <= SHOWN else f"{text[: SHOWN - 3]}..."


def counted(number: int, one: str, many: str = "") -> str:
    """A number of things in words: 1 axis, 2 axes; `many` is `one` and an s if not given."""
    return f"{number} {one if number == 1 else many or one + 's'}"


def switch(value: Any, name: str) -> bool:
    """Check an argument that is on or off.

    Raises:
        ValueError: If it is anything else.
    """
    if not isinstance(value, bool):
        raise ValueError(f"{name}={said(value)} must be True or False")
    return value


def real(value: Any, name: str, must: str, fits: Callable[[float], bool] = math.isfinite) -> float:
    """Check an argument that is one real number in a range; a tensor or an array of one counts, truths do not.

    Args:
        value: What the user gave.
        name: What the error calls it.
        must: What it must be, the end of the error.
        fits: Whether a number is in the range.

    Raises:
        ValueError: If it is anything else.
    """
    number = math.nan
    if isinstance(value, numbers.Real) or (hasattr(value, "dtype") and getattr(value, "ndim", None) == 0):
        try:
            number = float(value)
        except (TypeError, ValueError, RuntimeError, OverflowError):
            number = math.nan
    if isinstance(value, bool) or number != number or not fits(number):
        raise ValueError(f"{name}={said(value)} must be {must}")
    return number


def word(value: Any, name: str, words: Iterable[str]) -> str:
    """Check an argument that is one of some words.

    Raises:
        ValueError: If it is none of them.
    """
    known = tuple(words)
    if not isinstance(value, str) or value not in known:
        raise ValueError(f"{name}={said(value)} must be one of {', '.join(map(repr, known))}")
    return value


def tensor(value: Any, name: str, what: str = "") -> torch.Tensor:
    """Check an argument that is a tensor; `what` says of which shape.

    Raises:
        ValueError: If it is none.
    """
    import torch

    if not isinstance(value, torch.Tensor):
        kind = f"{type(value).__module__}.{type(value).__qualname__}".removeprefix("builtins.")
        raise ValueError(f"{name}={said(value)} is a {kind}: pass a torch tensor{f' {what}' if what else ''}")
    return value


def class_among(thing: Any, names: Collection[str]) -> str:
    """The first of some class names that a thing has: its own, or one of those that its class is derived from.

    FSDP2 derives a class for each module that it shards.

    Returns:
        The name, empty if there is none.
    """
    return next((kind.__name__ for kind in type(thing).__mro__ if kind.__name__ in names), "")


def as_numbers(value: Any) -> torch.Tensor:
    """Numbers as a tensor: one as it is, others on the CPU, whatever device torch makes tensors on."""
    import torch

    return value if isinstance(value, torch.Tensor) else torch.as_tensor(value, device="cpu")


def several(value: Any, name: str, what: str) -> list[Any]:
    """Check an argument that is a sequence, which no text is.

    Raises:
        ValueError: If it is none.
    """
    if not isinstance(value, Sequence) or isinstance(value, str | bytes | bytearray | memoryview):
        raise ValueError(f"{name}={said(value)} must be a list of {what}")
    return list(value)


def mapping(value: Any, name: str, what: str) -> Mapping[Any, Any]:
    """Check an argument that is a mapping.

    Raises:
        ValueError: If it is none.
    """
    if not isinstance(value, Mapping):
        raise ValueError(f"{name}={said(value)} is a {type(value).__name__}: pass a mapping {what}")
    return value
