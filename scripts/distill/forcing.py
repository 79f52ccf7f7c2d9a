"""Inputs of the teacher's attention modules for those of the student: each layer learns for itself."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn


class Forcing:
    """Lets attention modules of a student run on what those of its teacher got, inside of `active`.

    A layer's error then changes nothing for the layers behind it, and its gradient goes no further than its own
    projections.

    Args:
        teacher: The teacher, which runs before the student.
        student: Has the same modules.
        paths: Of the attention modules.
    """

    def __init__(self, teacher: nn.Module, student: nn.Module, paths: Iterable[str]) -> None:
        self._kept: dict[str, tuple[tuple[Any, ...], dict[str, Any]]] = {}
        self._on = False
        for path in paths:
            teacher.get_submodule(path).register_forward_pre_hook(self._keep(path), with_kwargs=True)
            own = student.get_submodule(path)
            own.register_forward_pre_hook(self._give(path), with_kwargs=True)
            own.register_forward_hook(self._cut)

    @contextmanager
    def active(self, on: bool) -> Iterator[None]:
        """Context of a forward of the teacher and one of the student behind it."""
        self._on = on
        try:
            yield
        finally:
            self._on, self._kept = False, {}

    def _keep(self, path: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if self._on:
                self._kept[path] = args, kwargs

        return hook

    def _give(self, path: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            return self._kept[path] if self._on else None

        return hook

    def _cut(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        """What follows a module needs no gradient."""
        if not self._on:
            return None
        if isinstance(output, torch.Tensor):
            return output.detach()
        return type(output)(each.detach() if isinstance(each, torch.Tensor) else each for each in output)
