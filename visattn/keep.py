"""What is kept between calls: plans and their tables. The one place that decides what may be kept, and for how long.

Values are built outside of every mode of torch (inference_mode, torch.func, default devices, modes of dispatch), so
that they can be used in any other. Where tensors stand in for others, under fake, functional or tracing modes, nothing
is kept.
"""

from __future__ import annotations

import functools
import itertools
import sys
import threading
from collections.abc import Callable, Hashable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from contextvars import copy_context
from typing import Any, ParamSpec, TypeVar

import numpy as np
import torch
from torch.utils._python_dispatch import _disable_current_modes

P = ParamSpec("P")
T = TypeVar("T")

# Bytes in memory of any device, all that is kept together.
LIMIT = 512 * 2**20
# So many values stay whatever they weigh: those of the call that runs.
SPARE = 4
# What is decided once for calls that are alike takes about this much beside its arrays: Python objects, parameters of
# kernels.
CALL_BYTES = 16 * 2**10


class Entry:
    """A value that is kept.

    Attributes:
        value: That.
        leaves: Bytes of each array that it or its key holds, by identity.
        used: When it was asked for last.
    """

    __slots__ = ("leaves", "used", "value")

    def __init__(self, value: Any, leaves: dict[Hashable, int], used: int) -> None:
        self.value, self.leaves, self.used = value, leaves, used


class Store:
    """Values by key, bounded by the bytes of their arrays; those not asked for longest go first.

    Attributes:
        bytes: Of all arrays that are held, each counted once.
    """

    def __init__(self, limit: int = LIMIT, spare: int = SPARE) -> None:
        self.limit, self.spare, self.bytes = limit, spare, 0
        self._entries: dict[Hashable, Entry] = {}
        self._owners: dict[Hashable, int] = {}
        self._clock = itertools.count()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._entries)

    def find(self, key: Hashable) -> Entry | None:
        """The entry of a key."""
        # Without a lock: this runs in every call of attention.
        entry = self._entries.get(key)
        if entry is not None:
            entry.used = next(self._clock)
        return entry

    def put(self, key: Hashable, value: Any, more: int = 0) -> Entry:
        """Keep a value, which has so many bytes beside its arrays; the one of a thread that was faster stays."""
        made = Entry(value, _leaves(key, value), next(self._clock))
        if more:
            made.leaves[key] = more
        with self._lock:
            entry = self._entries.setdefault(key, made)
            if entry is made:
                self._count(made.leaves)
        return entry

    def weigh(self, key: Hashable) -> None:
        """Count the arrays that a value has come to hold since it was put here."""
        entry = self._entries.get(key)
        if entry is None:
            return
        found = _leaves(key, entry.value)
        with self._lock:
            if self._entries.get(key) is entry:
                new = {leaf: size for leaf, size in found.items() if leaf not in entry.leaves}
                entry.leaves |= new
                self._count(new)

    def holds(self, tensor: torch.Tensor) -> bool:
        """Whether the memory of a tensor is that of something kept."""
        storage = tensor.untyped_storage()
        return (storage.device, storage.data_ptr()) in self._owners

    def _count(self, leaves: dict[Hashable, int]) -> None:
        """Own these arrays once more, and make room."""
        for leaf, size in leaves.items():
            self._owners[leaf] = self._owners.get(leaf, 0) + 1
            self.bytes += size * (self._owners[leaf] == 1)
        while self.bytes > self.limit and len(self._entries) > self.spare:
            self._drop(min(self._entries, key=lambda each: self._entries[each].used))

    def entries(self) -> list[Entry]:
        """All that is kept."""
        with self._lock:
            return list(self._entries.values())

    def clear(self) -> None:
        """Forget everything."""
        with self._lock:
            self._entries, self._owners, self.bytes = {}, {}, 0

    def _drop(self, key: Hashable) -> None:
        for leaf, size in self._entries.pop(key).leaves.items():
            self._owners[leaf] -= 1
            if not self._owners[leaf]:
                del self._owners[leaf]
                self.bytes -= size


STORE = Store()


