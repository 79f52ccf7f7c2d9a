"""What belongs to a forward, found again where gradient checkpointing runs its blocks a second time.

A recomputation happens in the backward pass: after other forwards, in the engine's order, perhaps in another thread. It
gets the tensors of its forward, or copies of them, and is asked for by a node of that forward's graph. So a value is
remembered with both, with the memory of the tensors that pass by and with the nodes that made them, which live as long
as a recomputation can happen and no longer.
"""

from __future__ import annotations

import itertools
import threading
from collections import deque
from collections.abc import Iterable
from typing import Any, Generic, NamedTuple, TypeVar

import torch

T = TypeVar("T")
_numbers = itertools.count()
# Nodes that a search for a remembered value visits: it is a few nodes away, or nowhere.
FAR = 4096


class Moment(NamedTuple):
    """One node's turn in one backward pass."""

    task: int
    node: int


class _Here(threading.local):
    """What a thread is in.

    Attributes:
        begun: Value of the last forward, and the moment it began, None outside of a backward pass.
        passive: Whether no block of that forward will be recomputed.
        resumed: Value of the last recomputation, and its moment.
    """

    begun: Any = None
    passive: bool = False
    begun_at: Moment | None = None
    resumed: Any = None
    resumed_at: Moment | None = None


class Carrier(Generic[T]):
    """A value for each forward of one model, also in the recomputations of its blocks; safe to use from threads.

    Call `begin` when a forward begins and `pass_by` with the first tensor that a block (and whatever inside of it may
    be recomputed alone) gets, before it runs. Traced code has one forward and keeps its value elsewhere.
    """

    def __init__(self) -> None:
        self._key = f"visattn_{next(_numbers)}"
        self._here = _Here()

    def begin(self, value: T, learns: bool = True) -> None:
        """A forward of this thread begins; unless it `learns`, no block of it will be recomputed."""
        here = self._here
        here.begun, here.begun_at, here.resumed_at, here.passive = value, _moment(), None, not learns

    def end(self) -> None:
        """This thread is in no forward any more; blocks of those that were are found again as ever."""
        here = self._here
        here.begun, here.begun_at, here.passive = None, None, False

    def pass_by(self, tensor: torch.Tensor) -> None:
        """A block gets a tensor: find the forward that it belongs to, and remember that with the tensor."""
        if self._here.passive and torch._C._current_graph_task_id() < 0:
            return
        storage, moment = _storage(tensor), _moment()
        if moment is not None:
            # A recomputation gets tensors that its forward has seen; a forward within a backward pass makes new ones.
            found = getattr(storage, self._key, None)
            if found is None and self.value is None:
                found = self._nearest()
            if found is not None:
                here = self._here
                here.begun_at, here.resumed, here.resumed_at = None, found, moment
        value = self.value
        if value is None:
            return
        if storage is not None:
            setattr(storage, self._key, value)
        if tensor.grad_fn is not None:
            _metadata(tensor.grad_fn)[self._key] = value

    @property
    def value(self) -> T | None:
        """That of the forward or recomputation that this thread is in, None if nobody knows."""
        here, moment = self._here, _moment()
        if moment is None or here.begun_at == moment:
            return here.begun
        return here.resumed if here.resumed_at == moment else None

    def _nearest(self) -> T | None:
        """The value remembered with the nearest node below the one whose turn it is."""
        for node in itertools.islice(_below(torch._C._current_autograd_node()), FAR):
            if self._key in _metadata(node):
                return _metadata(node)[self._key]
        return None


def _moment() -> Moment | None:
    """The turn of the node that the engine executes in this thread, None outside of a backward pass."""
    task = torch._C._current_graph_task_id()
    if task < 0:
        return None
    node = torch._C._current_autograd_node()
    return Moment(task, -1 if node is None else node._sequence_nr())


def _metadata(node: Any) -> dict[str, Any]:
    """What a node of the graph carries for others."""
    return node.metadata


def _storage(tensor: torch.Tensor) -> torch.UntypedStorage | None:
    """The memory of a tensor, one object for all tensors that share it; None for those that have none, as in vmap."""
    try:
        return tensor.untyped_storage()
    except (NotImplementedError, RuntimeError):
        return None


def _below(node: Any) -> Iterable[Any]:
    """A node and what its gradients go to, nearest first."""
    queue, seen = deque([node] if node is not None else []), set()
    while queue:
        node = queue.popleft()
        if node in seen:
            continue
        seen.add(node)
        yield node
        queue.extend(after for after, _ in node.next_functions if after is not None)
