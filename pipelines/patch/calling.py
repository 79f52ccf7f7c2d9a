"""How a processor calls attention, found out from its code."""

from __future__ import annotations

import dis
import enum
import functools
import types
from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch

from visattn.pipelines.patch.stock import Stock

_SDPA, _DISPATCH, _BACKEND = "scaled_dot_product_attention", "dispatch_attention_fn", "_attention_backend"
# What code calls that multiplies by its own softmax.
_OWN = {"get_attention_scores", "baddbmm", "softmax"}


class Calling(enum.Enum):
    """How a processor calls attention."""

    MEMBER = "dispatch_attention_fn with the backend it holds"
    DISPATCH = "dispatch_attention_fn, not always with a backend that it holds"
    SDPA = "F.scaled_dot_product_attention"
    UNKNOWN = "something that only running it shows"


def calling_of(processor: Any) -> Calling:
    """How a processor calls attention."""
    return _calling_of_class(type(processor), hasattr(processor, _BACKEND))


def stock_of(processor: Any) -> Stock:
    """The attention that an unpatched processor runs."""
    calling = calling_of(processor)
    if calling is Calling.MEMBER:
        return Stock(True, getattr(processor._attention_backend, "value", None))
    return Stock(calling is Calling.DISPATCH)


def own_attention(processor: Any) -> str:
    """Why nothing can stand for the attention of a processor, empty if that can be tried."""
    names = set(getattr(getattr(type(processor).__call__, "__code__", None), "co_names", ()))
    if calling_of(processor) is not Calling.UNKNOWN or not names & _OWN:
        return ""
    return computes_itself(processor)


def computes_itself(processor: Any) -> str:
    """What is said of a processor whose attention nothing can stand for."""
    name = getattr(processor, "__name__", type(processor).__name__)
    return f"{name} computes attention itself instead of calling torch's {_SDPA}"


@functools.lru_cache(maxsize=1024)
def _calling_of_class(kind: type, holds_backend: bool) -> Calling:
    call: Any = kind.__call__
    if not isinstance(call, types.FunctionType):
        return Calling.UNKNOWN
    names = call.__code__.co_names
    if holds_backend and _DISPATCH in names and _BACKEND in names:
        asked = Counter(each.argval for each in dis.get_instructions(call.__code__))
        # A call with another backend than the one it holds passes by a member, and a list of backends refuses one.
        passed_by = asked[_DISPATCH] > asked[_BACKEND] or hasattr(kind, "_SUPPORTED_BACKENDS")
        plain = _is_dispatch(call.__globals__.get(_DISPATCH))
        return Calling.DISPATCH if passed_by and plain else Calling.MEMBER
    if holds_backend:
        defining = next(each for each in kind.__mro__ if "__call__" in vars(each))
        # Its helpers get the backend from it.
        return Calling.MEMBER if _BACKEND in vars(defining) else Calling.UNKNOWN
    sources = set(_sources(call.__code__))
    if sources == {_DISPATCH} and _is_dispatch(call.__globals__.get(_DISPATCH)):
        return Calling.DISPATCH
    return Calling.SDPA if sources == {"F"} and call.__globals__.get("F") is torch.nn.functional else Calling.UNKNOWN


def _sources(code: types.CodeType) -> Iterator[str | None]:
    """Where code takes attention from: the global name whose attribute SDPA is, or that of diffusers' dispatch."""
    before = None
    for each in dis.get_instructions(code):
        if each.argval == _SDPA:
            yield before.argval if before is not None and before.opname == "LOAD_GLOBAL" else None
        elif each.argval == _DISPATCH:
            yield _DISPATCH if each.opname == "LOAD_GLOBAL" else None
        before = each


def _is_dispatch(function: Any) -> bool:
    from diffusers.models.attention_dispatch import dispatch_attention_fn

    return function is dispatch_attention_fn
