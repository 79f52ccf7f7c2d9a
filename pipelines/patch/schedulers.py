"""Which denoising step a pipeline is at: its scheduler counts, and the pipeline that runs now is asked."""

from __future__ import annotations

import sys
import threading
import types
import warnings
import weakref
from collections.abc import Hashable, Mapping
from typing import Any

import torch

from visattn.pipelines.patch.counting import count_of, start_counting, stop_counting
from visattn.pipelines.patch.targets import models_in
from visattn.runtime.run import Step

# What running code calls the object that has the scheduler and the model: a pipeline, or a modular one's components.
_OWNERS = ("self", "components", "pipeline", "pipe")


class SchedulerSteps:
    """The steps of the pipelines that run patched models: the one that was patched, and others that share a model."""

    def __init__(self, pipeline: Any, models: Mapping[str, torch.nn.Module], strict: bool) -> None:
        self._pipeline, self._strict = pipeline, strict
        self._models = {name: weakref.ref(model) for name, model in models.items()}
        self._counting: list[Any] = []
        self._read_last = threading.local()
        self._attach(getattr(pipeline, "scheduler", None))

    def running(self, model: weakref.ref[torch.nn.Module]) -> Step:
        """The step of the pipeline that is calling a model; unknown where none is."""
        found = running_pipeline(model())
        if found is None:
            return None, None
        pipeline, _ = found
        scheduler = pipeline.scheduler
        # Set after apply(), or of another pipeline: its run has begun unseen; or apply() came in the middle of it.
        unseen = self._attach(scheduler)
        if unseen or _has_begun(scheduler):
            self._catch_up(scheduler)
        read = self._read(scheduler, getattr(pipeline, "_num_timesteps", None))
        return _frame_by_frame(pipeline) or read

    def now(self) -> Step:
        """The step of the patched pipeline's scheduler, whoever calls the model."""
        scheduler = getattr(self._pipeline, "scheduler", None)
        self._attach(scheduler)
        return self._read(scheduler, None)

    def run_begins(self) -> None:
        """Called when a scheduler's timesteps are set.

        Raises:
            ValueError: With `strict`, if the pipeline has other models than those that were patched.
        """
        for name, reference in self._models.items():
            # One of several ControlNets is named after what holds them.
            model, found = reference(), getattr(self._pipeline, name.partition(".")[0], None)
            if not isinstance(found, torch.nn.Module) or any(each is model for each in found.modules()):
                continue
            text = (
                f"{name} of {type(self._pipeline).__name__} was replaced after apply(), so that no pattern runs in it: "
                "call remove() on the handle, and apply() again"
            )
            if self._strict:
                raise ValueError(f"strict: {text}")
            warnings.warn(text, stacklevel=4)

    def remove(self) -> None:
        """Give every scheduler its own class back."""
        for scheduler in self._counting:
            stop_counting(scheduler, self)
        self._counting.clear()

    def _attach(self, scheduler: Any) -> bool:
        """Make a scheduler count; whether it did not before."""
        if not (hasattr(type(scheduler), "step") and hasattr(type(scheduler), "set_timesteps")):
            return False
        count = count_of(scheduler)
        if count is not None and self in count.watchers:
            return False
        start_counting(scheduler, self)
        if not any(each is scheduler for each in self._counting):
            self._counting.append(scheduler)
        return count is None

    def _catch_up(self, scheduler: Any) -> None:
        """Count what a scheduler has done in the run that it is in."""
        count = count_of(scheduler)
        if count is None or getattr(scheduler, "num_inference_steps", None) is None:
            return
        done, first = getattr(scheduler, "step_index", None), getattr(scheduler, "begin_index", None)
        count.begin()
        count.evaluations = 0 if done is None else done - (first or 0)

    def token(self) -> Hashable:
        """What tells the run whose step this thread asked for last from others, None where no scheduler told it."""
        count = getattr(self._read_last, "count", None)
        return None if count is None else (count, count.runs)

    def _read(self, scheduler: Any, ran: Any) -> Step:
        count = None if scheduler is None else count_of(scheduler)
        self._read_last.count = count
        return (None, None) if count is None else count.step(scheduler, ran if isinstance(ran, int) else None)


def _has_begun(scheduler: Any) -> bool:
    """Whether a scheduler tells that it is in a run that its count has not seen begin."""
    count = count_of(scheduler)
    unseen = count is not None and count.evaluations is None
    return unseen and getattr(scheduler, "step_index", None) is not None


def _frame_by_frame(pipeline: Any) -> Step | None:
    """The step of a pipeline that gives each frame a time of its own (diffusion forcing), None for others.

    The scheduler of such a one never steps, copies of it do, one for each frame. Its times are a row of a matrix with
    all steps, and where that begins in memory tells the step without waiting for the device.
    """
    times, total = getattr(pipeline, "_current_timestep", None), getattr(pipeline, "_num_timesteps", None)
    if not isinstance(times, torch.Tensor) or times.ndim != 1 or not isinstance(total, int):
        return None
    if not len(times) or times.untyped_storage().nbytes() != total * times.nbytes:
        return None
    return int(times.storage_offset()) // len(times), total


def running_pipeline(model: torch.nn.Module | None) -> tuple[Any, types.FrameType] | None:
    """The pipeline that calls a model: the nearest object on the stack that has it and a scheduler, and whose frame."""
    frame = sys._getframe(1)
    while frame is not None:
        owner = _owner_in(frame, model)
        if owner is not None:
            return owner, frame
        frame = frame.f_back
    return None


def _owner_in(frame: types.FrameType, model: torch.nn.Module | None) -> Any:
    """The object with a scheduler and a model that running code got, None if it got none."""
    for name in _OWNERS:
        # Reading the locals of a frame copies them.
        if name in frame.f_code.co_varnames[: frame.f_code.co_argcount]:
            owner = frame.f_locals.get(name)
            scheduler = getattr(type(getattr(owner, "scheduler", None)), "set_timesteps", None)
            if scheduler is not None and _has(owner, model):
                return owner
    return None


def _has(owner: Any, model: torch.nn.Module | None) -> bool:
    values = getattr(owner, "__dict__", {}).values()
    return model is not None and any(each is model for value in values for each in models_in(value))
