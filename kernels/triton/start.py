"""Starting a kernel: on the right device, with every option that Triton's releases disagree on set."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from types import MappingProxyType
from typing import Any, NamedTuple

import torch

from visattn.keep import CALL_BYTES, STORE, lasting
from visattn.kernels.triton.direct import Start, Unknown

# Triton's default of this option changes between releases: what is fused is part of the numbers.
FUSION = {"enable_fp_fusion": True}
# Bytes: Triton compiles a kernel for addresses that are multiples of this, or that are not.
ALIGNMENT = 16


@contextmanager
def on(device: torch.device) -> Iterator[None]:
    """Triton launches on the current device."""
    if device.type == "cuda":
        with torch.cuda.device(device):
            yield
    else:
        yield


def programs(given: dict[str, Any]) -> tuple[int]:
    """The launch grid of a kernel along tile lists: a program for each row tile of each (sample, head) pair."""
    return ((given["dense_rows"] + given["grid_rows"]) * given["pairs"],)


def launch(kernel: Any, grid: tuple[int, ...], given: dict[str, Any], warps: int, stages: int | None) -> Any:
    """Start a kernel on the current device; returns what Triton compiled. Without `stages` no loop is pipelined."""
    options = FUSION if stages is None else {**FUSION, "num_stages": stages}
    return kernel[grid](**given, num_warps=warps, **options)


class Launch(NamedTuple):
    """The first launch of a kernel for calls that are alike.

    Attributes:
        kernel: The kernel.
        grid: Number of programs.
        given: Its arguments.
        warps: Warps of a program.
        stages: Stages of its pipelined loops, None if it has none.
        copied: Which tensor each descriptor among the arguments is of.
    """

    kernel: Any
    grid: tuple[int, ...]
    given: dict[str, Any]
    warps: int
    stages: int | None = None
    copied: Mapping[str, str] = MappingProxyType({})


class Recorded(NamedTuple):
    """What starts a kernel again, None where Triton must, and the tensors whose addresses it takes."""

    start: Start | None
    tensors: list[torch.Tensor]


class Starts:
    """The kernels of calls that are alike: same shapes, strides, dtypes, device, pattern, options.

    Args:
        device: Where they run.
        grown: Called when a kernel has become ready, which keeps its lists and masks alive.

    Attributes:
        ready: What the driver can start by itself, None for what is left to Triton.
    """

    def __init__(self, device: torch.device, grown: Callable[[], None] = lambda: None) -> None:
        self.ready: dict[Hashable, Start | None] = {}
        self._device, self._grown = device, grown
        self._counters: dict[int, torch.Tensor] = {}

    def first(self, key: Hashable, tensors: Mapping[str, torch.Tensor], made: Launch) -> None:
        """Start a kernel by Triton's launcher, and get it ready for the next call.

        Args:
            key: Which kernel, and whatever else its arguments depend on.
            tensors: The tensors among its arguments that change from call to call, in the same order each time.
            made: Its launch.
        """
        with on(self._device):
            compiled = launch(made.kernel, made.grid, made.given, made.warps, made.stages)
            # What is compiled for addresses of less alignment serves no other call.
            if key not in self.ready and startable(self._device) and aligned(tensors.values()):
                self.ready[key] = self._prepared(compiled, made, tensors)
                self._grown()

    def _prepared(self, compiled: Any, made: Launch, tensors: Mapping[str, torch.Tensor]) -> Start | None:
        try:
            return Start(compiled, made.grid, made.given, tensors, made.copied, self._device)
        except Unknown:
            return None

    def counter(self) -> torch.Tensor:
        """A zero on the device that the kernel of the current stream leaves as a zero: int32 [1]."""
        if self._device.type != "cuda" or torch._C._cuda_isCurrentStreamCapturing():
            # Replays may run beside other work of this stream: a captured launch has a counter of its own.
            return torch.zeros(1, dtype=torch.int32, device=self._device)
        stream = torch._C._cuda_getCurrentRawStream(self._device.index)
        found = self._counters.get(stream)
        if found is None:
            found = self._counters[stream] = lasting(torch.zeros, 1, dtype=torch.int32, device=self._device)
        return found


def startable(device: torch.device) -> bool:
    """Whether a driver starts kernels there; on the CPU Triton interprets them."""
    return device.type == "cuda"


def aligned(tensors: Iterable[torch.Tensor]) -> bool:
    """Whether kernels that are compiled for aligned addresses may get these."""
    return not any(t.data_ptr() % ALIGNMENT for t in tensors)


# What the launches of a call like another one are, while somebody collects them.
_recorder: ContextVar[list[Recorded] | None] = ContextVar("recorder", default=None)


@contextmanager
def recording() -> Iterator[list[Recorded]]:
    """Inside, what `launch_like` starts is collected."""
    found: list[Recorded] = []
    before = _recorder.set(found)
    try:
        yield found
    finally:
        _recorder.reset(before)


def launch_like(
    kernel: Any,
    grid: tuple[int, ...],
    given: dict[str, Any],
    warps: int,
    stages: int | None,
    copied: Mapping[str, torch.Tensor] = MappingProxyType({}),
) -> None:
    """`launch` of a kernel all of whose tensors change from call to call: the driver starts it again.

    What it is compiled for are its other arguments, and the dtypes of the tensors.

    Args:
        kernel: The kernel.
        grid: Number of programs.
        given: Its arguments.
        warps: As in `launch`.
        stages: As in `launch`.
        copied: The tensor that each descriptor among the arguments is of.
    """
    tensors = {name: value for name, value in given.items() if isinstance(value, torch.Tensor)}
    about, roles = given, {}
    if copied:
        roles = {name: f"{name} of" for name in copied}
        tensors |= {roles[name]: tensor for name, tensor in copied.items()}
        about = given | {name: _about(given[name]) for name in copied}
    device, recorder = next(iter(tensors.values())).device, _recorder.get()
    if not startable(device) or not aligned(tensors.values()):
        launch(kernel, grid, given, warps, stages)
        if recorder is not None:
            recorder.append(Recorded(None, []))
        return
    others = tuple(value.dtype if isinstance(value, torch.Tensor) else value for value in about.values())
    key = (launch_like, kernel.fn, grid, device, warps, stages, others)
    entry = STORE.find(key) or STORE.put(key, Starts(device), CALL_BYTES)
    start = entry.value.ready.get("only")
    if start is not None:
        start([t.data_ptr() for t in tensors.values()])
    else:
        entry.value.first("only", tensors, Launch(kernel, grid, given, warps, stages, roles))
    if recorder is not None:
        recorder.append(Recorded(entry.value.ready.get("only"), list(tensors.values())))


def _about(descriptor: Any) -> Hashable:
    """What of a descriptor a kernel is compiled for and its map is made of: all but the address."""
    sizes = descriptor.shape, descriptor.strides, descriptor.block_shape
    return descriptor.base.dtype, *map(tuple, sizes), descriptor.layout
