"""Starting a kernel: on the right device, with every option that Triton's releases disagree on set."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping
from contextlib import contextmanager
from types import MappingProxyType
from typing import Any, NamedTuple

import torch

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


class Starts:
    """The kernels of calls that are alike: same shapes, strides, dtypes, device, pattern, options.

    Args:
        device: Where they run.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._ready: dict[Hashable, Start | None] = {}
        self._counters: dict[int, torch.Tensor] = {}

    def run(self, key: Hashable, tensors: Mapping[str, torch.Tensor], make: Callable[[], Launch]) -> None:
        """Start a kernel.

        Args:
            key: Which kernel, and whatever else its arguments depend on.
            tensors: The tensors among its arguments that change from call to call, in the same order each time.
            make: Its launch, which is asked for once where the driver can start the kernel again by itself.
        """
        ready = self._ready.get(key)
        if ready is not None:
            addresses = [t.data_ptr() for t in tensors.values()]
            # What was compiled relies on this alignment.
            if not any(address % ALIGNMENT for address in addresses):
                if torch._C._cuda_getDevice() == self._device.index:
                    ready(addresses)
                else:
                    with torch.cuda.device(self._device):
                        ready(addresses)
                return
        made = make()
        with on(self._device):
            compiled = launch(made.kernel, made.grid, made.given, made.warps, made.stages)
            if key not in self._ready and self._device.type == "cuda":
                self._ready[key] = self._prepared(compiled, made, tensors)

    def _prepared(self, compiled: Any, made: Launch, tensors: Mapping[str, torch.Tensor]) -> Start | None:
        if any(t.data_ptr() % ALIGNMENT for t in tensors.values()):
            return None
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
        if stream not in self._counters:
            self._counters[stream] = torch.zeros(1, dtype=torch.int32, device=self._device)
        return self._counters[stream]
