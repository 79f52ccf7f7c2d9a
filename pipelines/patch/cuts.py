"""Hooks that cut the tokens of a model in slabs and join them again.

None of it is traced: where a sequence is cut depends on the grid of the forward. Compiled code around such a module has
a break there, of which a forward has a few; a module that is compiled on its own gets its inputs cut outside of it.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch

from visattn.copies import Hook
from visattn.outside import CALL, Around
from visattn.pipelines.patch.untraced import untraced

# What makes of a tensor and the axis of its tokens one with a process's share of these, or with all of them.
Change = Callable[[torch.Tensor, int], torch.Tensor]


class CutInputs(Hook):
    """Cuts inputs of a module before its forward.

    Args:
        change: How.
        plan: Which inputs, as diffusers describes them.
        module: The module.
    """

    def __init__(self, change: Change, plan: dict[Any, Any], module: torch.nn.Module) -> None:
        self._change, self._plan, self._module = change, plan, module
        self._names = list(inspect.signature(type(module).forward).parameters)[1:]
        # Whether the inputs are cut outside of the module's own compiled code.
        self._outside = False

    def __call__(self, module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A forward pre-hook."""
        if self._outside and torch.compiler.is_compiling():
            return None
        return self.cut(args, kwargs)

    @untraced
    def cut(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments with those of the plan cut."""
        given, kwargs = list(args), dict(kwargs)
        for name, cut in self._plan.items():
            if name in kwargs:
                kwargs[name] = _cut(self._change, kwargs[name], cut)
            elif name in self._names and (at := self._names.index(name)) < len(given):
                given[at] = _cut(self._change, given[at], cut)
        return tuple(given), kwargs

    def stand(self) -> None:
        """See to the module if it was compiled since; when a forward of the model begins."""
        run = vars(self._module).get(CALL)
        self._outside = run is not None
        if run is not None and _Cutting.of(self._module) is None:
            vars(self._module)[CALL] = _Cutting(run, self)

    def leave(self) -> None:
        """Give the module its own call back."""
        around = _Cutting.of(self._module)
        if around is not None:
            around.leave(self._module)


class _Cutting(Around):
    """The compiled call of a module, on inputs that are cut before."""

    def __init__(self, run: Callable[..., Any], cut: CutInputs) -> None:
        super().__init__(run)
        self._cut = cut

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Cut and run."""
        args, kwargs = self._cut.cut(args, kwargs)
        return self.run(*args, **kwargs)


class Stand(Hook):
    """Before a forward of the model: which modules are compiled on their own?"""

    def __init__(self, cuts: Sequence[CutInputs]) -> None:
        self._cuts = cuts

    def __call__(self, module: torch.nn.Module, args: tuple[Any, ...]) -> None:
        """A forward pre-hook."""
        if not torch.compiler.is_compiling():
            for cut in self._cuts:
                cut.stand()


class CutOutputs(Hook):
    """Cuts outputs of a module after its forward."""

    def __init__(self, change: Change, plan: dict[Any, Any]) -> None:
        self._change, self._plan = change, plan

    @untraced
    def __call__(self, module: torch.nn.Module, args: Any, output: Any) -> Any:
        """A forward hook."""
        one = isinstance(output, torch.Tensor)
        parts = [output] if one else list(output)
        for at, cut in self._plan.items():
            parts[at] = _cut(self._change, parts[at], cut)
        return parts[0] if one else tuple(parts)


class Join(Hook):
    """Joins outputs of a module after its forward."""

    def __init__(self, change: Change, dims: list[int | None]) -> None:
        self._change, self._dims = change, dims

    @untraced
    def __call__(self, module: torch.nn.Module, args: Any, output: Any) -> Any:
        """A forward hook."""
        one = isinstance(output, torch.Tensor)
        parts = [output] if one else list(output)
        for at, dim in enumerate(self._dims):
            if dim is not None:
                parts[at] = self._change(parts[at], dim)
        return parts[0] if one else tuple(parts)


def _cut(change: Change, x: Any, cut: Any) -> Any:
    """A rank's part of a tensor; what has other dimensions than the plan expects stays, as in diffusers."""
    if not isinstance(x, torch.Tensor) or (cut.expected_dims is not None and x.ndim != cut.expected_dims):
        return x
    return change(x, cut.split_dim)
