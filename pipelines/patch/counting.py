"""Schedulers that count what they do, without looking at timestep values.

Timestep values would cost a synchronisation with the GPU, differ in shape from model to model, and say nothing
about how many steps there are.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Iterable
from typing import Any

import torch

from visattn.runtime.run import Step

COUNT = "_visattn_count"


class Count:
    """What a scheduler has done since its timesteps were last set; part of its state, so saved and put back with it.

    Attributes:
        evaluations: Calls of `step`, None before the first run.
        first: Position of the first timestep that ran, None if nothing told it yet.
        runs: How often timesteps were set.
        watchers: Who reads this; a scheduler counts as long as anybody does.
    """

    def __init__(self, watchers: weakref.WeakSet[Any]) -> None:
        self.evaluations: int | None = None
        self.first: int | None = None
        self.runs = 0
        self.watchers = watchers

    def __deepcopy__(self, memo: dict[int, Any]) -> Count:
        copied = Count(self.watchers)
        copied.evaluations, copied.first, copied.runs = self.evaluations, self.first, self.runs
        return copied

    def begin(self) -> None:
        """A run begins."""
        self.evaluations, self.first = 0, None
        self.runs += 1

    def at(self, arguments: Iterable[Any], timesteps: Any) -> None:
        """The scheduler is called with a timestep: the first one tells where in the list a run began."""
        if self.first is None and self.evaluations == 0:
            found = (position(each, timesteps) for each in arguments)
            self.first = next((index for index in found if index is not None), None)

    def step(self, scheduler: Any, ran: int | None) -> Step:
        """Index of the current step and the number of steps.

        Several evaluations of the model may make one step: two of a second-order scheduler, or the warm-up of PNDM.

        Args:
            scheduler: The scheduler.
            ran: Evaluations in the whole run, None to find out.
        """
        if self.evaluations is None:
            return None, None
        listed = len(scheduler.timesteps)
        first = self.first if self.first is not None else getattr(scheduler, "begin_index", None) or 0
        if ran is None or not 0 < ran <= listed:
            ran = listed - first
        order, asked = getattr(scheduler, "order", 1), getattr(scheduler, "num_inference_steps", None)
        warm_up = max(listed - asked * order, 0) if isinstance(asked, int) else 0
        assert ran is not None
        return max(self.evaluations - warm_up, 0) // order, -(-max(ran - warm_up, 1) // order)


def position(timestep: Any, timesteps: Any) -> int | None:
    """Where in a list of timesteps one of its elements is, by its address; None if it is none of them."""
    if not isinstance(timestep, torch.Tensor) or not isinstance(timesteps, torch.Tensor) or timesteps.ndim != 1:
        return None
    if timestep.device != timesteps.device or timestep.dtype != timesteps.dtype or timestep.numel() == 0:
        return None
    if timestep.untyped_storage().data_ptr() != timesteps.untyped_storage().data_ptr():
        return None
    index = int(timestep.storage_offset() - timesteps.storage_offset()) // int(timesteps.stride(0) or 1)
    return index if 0 <= index < len(timesteps) else None


def count_of(scheduler: Any) -> Count | None:
    """The count of a scheduler, None if it does not count."""
    return scheduler.__dict__.get(COUNT)


def start_counting(scheduler: Any, watcher: Any) -> None:
    """Make a scheduler count, for one more watcher."""
    kind = type(scheduler)
    if not hasattr(kind, "_visattn_kind"):
        scheduler.__class__ = counting_class(kind)
    count = count_of(scheduler)
    if count is None:
        # A state that was saved before takes the count away.
        scheduler.__dict__[COUNT] = count = Count(weakref.WeakSet())
    count.watchers.add(watcher)


def stop_counting(scheduler: Any, watcher: Any) -> None:
    """Give a scheduler its own class back, unless somebody else still reads its count."""
    count, kind = count_of(scheduler), getattr(type(scheduler), "_visattn_kind", None)
    if count is not None:
        count.watchers.discard(watcher)
        if count.watchers:
            return
        del scheduler.__dict__[COUNT]
    if kind is not None:
        scheduler.__class__ = kind


def _restored(kind: type, state: dict[str, Any]) -> Any:
    """A scheduler of the original class, for copies and pickles."""
    scheduler = object.__new__(kind)
    scheduler.__dict__.update(state)
    return scheduler


@functools.lru_cache(maxsize=64)
def counting_class(kind: Any) -> type:
    """A subclass of a scheduler class that counts in its state."""

    @functools.wraps(kind.set_timesteps)
    def set_timesteps(self: Any, *args: Any, **kwargs: Any) -> Any:
        result = kind.set_timesteps(self, *args, **kwargs)
        count = count_of(self)
        if count is not None:
            count.begin()
            for watcher in list(count.watchers):
                watcher.run_begins()
        return result

    @functools.wraps(kind.step)
    def step(self: Any, *args: Any, **kwargs: Any) -> Any:
        count = count_of(self)
        if count is not None:
            count.at((*args, *kwargs.values()), self.timesteps)
        result = kind.step(self, *args, **kwargs)
        if count is not None:
            count.evaluations = (count.evaluations or 0) + 1
        return result

    def reduce(self: Any, protocol: int) -> Any:
        return _restored, (kind, {key: value for key, value in self.__dict__.items() if key != COUNT})

    body: dict[str, Any] = {"set_timesteps": set_timesteps, "step": step, "_visattn_kind": kind}
    body |= {"__reduce_ex__": reduce, "__doc__": kind.__doc__}
    if hasattr(kind, "scale_model_input"):

        @functools.wraps(kind.scale_model_input)
        def scale_model_input(self: Any, *args: Any, **kwargs: Any) -> Any:
            count = count_of(self)
            if count is not None:
                count.at((*args, *kwargs.values()), self.timesteps)
            return kind.scale_model_input(self, *args, **kwargs)

        body["scale_model_input"] = scale_model_input
    # The same name: save_pretrained writes it into the configuration.
    counting = type(kind.__name__, (kind,), body)
    counting.__module__, counting.__qualname__ = kind.__module__, kind.__qualname__
    return counting
