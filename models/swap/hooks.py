"""Hooks of a swapped timm model: where the tokens of an image sit, whose they are, what a forward missed."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from visattn.copies import Hook, copy_as_is
from visattn.models.sizes import check_fixed
from visattn.models.swap.flexible import grids_of
from visattn.models.swap.graphs import again_as_node, proxy_among
from visattn.models.swap.runtime import Runtime


class Follow(Hook):
    """After the patch embedding: tells the runtime the grid of this image."""

    def __init__(self, runtime: Runtime) -> None:
        self.runtime = runtime

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> Any:
        """A forward hook; while torch.fx traces, it makes the module one node of the graph."""
        if proxy_among((*args, *kwargs.values())) is not None:
            return again_as_node(module, args, kwargs, out)
        if isinstance(out, tuple) and out[1] is None:
            self.runtime.place_samples(grids_of(args, kwargs), int(out[0].shape[1]))
        else:
            self.runtime.place(_grid(module, args, out))
        return None


def _grid(module: Any, args: tuple[Any, ...], out: Any) -> tuple[int, int]:
    """Rows and columns of patches, from what a patch embedding got and gave."""
    if isinstance(out, tuple):  # NaFlexViT: tokens and grid
        return _pair(out[1])
    if out.ndim == 4:
        rows, columns = (out.shape[1], out.shape[2]) if _is_nhwc(module) else (out.shape[2], out.shape[3])
        return _pair((rows, columns))
    if math.prod(module.grid_size) == out.shape[1]:
        return _pair(module.grid_size)
    return _pair(module.dynamic_feat_size(tuple(args[0].shape[-2:])))


def _is_nhwc(module: Any) -> bool:
    return "NHWC" in str(getattr(module, "output_fmt", "NHWC")).upper()


def _pair(size: Any) -> tuple[int, int]:
    check_fixed(size)
    return int(size[0]), int(size[1])


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

    def __init__(self, runtime: Runtime, path: str, reason: str) -> None:
        self.runtime, self.path, self.reason = runtime, path, reason

    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        """A forward pre-hook."""
        if not torch.compiler.is_compiling() and proxy_among(args) is None:
            self.runtime.tally.count(self.path, self.reason)


class Missed(Hook):
    """With `strict`: a forward must reach every swapped module."""

    def __init__(self, runtime: Runtime, paths: Iterable[str], after: bool = False) -> None:
        self.runtime, self.paths, self.after = runtime, tuple(paths), after

    def __call__(self, module: nn.Module, args: tuple[Any, ...], out: Any = None) -> None:
        """A forward hook, or a forward pre-hook that notes the counts before."""
        if torch.compiler.is_compiling() or proxy_among(args) is not None:
            return
        counts = self.runtime.tally.counts()
        if not self.after:
            self.runtime.before = counts  # type: ignore[attr-defined]
            return
        before = getattr(self.runtime, "before", {})
        missed = [p for p in self.paths if counts.get(p, 0) == before.get(p, 0)]
        if missed:
            raise ValueError(f"strict: the forward of {self.runtime.name} missed {', '.join(missed[:4])}")


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
