"""What patterns keep from denoising step to step: per thread, patched model, run, module and half of guidance."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from copy import copy
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import torch

from visattn.patterns.routes import Routes

T = TypeVar("T")
# A forward of a step: its name, and how many of that name came before.
Half = tuple[Hashable, int]
_FIRST: Half = (None, 0)


class Memory:
    """What the patterns of one thread keep while a patched model runs; emptied when another run begins.

    Attributes:
        step: Index of the denoising step.
        half: Which forward of this step it is: what it is called, and how many of that name came before. With guidance
            in two forwards each has choices of its own.
    """

    def __init__(self) -> None:
        self.step, self.half = -1, _FIRST
        self._run: Hashable = None
        self._total: int | None = None
        self._kept: dict[Hashable, Any] = {}
        # The last step that a value is of use for, and the half that it is of.
        self._until: dict[Hashable, tuple[int, Half]] = {}
        self._calls: dict[str, int] = {}
        self._forwards: dict[Hashable, int] = {}

    def __len__(self) -> int:
        return len(self._kept)

    def begin(self, run: Hashable, step: int, total: int | None, name: Hashable = None) -> None:
        """A forward begins.

        Args:
            run: What tells this run from others, as far as anything does.
            step: Index of the denoising step; one that goes back begins another run.
            total: Number of steps, None if unknown.
            name: What tells this forward of the step from its others, as far as anything but their order does.
        """
        new = (run, total) != self._run or step < self.step
        if new:
            self._kept, self._until = {}, {}
        if new or step != self.step:
            self._forwards = {}
        number = self._forwards.get(name, 0)
        self._forwards[name], self.half = number + 1, (name, number)
        self._run, self.step, self._total, self._calls = (run, total), step, total, {}
        self._drop([key for key, (until, _) in self._until.items() if until < step])

    def finish(self) -> None:
        """A forward is over: what serves no later step goes."""
        self._drop([key for key, (until, half) in self._until.items() if until <= self.step and half == self.half])

    def key(self, site: str) -> Hashable:
        """What a call of a module keeps goes by; each further call in this forward has another one."""
        number = self._calls[site] = self._calls.get(site, -1) + 1
        return self.half, site, number

    def get(self, key: Hashable) -> Any:
        """What is kept, None for nothing."""
        return self._kept.get(key)

    def put(self, key: Hashable, value: Any, until: int | None = None) -> None:
        """Keep a value until another takes its place, or the step `until` is over."""
        self._kept[key] = value
        if until is not None:
            self._until[key] = until, self.half

    def drop(self, key: Hashable) -> None:
        """Let a value go, which may not be there."""
        self._drop([key])

    def until(self, every: int) -> int:
        """The last step of this run that a value of this step serves, where it is good for so many steps."""
        last = self.step + every - 1
        return last if self._total is None else min(last, self._total - 1)

    def copy(self) -> Memory:
        """One that keeps the same: what a call puts or drops there is not put or dropped here."""
        found = copy(self)
        found._kept, found._until, found._calls = dict(self._kept), dict(self._until), dict(self._calls)
        found._forwards = dict(self._forwards)
        return found

    def move(self, device: torch.device | str) -> None:
        """Outputs that are kept go to a device; lists, which are small, stay."""
        for key, value in self._kept.items():
            if hasattr(value, "moved_to"):
                self._kept[key] = value.moved_to(device)

    def _drop(self, keys: list[Hashable]) -> None:
        for key in keys:
            self._kept.pop(key, None)
            self._until.pop(key, None)


class Place(NamedTuple):
    """Where a call of attention keeps what it chooses.

    Attributes:
        memory: That of the run, None where every call chooses anew: with gradients, whose backward chooses again.
        key: Of the call.
    """

    memory: Memory | None
    key: Hashable = None


_NOTHING = nullcontext()
_place: ContextVar[Place | None] = ContextVar("place", default=None)


@contextmanager
def placed(place: Place | None) -> Iterator[None]:
    """Inside, choices know where to keep what they choose."""
    before = _place.set(place)
    try:
        yield
    finally:
        _place.reset(before)


def placing(place: Place | None) -> AbstractContextManager[None]:
    """The same where there may be none."""
    return _NOTHING if place is None else placed(place)


def here() -> Place | None:
    """Where the call that runs keeps its choices; None where no patched model runs it."""
    return _place.get()


@contextmanager
def beside(what: Hashable) -> Iterator[None]:
    """Inside, calls that are parts of one keep their choices beside those of the other parts."""
    place = _place.get()
    with placed(place and place._replace(key=(place.key, what))):
        yield


def usable() -> Place | None:
    """Where choices may be kept; None outside of a run, with gradients, and where a CUDA graph is captured."""
    place = _place.get()
    if (
        place is None
        or place.memory is None
        or (torch.cuda.is_available() and torch.cuda.is_current_stream_capturing())
    ):
        return None
    return place


def moved(old: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
    """How far means [B, blocks, heads, D] are from older ones, relative to their norm; the most of all heads."""
    wide = old.float()
    off, size = (t.square().sum((1, 3)) for t in (new.float() - wide, wide))
    return (off / size.clamp(min=1e-30)).max().sqrt()


class Means(NamedTuple):
    """What a choice was made from: means of the blocks of queries and keys [B, blocks, H, D]."""

    queries: torch.Tensor
    keys: torch.Tensor

    def moved(self, other: Means) -> torch.Tensor:
        """How far means of another step are from these, relative to their norm; the largest of all samples and heads.

        What is added to all keys alike changes no choice and is left out.
        """
        old, new = (keys - keys.mean(1, keepdim=True) for keys in (self.keys.float(), other.keys.float()))
        return torch.maximum(moved(self.queries, other.queries), moved(old, new))


@dataclass
class _Kept:
    """Lists in the smallest numbers that hold them, what they were made from, and when."""

    tiles: torch.Tensor
    counts: torch.Tensor | None
    means: Means | None
    step: int
    given: torch.dtype

    @classmethod
    def of(cls, choice: Routes, means: Means | None, step: int, blocks: int, dtype: torch.dtype) -> _Kept:
        small = torch.int16 if blocks <= 2**15 else torch.int32
        kept = None if means is None else Means(*(t.to(dtype) for t in means))
        return cls(choice.tiles.to(small), choice.counts, kept, step, choice.tiles.dtype)

    def good(self, now: Means | None, drift: float) -> bool:
        """Whether the means of blocks are still near; reading that waits for the device."""
        return self.means is None or now is None or bool(self.means.moved(now) <= drift)

    @property
    def choice(self) -> Routes:
        return Routes(self.tiles.to(self.given), self.counts)


def kept_for(
    every: int,
    drift: float,
    own: Hashable,
    blocks: int,
    dtype: torch.dtype,
    means: Callable[[], Means],
    choose: Callable[[], Routes],
) -> Routes:
    """Lists of an earlier step, or new ones where those are too old or were made from other queries and keys.

    Args:
        every: Steps that lists are for.
        drift: How far the means of blocks may move before, relative to their norm; infinite if nobody looks.
        own: What else tells calls apart: pattern, layout, shapes.
        blocks: Key blocks.
        dtype: Type in which means are kept.
        means: Pools queries and keys.
        choose: Chooses anew.
    """
    place = usable()
    if place is None or place.memory is None:
        return choose()
    memory, key = place.memory, (place.key, own)
    found: _Kept | None = memory.get(key)
    if found is not None and found.step == memory.step:
        # Another engine of the same call.
        return found.choice
    now = None if math.isinf(drift) else means()
    if found is not None and memory.step - found.step < every and found.good(now, drift):
        return found.choice
    choice = choose()
    memory.put(key, _Kept.of(choice, now, memory.step, blocks, dtype), memory.until(every))
    return choice
