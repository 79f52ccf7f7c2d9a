"""Modules that are compiled on their own: what their hooks would see of each call, seen outside of the compiled code.

By `module.compile()`, or `torch.compile(module)` in the place of the module. Hooks are part of the compiled code, which
keeps no Python that depends on the call. Gradient checkpointing calls such a module again in a backward pass, where
somebody has to find out which forward that belongs to.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

# The attribute of a module that torch calls instead of it.
CALL = "_compiled_call_impl"

Look = Callable[[torch.Tensor], None]


class Around:
    """What stands around the compiled call of a module.

    Args:
        run: The call, or another one around it.
    """

    def __init__(self, run: Callable[..., Any]) -> None:
        self.run = run

    @classmethod
    def of(cls, module: nn.Module) -> Around | None:
        """The first of this kind that stands around a module's call."""
        run = vars(module).get(CALL)
        while isinstance(run, Around) and not isinstance(run, cls):
            run = run.run
        return run if isinstance(run, cls) else None

    def leave(self, module: nn.Module) -> None:
        """Give the module its call back."""
        at = vars(module).get(CALL)
        if at is self:
            if "_orig_mod" in module._modules and not isinstance(self.run, Around):
                del vars(module)[CALL]
            else:
                vars(module)[CALL] = self.run
        while isinstance(at, Around):
            if at.run is self:
                at.run = self.run
            at = at.run


class Looked(Around):
    """The compiled call of a module, with a look at its first tensor before.

    Args:
        run: The compiled call.
        look: Gets the tensor.
    """

    def __init__(self, run: Callable[..., Any], look: Look) -> None:
        super().__init__(run)
        self.look = look

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Look and run; compiled code around the module has its own tensors, and nobody to look."""
        if not torch.compiler.is_compiling():
            first = next((each for each in (*args, *kwargs.values()) if isinstance(each, torch.Tensor)), None)
            if first is not None:
                self.look(first)
        return self.run(*args, **kwargs)


class Outside:
    """Stands before the calls of those modules of a model that are compiled on their own.

    Args:
        model: The model.
        paths: Of the modules, any of which may be compiled in place, or replaced by `torch.compile(module)`.
        look: Gets the first tensor of each call.
    """

    def __init__(self, model: nn.Module, paths: Sequence[str], look: Look) -> None:
        parts = [path.rpartition(".") for path in paths]
        self._places = [(model.get_submodule(parent), name) for parent, _, name in parts]
        self._look = look
        self._looked: list[nn.Module] = []

    def stand(self) -> None:
        """See to the modules that were compiled since; call it when a forward of the model begins."""
        for parent, name in self._places:
            module = parent._modules.get(name)
            if module is None:
                continue
            run = vars(module).get(CALL)
            if run is None and "_orig_mod" in module._modules:
                run = module._call_impl
            if run is not None and Looked.of(module) is None:
                # Not by setattr: what torch.compile gives hands its attributes on to the module inside.
                vars(module)[CALL] = Looked(run, self._look)
                self._looked.append(module)

    def leave(self) -> None:
        """Give the modules their calls back."""
        for module in self._looked:
            looked = Looked.of(module)
            if looked is not None:
                looked.leave(module)
        self._looked.clear()
