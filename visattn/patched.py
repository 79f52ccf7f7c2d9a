"""The handle of a patched model: what happened at its modules, and how the patch is undone."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any

from visattn.caught import Caught
from visattn.given import SHOWN, said
from visattn.parameters import PatternParameters
from visattn.reached import Reached
from visattn.report import Report
from visattn.request import Patch, Request
from visattn.steps import check_step
from visattn.watch import Watched, Watcher


class Handle:
    """A patched model or pipeline: says what happened, and undoes the patch.

    Also a context manager that undoes the patch at its end.

    Attributes:
        parameters: Learnable parameters of the patterns, `parameters[site][name]`, a module of its own: train
            `handle.parameters.parameters()`. They are no part of the model and stay when the patch is undone.
    """

    def __init__(self, patches: Sequence[Patch], request: Request) -> None:
        self._patches = tuple(patches)
        self._request = request
        self._undo: Callable[[], None] | None = None
        self._removed = False
        self.parameters = PatternParameters([each for patch in patches for each in patch.learnables()])
        self._caught = [Caught(request.caught) for _ in self._patches] if request.caught else []
        if self._caught:
            self.watch(None)

    def __repr__(self) -> str:
        patterns = ", ".join(dict.fromkeys(str(pattern) for _, pattern in self._request.schedule.rules))
        shown = patterns if len(patterns) <= SHOWN else f"{patterns[: SHOWN - 3]}..."
        state = "removed" if self._removed else "applied; remove() undoes it"
        return f"<visattn.Handle: {shown}, {state}; report() tells what ran>"

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Copies and pickles of a patched model are stock, and a copy of its handle would be of nothing.

        Raises:
            ValueError: Always.
        """
        raise ValueError(
            "a handle belongs to the model that it patched and cannot be copied or pickled: copies of that model are "
            "stock, so keep the handle apart from what is copied, and apply() to the copy"
        )

    @property
    def patches(self) -> tuple[Patch, ...]:
        """What was patched, one for each model."""
        return self._patches

    def save(self, path: str | Path) -> None:
        """Write the learnable parameters to a safetensors file, for `apply(..., weights=path)`.

        An older file is replaced, but only by a whole one.

        Raises:
            ValueError: If no pattern has any, or the file cannot be written.
        """
        self.parameters.save(path)

    def report(self) -> Report:
        """What happened at each patched attention module so far. Waits for the GPU."""
        sites = []
        for i, patch in enumerate(self._patches):
            for site in patch.report():
                found = self._caught[i].of(site.site) if self._caught else None
                sites.append(site if found is None else replace(site, caught=Reached(*found)))
        schedule = self._request.schedule
        label = "; ".join(dict.fromkeys(label for site in sites for label in site.labels)) or schedule.label
        return Report(tuple(sites), schedule.dense_steps, schedule.dense_last_steps, label)

    def watch(self, watcher: Watcher | None) -> None:
        """Call `watcher(watched)` after every attention call of a patched module; None stops that.

        It sees calls that ran a pattern and, in diffusers models, calls of modules that are dense by pattern or
        schedule; neither fallbacks nor compiled code. A pattern that lists everything, like topk(keep=1.0), shows a
        model's own dense attention. `watched.rows(tokens)` gives the attention map that a loss
        compares with a teacher's.
        """
        if watcher is not None and not callable(watcher):
            raise ValueError(f"watcher={said(watcher)} must be a function of what it sees, or None")
        for i, patch in enumerate(self._patches):
            if not self._caught:
                patch.watch(watcher)
                continue
            caught = self._caught[i]
            patch.watch(caught if watcher is None else functools.partial(_watch_both, caught, watcher))

    def remove(self) -> None:
        """Put the original attention back, by identity, and a student's weights away; a second call does nothing."""
        # Somebody may have patched the model anew since.
        for patch in () if self._removed else self._patches:
            patch.remove()
        self._removed = True
        if self._undo is not None:
            self._undo()
            self._undo = None

    def set_step(self, step: int | None, total: int | None = None) -> None:
        """Say which denoising step comes next, on a model without its pipeline: for `dense_steps`, `every` ...

        Args:
            step: Index of the step, from 0. None returns to what the pipeline says.
            total: Number of steps, needed when `dense_steps` is a fraction, and for `dense_last_steps`.

        Raises:
            ValueError: If the step is negative or not below the total.
        """
        check_step(step, total)
        for patch in self._patches:
            patch.set_step(step, total)

    def __enter__(self) -> Handle:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.remove()


def _watch_both(first: Watcher, second: Watcher, watched: Watched) -> None:
    first(watched)
    second(watched)
