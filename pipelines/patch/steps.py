"""Which denoising step a pipeline is at, without looking at timestep values.

Timestep values would cost a synchronisation with the GPU, differ in shape from model to model, and say nothing
about how many steps there are.
"""

from __future__ import annotations

import functools
from typing import Any

import torch

HOOK = "visattn_steps"


class StepCount:
    """Steps that a scheduler has done since its timesteps were last set.

    Attributes:
        done: Finished steps, so the index of the current one; None before the first run.
        total: Number of steps of the run.
    """

    def __init__(self) -> None:
        self.done: int | None = None
        self.total: int | None = None


def _restored(kind: type, state: dict[str, Any]) -> Any:
    """A scheduler of the original class, for copies and pickles."""
    scheduler = object.__new__(kind)
    scheduler.__dict__.update(state)
    return scheduler


@functools.lru_cache(maxsize=64)
def _counting(kind: Any) -> type:
    """A subclass of a scheduler class that counts its steps in `_visattn_steps`."""

    @functools.wraps(kind.set_timesteps)
    def set_timesteps(self: Any, *args: Any, **kwargs: Any) -> Any:
        result = kind.set_timesteps(self, *args, **kwargs)
        count: StepCount = self._visattn_steps
        count.done = 0
        count.total = len(self.timesteps)
        return result

    @functools.wraps(kind.step)
    def step(self: Any, *args: Any, **kwargs: Any) -> Any:
        result = kind.step(self, *args, **kwargs)
        count: StepCount = self._visattn_steps
        count.done = (count.done or 0) + 1
        return result

    # Some pipelines copy their scheduler to denoise a second stream: copies do not count.
    def reduce(self: Any, protocol: int) -> Any:
        state = {key: value for key, value in self.__dict__.items() if key != "_visattn_steps"}
        return _restored, (kind, state)

    body = {"set_timesteps": set_timesteps, "step": step, "__reduce_ex__": reduce, "__doc__": kind.__doc__}
    # The same name: save_pretrained writes it into the configuration.
    counting = type(kind.__name__, (kind,), body)
    counting.__module__, counting.__qualname__ = kind.__module__, kind.__qualname__
    return counting


class SchedulerSteps:
    """Counts the steps of a pipeline's scheduler; follows the pipeline to a new scheduler."""

    def __init__(self, pipeline: Any) -> None:
        self._pipeline = pipeline
        self._scheduler: Any = None
        self._kind: type | None = None
        self._count = StepCount()
        self._watch()

    def now(self) -> tuple[int | None, int | None]:
        """Index of the current step and the number of steps, None where unknown."""
        if self._pipeline.scheduler is not self._scheduler:
            self.remove()
            self._watch()
        total = self._count.total
        # Image-to-image pipelines start in the middle of the timesteps and tell the scheduler where.
        begin = getattr(self._scheduler, "begin_index", None) or 0
        return self._count.done, None if total is None else total - begin

    def remove(self) -> None:
        """Give the scheduler its own class back."""
        if self._scheduler is not None and self._kind is not None:
            self._scheduler.__class__ = self._kind
            self._scheduler.__dict__.pop("_visattn_steps", None)
        self._scheduler, self._kind = None, None

    def _watch(self) -> None:
        scheduler = self._pipeline.scheduler
        self._scheduler, self._count = scheduler, StepCount()
        if not hasattr(type(scheduler), "step") or not hasattr(type(scheduler), "set_timesteps"):
            return
        if "_visattn_steps" in scheduler.__dict__:
            # Another handle on the same pipeline counts already.
            self._count = scheduler._visattn_steps
            return
        self._kind = type(scheduler)
        scheduler._visattn_steps = self._count
        scheduler.__class__ = _counting(self._kind)


class ContextSteps:
    """Reads the step that a pipeline passes to `model.cache_context`."""

    def __init__(self, model: torch.nn.Module) -> None:
        from diffusers.hooks.hooks import BaseState, HookFunctionReference, HookRegistry, ModelHook, StateManager

        class Listener(ModelHook):
            """Receives the context like a cache hook, but leaves the forward alone."""

            _is_stateful = True

            def __init__(self) -> None:
                super().__init__()
                self.manager = StateManager(BaseState)  # type: ignore[arg-type]

            def reset_state(self, module: torch.nn.Module) -> torch.nn.Module:
                return module

            def __reduce_ex__(self, protocol: int) -> Any:
                return ModelHook, ()

        self._model = model
        self._fresh = not hasattr(model, "_diffusers_hook")
        self._registry = HookRegistry.check_if_exists_or_initialize(model)
        self._listener = Listener()
        # In front: removing a later hook then never rewires this one, which has no forward of its own.
        self._registry.hooks[HOOK] = self._listener
        self._registry._hook_order.insert(0, HOOK)
        self._registry._fn_refs.insert(0, HookFunctionReference())

    def now(self) -> tuple[int | None, int | None]:
        """Index of the current step and the number of steps, None where unknown."""
        # Up to diffusers 0.40 a context is only a name.
        context = getattr(self._listener.manager, "_context", None)
        return getattr(context, "step_index", None), getattr(context, "num_inference_steps", None)

    def remove(self) -> None:
        """Leave the model's hook registry as it was."""
        if self._registry.hooks.get(HOOK) is self._listener:
            index = self._registry._hook_order.index(HOOK)
            del self._registry.hooks[HOOK], self._registry._hook_order[index], self._registry._fn_refs[index]
        if self._fresh and not self._registry.hooks and hasattr(self._model, "_diffusers_hook"):
            del self._model._diffusers_hook
