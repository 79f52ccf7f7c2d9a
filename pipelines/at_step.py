"""The forward of a pipeline's denoiser at one step of a dense run, to be run again and looked at."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch

from visattn.given import mapping
from visattn.handle import apply
from visattn.patterns.values import whole_number
from visattn.pipelines.patch import targets
from visattn.pipelines.record import EVERYTHING
from visattn.request import Request
from visattn.schedule import Schedule
from visattn.watch import Watched


class Step(NamedTuple):
    """One step of a run.

    Attributes:
        model: The denoiser that was called there.
        forward: Calls it again with the same arguments.
        made: What the pipeline made in the end.
    """

    model: torch.nn.Module
    forward: Callable[[], Any]
    made: Any


def at_step(pipe: Any, arguments: Mapping[str, Any], step: int) -> Step:
    """Run a pipeline dense and keep how its denoiser was called at a step: the first call, if there are several.

    Args:
        pipe: A diffusers pipeline that is not patched.
        arguments: Of its call.
        step: Denoising step, from 0.

    Raises:
        ValueError: If the step is negative or never ran.
    """
    step = whole_number(step, "step", 0)
    mapping(arguments, "arguments", "of what the pipeline is called with")
    last: dict[str, Any] = {}
    found: dict[str, Any] = {}
    steps = set()

    def remember(model: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        last.update(model=model, args=args, kwargs=dict(kwargs))

    def watch(watched: Watched) -> None:
        steps.add(watched.step)
        if watched.step == step and not found:
            found.update(last)

    models = [one.model for one in targets.find(pipe, Request(Schedule.of("dense")))]
    hooks = [model.register_forward_pre_hook(remember, with_kwargs=True) for model in models]
    try:
        with torch.no_grad(), apply(pipe, EVERYTHING) as handle:
            handle.watch(watch)
            made = pipe(**arguments)
    finally:
        for hook in hooks:
            hook.remove()
    if not found:
        ran = sorted(s for s in steps if s is not None)
        raise ValueError(
            f"step {step} did not run: those that did were {ran[0]} to {ran[-1]}" if ran else "no step ran"
        )
    model, args, kwargs = found["model"], found["args"], found["kwargs"]
    return Step(model, lambda: model(*args, **kwargs), made)
