"""The hooks that tell a run what its tower is doing."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

from visattn.clients.transformers.grids import Args
from visattn.clients.transformers.site import Site, TowerRun
from visattn.copies import Hook
from visattn.layout import Layout
from visattn.runtime.forward import Where


def arguments(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], names: tuple[str, ...]) -> Args:
    """The arguments of a module's forward by name."""
    return dict(zip(names, args, strict=False)) | kwargs


def _names(module: nn.Module) -> tuple[str, ...]:
    return tuple(inspect.signature(type(module).forward).parameters)[1:]


class Begin(Hook):
    """Before the tower embeds its pixels: where will their tokens sit?"""

    def __init__(self, run: TowerRun, anchor: nn.Module, read: Callable[[Args], Where]) -> None:
        self.run, self.read, self.names = run, read, _names(anchor)

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """A forward pre-hook.

        Raises:
            ValueError: If compiled code would run another implementation, which somebody has set since.
        """
        if torch.compiler.is_compiling():
            if self.run.strays():
                raise ValueError(
                    f"{self.run.name}: an attention implementation was set after apply(), and compiled code would run "
                    "it instead of the pattern: set it before apply(), or call the model once before it is compiled"
                )
        else:
            self.run.repair()
        where = self.read(arguments(module, args, kwargs, self.names))
        # For blocks that are compiled one by one, too.
        self.run.traced, self.run.compiled = where, torch.compiler.is_compiling()
        if not torch.compiler.is_compiling():
            self.run.start(where)


class Finish(Hook):
    """After a forward of the tower, also one that raised: what is called next is outside of it."""

    def __init__(self, run: TowerRun) -> None:
        self.run = run

    def __call__(self, module: nn.Module, args: tuple[Any, ...], out: Any) -> None:
        """A forward hook; there is no output where the forward raised."""
        if torch.compiler.is_compiling():
            return
        if out is None:
            self.run.leave()
        else:
            self.run.finish()


class PassBy(Hook):
    """Before a module around an attention module: which forward do its tokens belong to?"""

    def __init__(self, run: TowerRun) -> None:
        self.run = run

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """A forward pre-hook."""
        if torch.compiler.is_compiling():
            return
        first = next((each for each in (*args, *kwargs.values()) if isinstance(each, torch.Tensor)), None)
        if first is not None:
            self.run.forwards.pass_by(first)


class Enter(PassBy):
    """Before an attention module, which may be told where its tokens sit."""

    def __init__(self, run: TowerRun, site: Site, module: nn.Module, told: Callable[[Args], Layout] | None) -> None:
        super().__init__(run)
        self.site, self.tell, self.names = site, told, _names(module)

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """A forward pre-hook."""
        super().__call__(module, args, kwargs)
        layout = None if self.tell is None else self.tell(arguments(module, args, kwargs, self.names))
        if torch.compiler.is_compiling():
            self.site.traced = layout
            return
        self.site.told.layout, self.site.told.turn = layout, 0


def between(tower: str, paths: Iterable[str]) -> list[str]:
    """Paths of the modules between a tower and its attention modules."""
    start = len(tower.split(".")) if tower else 0
    inner = {".".join(parts[:n]): None for parts in (p.split(".") for p in paths) for n in range(start + 1, len(parts))}
    return list(inner)
