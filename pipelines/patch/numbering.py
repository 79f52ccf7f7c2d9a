"""Numbers by which operators and compiled code know groups and runs.

Operators take numbers, not objects; a number is a constant of a compiled graph.
"""

from __future__ import annotations

import itertools
import threading
import weakref
from collections.abc import Iterable
from typing import Any

import torch

# Operators take numbers, not objects: this is the only way from a number to its object. It keeps nothing alive.
_objects: weakref.WeakValueDictionary[int, Any] = weakref.WeakValueDictionary()
# Learnable parameters of the groups by number: compiled code takes them from here, as inputs of its graph.
_tensors: dict[int, list[torch.Tensor]] = {}
_lock = threading.Lock()


def register(item: Any) -> int:
    """Give an object the smallest free number; a compiled graph that has it stays valid for the next owner."""
    with _lock:
        number = next(i for i in itertools.count() if i not in _objects)
        _objects[number] = item
    return number


def release(number: int, item: Any) -> None:
    """Free the number of an object."""
    with _lock:
        if _objects.get(number) is item:
            del _objects[number]
            _tensors.pop(number, None)


def register_tensors(number: int, tensors: Iterable[torch.Tensor]) -> None:
    """Give the learnable parameters of a numbered group to compiled code."""
    _tensors[number] = list(tensors)


def tensors_of(number: int) -> list[torch.Tensor]:
    """The learnable parameters of a group."""
    return _tensors[number]


def look_up(number: int) -> Any:
    """The object with a number, None if it is gone."""
    return _objects.get(number)


def living() -> list[Any]:
    """Every object that has a number."""
    with _lock:
        return list(_objects.values())
