"""Forward and backward of a step as one CUDA graph: small models wait for the host's launches, not for the GPU."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch import nn

# Steps that run as they are before one is recorded: what is planned, compiled and kept at first is ready then.
WARM_UP = 2
# Relative difference of the first replay on another batch to that step itself, above which a recording is given up:
# kernels may be others in a recording, so that bits are equal up to rounding.
LIMIT = 0.1

Figures = Mapping[str, torch.Tensor]


class Recorded:
    """Gradients of steps that differ in the values of their batches alone: recorded once, then replayed.

    The gradients of a replay lie where those of the recorded step did, so nobody may let go of them.

    Args:
        gradients: Runs forward and backward of a step's batches, and returns its figures.
        parameters: What learns.
    """

    def __init__(self, gradients: Callable[[Sequence[Any]], Figures], parameters: Sequence[nn.Parameter]) -> None:
        self._gradients, self._parameters = gradients, parameters
        # What is recorded may not touch the default stream, and nodes of autograd stay with the stream that made them:
        # steps which are not recorded run on this one too.
        self._stream = torch.cuda.Stream()
        self._phase: Any = None
        self._waits, self._works = 0, True
        self._forget()

    @property
    def replays(self) -> bool:
        """Whether the gradients that there are now are those of a recorded step."""
        return self._graph is not None

    def run(self, batches: Sequence[Any], phase: Any) -> Figures:
        """Puts the gradients of some batches where parameters have theirs; returns the figures.

        Args:
            batches: Dataclasses and dictionaries of tensors on the device, shaped like those of other steps.
            phase: Steps of another phase do other things: they are recorded anew.
        """
        if phase != self._phase:
            self._phase, self._waits = phase, WARM_UP
            self._forget()
        if self._graph is None:
            if self._waits or not self._works:
                self._waits = max(0, self._waits - 1)
                return self._plainly(batches)
            if not self._record(batches):
                return self._plainly(batches)
        else:
            for held, new in zip(_tensors(self._batches), _tensors(batches), strict=True):
                if held is not new:
                    held.copy_(new)
            if not self._checked and not self._is_right(batches):
                self._give_up("a replay differs from the step itself")
                return self._plainly(batches)
        assert self._graph is not None
        self._graph.replay()
        return self._figures

    def _is_right(self, batches: Sequence[Any]) -> bool:
        """Whether a replay gives what the step gives, on a batch that is not the recorded one."""
        assert self._graph is not None
        self._checked = True
        self._graph.replay()
        held = [parameter.grad for parameter in self._parameters]
        replayed = [[each.clone() for each in side] for side in (self._figures.values(), _there(held))]
        self._clear()
        plain = [list(self._plainly(batches).values()), _there(parameter.grad for parameter in self._parameters)]
        for parameter, grad in zip(self._parameters, held, strict=True):
            parameter.grad = grad
        return all(_apart(*sides) < LIMIT for sides in zip(replayed, plain, strict=True))

    def _plainly(self, batches: Sequence[Any]) -> Figures:
        """Runs a step that is not recorded."""
        around = torch.cuda.current_stream()
        self._stream.wait_stream(around)
        with torch.cuda.stream(self._stream):
            figures = self._gradients(batches)
        around.wait_stream(self._stream)
        return figures

    def _record(self, batches: Sequence[Any]) -> bool:
        """Records a step, which does not run; whether that works."""
        self._clear()
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, stream=self._stream, capture_error_mode="thread_local"):
                self._figures = self._gradients(batches)
        except RuntimeError as error:
            self._give_up(str(error).partition("\n")[0])
            return False
        self._graph, self._batches, self._checked = graph, batches, False
        return True

    def _give_up(self, reason: str) -> None:
        """Records nothing from now on."""
        self._works = False
        self._forget()
        print(f"steps cannot be recorded as a CUDA graph, they run launch by launch: {reason}", file=sys.stderr)

    def _forget(self) -> None:
        """Lets go of a recorded step and its memory."""
        self._graph: torch.cuda.CUDAGraph | None = None
        self._checked = False
        self._batches: Sequence[Any] = ()
        self._figures: Figures = {}
        self._clear()

    def _clear(self) -> None:
        for parameter in self._parameters:
            parameter.grad = None


def _there(values: Iterable[torch.Tensor | None]) -> list[torch.Tensor]:
    return [value for value in values if value is not None]


def _apart(ours: Sequence[torch.Tensor], theirs: Sequence[torch.Tensor]) -> float:
    """Relative distance of what two steps gave; 0 where the second is none or not finite, which says nothing."""
    if len(ours) != len(theirs):
        return math.inf
    one, other = (torch.cat([each.flatten().float() for each in side]) for side in (ours, theirs))
    apart, size = torch.stack([(one - other).norm(), other.norm()]).tolist()
    if not (math.isfinite(size) and size):
        return 0.0
    return apart / size if math.isfinite(apart) else math.inf


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    """The tensors of nested dataclasses, dictionaries and sequences, in a fixed order."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, Mapping):
        for each in value.values():
            yield from _tensors(each)
    elif isinstance(value, list | tuple):
        for each in value:
            yield from _tensors(each)
    elif is_dataclass(value):
        for entry in fields(value):
            yield from _tensors(getattr(value, entry.name))