def kept(build: Callable[P, T]) -> Callable[P, T]:
    """Build a value once for each combination of arguments, which must be hashable and decide the value alone."""

    @functools.wraps(build)
    def find(*args: P.args, **options: P.kwargs) -> T:
        # torch.export takes what is kept as constants; torch.compile and fake tensors would mix with it.
        if torch.compiler.is_dynamo_compiling() or (
            torch._C._len_torch_dispatch_stack() and stands_in() and not torch.compiler.is_exporting()
        ):
            return build(*args, **options)
        key = (build, args, tuple(options.items()))
        entry = STORE.find(key)
        if entry is None:
            entry = STORE.put(key, lasting(outside_of_modes, build, *args, **options))
        return entry.value

    return find


def lasting(build: Callable[..., T], *args: Any, **options: Any) -> T:
    """Call a function whose tensors stay: they are in nobody's pool of memory.

    The pool of code that torch.compile warms up belongs to its CUDA graphs, which refuse memory that stays in use. It
    gets what that thread allocates.
    """
    if not warms_up():
        return build(*args, **options)
    device = torch.cuda.current_device()

    def elsewhere() -> T:
        torch.cuda.set_device(device)
        return build(*args, **options)

    with ThreadPoolExecutor(1) as thread:
        value = thread.submit(copy_context().run, elsewhere).result()
    torch.cuda.current_stream().wait_stream(torch.cuda.default_stream())
    return value


def warms_up() -> bool:
    """Whether this may run inside of what torch.compile warms up for its CUDA graphs: on a stream of its own."""
    return (
        "torch._inductor.cudagraph_trees" in sys.modules
        and torch.cuda.is_initialized()
        and not torch._C._cuda_isCurrentStreamCapturing()
        and torch.cuda.current_stream() != torch.cuda.default_stream()
    )


def clear_caches() -> None:
    """Free the plans and tables that are kept between calls; the next calls make them again."""
    STORE.clear()


@contextmanager
def untraced() -> Iterator[None]:
    """Let torch.jit.trace record nothing."""
    library: Any = torch._C
    state = library._get_tracing_state()
    if state is None:
        # Below an operator, where tracing is out of reach, its state may not even be set.
        yield
        return
    library._set_tracing_state(None)
    try:
        yield
    finally:
        library._set_tracing_state(state)


def stands_in() -> bool:
    """Whether tensors that are made here would stand in for others."""
    keys = torch._C._TorchDispatchModeKey
    return any(torch._C._get_dispatch_mode(key) is not None for key in (keys.FAKE, keys.PROXY, keys.FUNCTIONAL))


def outside_of_modes(build: Callable[P, T], *args: P.args, **options: P.kwargs) -> T:
    """Call a function as if no mode of torch were on."""
    with ExitStack() as stack:
        # These first and always: torch.export records changes of the others, in a stack of modes of its own.
        stack.enter_context(torch._C.DisableTorchFunction())
        stack.enter_context(_disable_current_modes())
        stack.enter_context(untraced())
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.no_grad())
        if torch._C._are_functorch_transforms_active():
            from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack

            stack.enter_context(temporarily_clear_interpreter_stack())
        return build(*args, **options)


def _leaves(key: Hashable, value: Any) -> dict[Hashable, int]:
    """Bytes of each array that a value or its key holds, by identity."""
    return dict(_arrays((key, value), set()))


def _arrays(thing: Any, seen: set[int]) -> Iterator[tuple[Hashable, int]]:
    """Identity and bytes of the memory of every array and tensor that a value holds."""
    if id(thing) in seen or isinstance(thing, type | str | bytes | int | float | torch.device | torch.dtype):
        return
    seen.add(id(thing))
    if isinstance(thing, torch.Tensor):
        if thing.is_meta:
            # A shape: it has no memory.
            return
        storage = thing.untyped_storage()
        yield (storage.device, storage.data_ptr()), storage.nbytes()
        return
    if isinstance(thing, np.ndarray):
        while isinstance(thing.base, np.ndarray):
            thing = thing.base
        yield id(thing), thing.nbytes
        return
    inside: Any = getattr(thing, "__dict__", {})
    if isinstance(thing, dict):
        inside = thing
    for each in thing if isinstance(thing, tuple | list | set | frozenset) else list(inside.values()):
        yield from _arrays(each, seen)
