"""Recording the attention of a pipeline while it runs dense."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from visattn.handle import apply
from visattn.recorded import LIMIT, Recorder
from visattn.watch import Watched

# All tokens for all, so that the model's own attention runs; it asks for the step, and calls know their grids.
EVERYTHING = "topk(keep=1.0, every=2)"


class _Enough(Exception):
    """All steps that were asked for are over."""


def record(
    pipe: Any,
    arguments: Mapping[str, Any],
    *,
    modules: Sequence[str] = ("*",),
    steps: Sequence[int] = (0,),
    samples: int = 1,
    limit: int = LIMIT,
) -> Recorder:
    """Run a pipeline with its own attention and keep queries, keys and values; it stops behind the last step asked for.

    Args:
        pipe: A diffusers pipeline.
        arguments: Of its call.
        modules: Names of modules, with * for anything.
        steps: Denoising steps from 0.
        samples: How many of a batch.
        limit: Bytes of all tensors together.

    Returns:
        What was kept, see `Recorder`.

    Raises:
        ValueError: If a step is negative or never ran, or no module has such a name.
    """
    if not steps or min(steps) < 0:
        raise ValueError(f"steps {list(steps)} must be some numbers from 0")
    recorder, ran = Recorder(modules, steps, samples, limit), set()

    def watch(watched: Watched) -> None:
        if watched.step is not None and watched.step > max(steps):
            raise _Enough
        ran.add(watched.step)
        recorder(watched)

    with torch.no_grad(), apply(pipe, EVERYTHING) as handle:
        handle.watch(watch)
        with contextlib.suppress(_Enough):
            pipe(**arguments)
        sites = [site.site for site in handle.report().modules]
    missing = sorted(set(steps) - ran)
    if missing:
        raise ValueError(f"steps {missing} did not run: those that did were {sorted(s for s in ran if s is not None)}")
    if not recorder.calls and not recorder.left_out:
        shown = ", ".join(sites[:4])
        raise ValueError(f"no attention module is called {', '.join(modules)}; there are {len(sites)}, like {shown}")
    return recorder
