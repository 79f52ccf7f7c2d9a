"""Numbers by which operators and compiled code know groups and runs.

Operators take numbers, not objects; a number is a constant of a compiled graph.
"""

from __future__ import annotations

import itertools
import threading
import weakref
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch

from visattn.pipelines.patch.stock import Stock

# The only way from a number to its object. It keeps nothing alive.
_leases: weakref.WeakValueDictionary[int, Lease] = weakref.WeakValueDictionary()
# The objects themselves, for calls of attention, each of which looks its group up.
_owners: dict[int, Callable[[], Any]] = {}
# Learnable parameters of the groups by number: compiled code takes them from here, as inputs of its graph.
_tensors: dict[int, list[torch.Tensor]] = {}
# Paths of the modules by the numbers that compiled code tells, of the groups whose patterns keep something by module.
_paths: dict[int, tuple[str, ...]] = {}
_lock = threading.Lock()


class Lease:
    """The right to a number: as long as anything holds this, nobody else gets the number.

    Its owner holds it, and so does every processor that calls by the number: one that outlives the owner then meets
    nobody else.

    Attributes:
        number: The number.
        stock: The attention of a processor that has outlived the owner, None if no processor has the number.
    """

    def __init__(self, number: int, owner: Any, stock: Stock | None) -> None:
        self.number, self.stock = number, stock
        self._owner: Callable[[], Any] = weakref.ref(owner)
        _owners[number] = self._owner

    @property
    def owner(self) -> Any:
        """Whose number it is, None if that is gone."""
        return self._owner()

    def end(self) -> None:
        """The owner gives the number up."""
        self._owner = _owners[self.number] = _nobody

    def __reduce_ex__(self, protocol: Any) -> Any:
        # A copy of a processor is stock.
        return _nobody, ()


def _nobody() -> None:
    return None


def register(owner: Any, stock: Stock | None = None) -> Lease:
    """Give an object the smallest free number; a compiled graph that has it stays valid for the next owner."""
    with _lock:
        number = next(i for i in itertools.count() if i not in _leases)
        _leases[number] = lease = Lease(number, owner, stock)
    return lease


def register_tensors(lease: Lease, tensors: Iterable[torch.Tensor]) -> None:
    """Give the learnable parameters of a numbered group to compiled code."""
    _tensors[lease.number] = list(tensors)
    weakref.finalize(lease, _tensors.pop, lease.number, None)


def tensors_of(number: int) -> list[torch.Tensor]:
    """The learnable parameters of a group."""
    return _tensors[number]


def register_paths(lease: Lease, paths: Sequence[str]) -> None:
    """Let compiled code of a group tell its modules, by numbers in the order of their paths."""
    _paths[lease.number] = tuple(paths)
    weakref.finalize(lease, _paths.pop, lease.number, None)


def tells_modules(number: int) -> bool:
    """Whether compiled code of a group tells its modules."""
    return number in _paths


def path_of(number: int, module: int) -> str | None:
    """The path of a module of a group, None if that is gone."""
    paths = _paths.get(number, ())
    return paths[module] if module < len(paths) else None


def look_up(number: int) -> Any:
    """The object with a number, None if it is gone."""
    return _owners.get(number, _nobody)()


def stock_of(number: int) -> Stock | None:
    """The attention of processors with a number whose group is gone, None if nobody has that number."""
    lease = _leases.get(number)
    return None if lease is None else lease.stock


def leases() -> list[Lease]:
    """Every lease that something holds."""
    with _lock:
        return list(_leases.values())


def living() -> list[Any]:
    """Every object that has a number."""
    return [lease.owner for lease in leases() if lease.owner is not None]
