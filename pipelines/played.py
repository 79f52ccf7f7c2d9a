"""What denoising models gave in a dense run, played again where another run begins like it."""

from __future__ import annotations

import functools
import itertools
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils._pytree import tree_leaves, tree_map

from visattn.pipelines.patch.steps import HOOK as STEPS

# Bytes of outputs that are kept at most.
KEPT = 2**30


class Played:
    """The outputs of all forwards of some runs of a pipeline.

    Runs that are dense up to a step give until then what the dense run gave: playing it saves its time.
    """

    def __init__(self, models: Sequence[torch.nn.Module], steps: int, runs: int) -> None:
        """Record nothing yet.

        Args:
            models: The denoising models of a pipeline.
            steps: Denoising steps of a run.
            runs: How often the pipeline is called for all samples.
        """
        self._models, self._steps, self._runs = models, steps, runs
        self._outputs: list[Any] = []

    @contextmanager
    def recorded(self) -> Iterator[None]:
        """Inside, what the models give is kept, unless it is too much or not theirs alone."""
        size = 0

        def record(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            nonlocal size
            output = forward(*args, **kwargs)
            size += sum(each.nbytes for each in tree_leaves(output) if isinstance(each, torch.Tensor))
            if size <= KEPT:
                self._outputs.append(tree_map(_copied, output))
            return output

        if any(map(_does_more, self._models)):
            yield
            return
        with self._replaced(record):
            yield
        if size > KEPT:
            self._outputs.clear()

    def __len__(self) -> int:
        """Forwards that are known."""
        return len(self._outputs)

    @property
    def known(self) -> bool:
        """Whether there is something to play: every step was recorded, with as many forwards as any other."""
        return bool(self._outputs) and not len(self._outputs) % (self._runs * self._steps)

    @contextmanager
    def until(self, step: int) -> Iterator[None]:
        """Inside, forwards of the steps before this one are played, where they are known."""
        if not self.known or not step:
            yield
            return
        calls = len(self._outputs) // (self._runs * self._steps)
        numbers = itertools.count()

        def play(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            number = next(numbers)
            if number % (calls * self._steps) < calls * step:
                return tree_map(_copied, self._outputs[number])
            return forward(*args, **kwargs)

        with warnings.catch_warnings(), self._replaced(play):
            # Forwards that are played reach no attention.
            warnings.filterwarnings("ignore", message="no attention module of")
            yield

    @contextmanager
    def _replaced(self, forward: Callable[..., Any]) -> Iterator[None]:
        own = [vars(model).get("forward") for model in self._models]
        for model in self._models:
            model.forward = functools.partial(forward, model.forward)
        try:
            yield
        finally:
            for model, before in zip(self._models, own, strict=True):
                if before is None:
                    del model.forward
                else:
                    model.forward = before


def _copied(value: Any) -> Any:
    """Pipelines may change in place what they are given."""
    return value.clone() if isinstance(value, torch.Tensor) else value


def _does_more(model: torch.nn.Module) -> bool:
    """Whether a forward changes more than what it returns, such as a cache, or is compiled."""
    # A compiled model is what it wraps in another module, which reads its forward once.
    if hasattr(model, "_orig_mod"):
        return True
    registries = [getattr(module, "_diffusers_hook", None) for module in model.modules()]
    hooked = any(each is not None and set(each.hooks) - {STEPS} for each in registries)
    return hooked or model._compiled_call_impl is not None
