"""Hooks of a swapped timm model: where the tokens of an image sit, whose they are, what a forward missed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from visattn.copies import Hook
from visattn.models.swap.flexible import grids_of
from visattn.models.swap.graphs import again_as_node, proxy_among
from visattn.models.swap.places import Places
from visattn.models.swap.sources import Source
from visattn.runtime.place import Samples
from visattn.runtime.run import Run
from visattn.runtime.verdict import Verdict


class Follow(Hook):
    """After the source of a grid: tells where the tokens of this image sit, or that there are none."""

    def __init__(self, places: Places, source: Source) -> None:
        self.places, self.source = places, source

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> Any:
        """A forward hook; while torch.fx traces, it makes the module one node of the graph."""
        if proxy_among((*args, *kwargs.values())) is not None:
            return again_as_node(module, args, kwargs, out)
        samples = grids_of(args, kwargs) if self.source.flexible else None
        if samples is None:
            self.places.place(self.source.rule(module, args, out))
        else:
            self.places.place_samples(samples, int(out[0].shape[1]))
        return None


class Fail(Hook):
    """After the source of a grid and each module on the way to attention: a forward that raised there tells no grid."""

    def __init__(self, places: Places, told: bool = True) -> None:
        self.places, self.told = places, told

    def __call__(self, module: nn.Module, args: tuple[Any, ...], out: Any) -> None:
        """A forward hook; there is no output where the module raised."""
        if out is None and not torch.compiler.is_compiling():
            self.places.fail(self.told)


class PassBy(Hook):
    """Before a block, or anything between it and its attention: the forward that its tokens belong to."""

    def __init__(self, places: Places) -> None:
        self.places = places

    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        """A forward pre-hook."""
        if not torch.compiler.is_compiling() and args and isinstance(args[0], torch.Tensor):
            self.places.pass_by(args[0])


class Resume(Hook):
    """After a forward of the model: blocks that are compiled one by one take its grid in its backward pass as well."""

    def __init__(self, places: Places) -> None:
        self.places = places

    def __call__(self, module: nn.Module, args: tuple[Any, ...], out: Any) -> None:
        """A forward hook."""
        if torch.compiler.is_compiling():
            return
        place = self.places.forwards.value
        if place is None:
            return
        for tensor in out if isinstance(out, tuple | list) else [out]:
            node = tensor.grad_fn if isinstance(tensor, torch.Tensor) else None
            if node is not None:
                node.register_prehook(lambda grads: self.places.resume(place))


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
    """Before an attention module that stays as it is: counts the call, with the reason if a pattern was meant."""

    def __init__(self, run: Run, path: str, reason: str) -> None:
        self.run, self.path, self.reason = run, path, reason

    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        """A forward pre-hook."""
        if torch.compiler.is_compiling() or proxy_among(args) is not None:
            return
        self.run.tally.count(self.path, self.reason)
        if self.run.here.forward is not None:
            self.run.here.forward.note(self.path, Verdict("dense", why=self.reason))


class Begin(Hook):
    """Before a forward of the model."""

    def __init__(self, run: Run) -> None:
        self.run = run

    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        """A forward pre-hook; each module finds by itself where its tokens sit."""
        if not torch.compiler.is_compiling() and proxy_among(args) is None:
            self.run.start(Samples(), learns=False)


class Finish(Hook):
    """After a forward of the model, also one that raised: what is called next is outside of it."""

    def __init__(self, run: Run, places: Sequence[Places]) -> None:
        self.run, self.places = run, places

    def __call__(self, module: nn.Module, args: tuple[Any, ...], out: Any) -> None:
        """A forward hook; there is no output where the forward raised."""
        if torch.compiler.is_compiling() or proxy_among(args) is not None:
            return
        for each in self.places:
            each.fail() if out is None else each.finish()
        if out is None:
            self.run.leave()
        else:
            self.run.finish()
