"""Hooks of a swapped timm model: where the tokens of an image sit, whose they are, what a forward missed."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from visattn.copies import Hook, copy_as_is
from visattn.models.swap.flexible import grids_of
from visattn.models.swap.graphs import again_as_node, proxy_among
from visattn.models.swap.runtime import Runtime
from visattn.models.swap.sources import Source
from visattn.tally import Tally


class Follow(Hook):
    """After the source of a grid: tells the runtime the grid of this image."""

    def __init__(self, runtime: Runtime, source: Source) -> None:
        self.runtime, self.source = runtime, source

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> Any:
        """A forward hook; while torch.fx traces, it makes the module one node of the graph."""
        if proxy_among((*args, *kwargs.values())) is not None:
            return again_as_node(module, args, kwargs, out)
        samples = grids_of(args, kwargs) if self.source.flexible else None
        if samples is None:
            self.runtime.place(self.source.rule(module, args, out))
        else:
            self.runtime.place_samples(samples, int(out[0].shape[1]))
        return None


class PassBy(Hook):
    """Before a block, or anything between it and its attention: the forward that its tokens belong to."""

    def __init__(self, runtime: Runtime) -> None:
        self.runtime = runtime

    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        """A forward pre-hook."""
        if not torch.compiler.is_compiling() and args and isinstance(args[0], torch.Tensor):
            self.runtime.pass_by(args[0])


class Resume(Hook):
    """After a forward of the model: blocks that are compiled one by one take its grid in its backward pass as well."""

    def __init__(self, runtime: Runtime) -> None:
        self.runtime = runtime

    def __call__(self, module: nn.Module, args: tuple[Any, ...], out: Any) -> None:
        """A forward hook."""
        if torch.compiler.is_compiling():
            return
        place = self.runtime.forwards.value
        if place is None:
            return
        for tensor in out if isinstance(out, tuple | list) else [out]:
            node = tensor.grad_fn if isinstance(tensor, torch.Tensor) else None
            if node is not None:
                node.register_prehook(lambda grads: self.runtime.resume(place))


class RefuseDroppedPatches(Hook):
    """Before timm's patch dropout runs in training: what it leaves is no grid."""

    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        """A forward pre-hook."""
        rate = getattr(module, "prob", 0.0)
        if module.training and rate > 0:
            raise ValueError(
                f"patch_drop_rate={rate} drops patches in training, and the rest is no grid that a pattern could be "
                "applied to: create the model with patch_drop_rate=0, or remove() the handle for training"
            )


class CountForeign(Hook):
    """Before an attention module that stays as it is although a pattern was meant for it: counts the call."""

    def __init__(self, tally: Tally, path: str, reason: str) -> None:
        self.tally, self.path, self.reason = tally, path, reason

    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        """A forward pre-hook."""
        if not torch.compiler.is_compiling() and proxy_among(args) is None:
            self.tally.count(self.path, self.reason)


class Missed(Hook):
    """With `strict`: a forward must reach every swapped module."""

    def __init__(self, tally: Tally, name: str, paths: Iterable[str]) -> None:
        self.tally, self.name, self.paths = tally, name, tuple(paths)
        self._before: dict[str, int] = {}

    def __call__(self, module: nn.Module, args: tuple[Any, ...], *out: Any) -> None:
        """A forward hook, and the forward pre-hook that notes the counts before."""
        if torch.compiler.is_compiling() or proxy_among(args) is not None:
            return
        counts = self.tally.counts()
        if not out:
            self._before = counts
            return
        missed = [p for p in self.paths if counts.get(p, 0) == self._before.get(p, 0)]
        if missed:
            raise ValueError(f"strict: the forward of {self.name} missed {', '.join(missed[:4])}")


class Hooks:
    """The hooks of a swapped model.

    Attributes:
        modules: Modules that have one.
    """

    def __init__(self) -> None:
        self.modules: list[nn.Module] = []
        self._handles: list[RemovableHandle] = []

    def before(self, module: nn.Module, hook: Hook) -> None:
        """Call a hook before a module's forward."""
        self.modules.append(module)
        self._handles.append(module.register_forward_pre_hook(hook))  # type: ignore[arg-type]

    def after(self, module: nn.Module, hook: Hook, with_kwargs: bool = False) -> None:
        """Call a hook after a module's forward."""
        self.modules.append(module)
        self._handles.append(module.register_forward_hook(hook, with_kwargs=with_kwargs))  # type: ignore[arg-type]

    def remove(self) -> None:
        """Take all hooks off; a second call does nothing."""
        for handle in self._handles:
            handle.remove()
        for module in self.modules:
            copy_as_is(module)
        self._handles, self.modules = [], []
