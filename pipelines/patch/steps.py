"""What a pipeline tells of a call of its model through `model.cache_context`: its name and its denoising step."""

from __future__ import annotations

from typing import Any

import torch

HOOK = "visattn_steps"


class ContextSteps:
    """Reads what a pipeline passes to `model.cache_context`, by a hook of the given name."""

    def __init__(self, model: torch.nn.Module, hook: str = HOOK) -> None:
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

        self._model, self._hook = model, hook
        self._fresh = not hasattr(model, "_diffusers_hook")
        self._registry = HookRegistry.check_if_exists_or_initialize(model)
        self._listener = Listener()
        # In front: removing a later hook then never rewires this one, which has no forward of its own.
        self._registry.hooks[hook] = self._listener
        self._registry._hook_order.insert(0, hook)
        self._registry._fn_refs.insert(0, HookFunctionReference())

    def now(self) -> tuple[int | None, int | None]:
        """Index of the current step and the number of steps, None where unknown."""
        context = self._context
        return getattr(context, "step_index", None), getattr(context, "num_inference_steps", None)

    @property
    def name(self) -> str | None:
        """What the pipeline calls the call of the model that it is at, None outside of one."""
        context = self._context
        return context if isinstance(context, str) else getattr(context, "name", None)

    @property
    def told(self) -> dict[str, Any]:
        """What else the pipeline tells of that call, as keyword arguments of `cache_context`."""
        context = self._context
        if context is None or isinstance(context, str):
            return {}
        return {name: value for name, value in vars(context).items() if name != "name" and value is not None}

    @property
    def _context(self) -> Any:
        # Up to diffusers 0.40 a context is only a name.
        return getattr(self._listener.manager, "_context", None)

    def remove(self) -> None:
        """Leave the model's hook registry as it was."""
        if self._registry.hooks.get(self._hook) is self._listener:
            index = self._registry._hook_order.index(self._hook)
            del self._registry.hooks[self._hook], self._registry._hook_order[index], self._registry._fn_refs[index]
        if self._fresh and not self._registry.hooks and hasattr(self._model, "_diffusers_hook"):
            del self._model._diffusers_hook
