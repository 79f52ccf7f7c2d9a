"""Functions of a pattern inside torch.compile: run while tracing, their results constants of the compiled code."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from visattn.patterns.base import Pattern
from visattn.patterns.text import parse


def constant(function: Callable[..., Any], pattern: Pattern | str, *given: Any) -> Any:
    """function(pattern, *given), as a constant of compiled code for every pattern that is written alike.

    The tracer makes no constant of a frozen dataclass (torch 2.11), or only of one by its identity (2.14, which traces
    equal patterns again). Here the pattern is what a method is called on, and its text, a plain string among the
    arguments, is what compiled code is guarded by. One made in compiled code has no text: it is made a second time,
    of its parameters.

    Args:
        function: A function defined in a module, of a pattern and arguments that the tracer knows as constants.
        pattern: The pattern or its text.
        given: Further arguments.
    """
    if not isinstance(pattern, Pattern):
        return _of_text(function, pattern, *given)
    if hasattr(pattern, "_written"):
        return pattern._constant(function, pattern._written, *given)
    kind = type(pattern)
    names = _names(kind)
    return _of_parameters(function, kind, names, tuple([getattr(pattern, name) for name in names]), *given)


def _of_text(function: Callable[..., Any], text: str, *given: Any) -> Any:
    return function(parse(text), *given)


def _names(kind: type[Pattern]) -> tuple[str, ...]:
    return tuple(field.name for field in dataclasses.fields(kind) if field.init)  # type: ignore[arg-type]


def _of_parameters(
    function: Callable[..., Any], kind: type[Pattern], names: tuple[str, ...], values: tuple[Any, ...], *given: Any
) -> Any:
    return function(kind(**dict(zip(names, values, strict=True))), *given)


# As for `Pattern._constant`.
for _each in (_of_text, _names, _of_parameters):
    _each._dynamo_marked_constant = True
