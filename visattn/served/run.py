"""The state of one served model: its layers join as they are built, and its forwards are told by their calls."""

from __future__ import annotations

import threading
import warnings
import weakref
from collections.abc import Callable
from typing import Any

import torch

from visattn.patterns import Dense
from visattn.report import Report
from visattn.request import Request
from visattn.runtime.call import AttentionCall
from visattn.runtime.forward import Where
from visattn.runtime.run import Run, Step
from visattn.runtime.runner import Runner
from visattn.schedule import Given
from visattn.selectors import SiteName

# The runs whose layers live in this process.
_RUNS: weakref.WeakSet[ServedRun] = weakref.WeakSet()


class At(threading.local):
    """Which calls of a forward a thread has made.

    Attributes:
        state: What tells the forward from the one before, None before the first.
        done: Layers that it has called.
    """

    state: Any = None
    done: frozenset[str] = frozenset()


class ServedRun(Run):
    """The state of one model of a server.

    Attributes:
        request: What is to run.
        owner: Weak reference to what the layers of the model have in common while they are built.
        sites: What each layer was given; known once the first one is called.
    """

    def __init__(self, name: str, request: Request, told: Callable[[], Step], owner: Any = None) -> None:
        super().__init__(name, request.schedule, request.strict, (told,), always=request.always)
        self.request, self.at, self.told = request, At(), told
        self.owner = None if owner is None else weakref.ref(owner)
        self.sites: dict[str, Given | None] = {}
        self._names: list[SiteName] = []
        self._runners: dict[Given, Runner] = {}
        self._reasons: set[str] = set()
        _RUNS.add(self)

    def takes(self, name: str, owner: Any, path: str) -> bool:
        """Whether a layer that is being built belongs to this model: another one may have layers of the same names."""
        same = self.name == name and (None if self.owner is None else self.owner()) is owner
        return same and not self.sites and all(site.path != path for site in self._names)

    def join(self, path: str) -> Layer:
        """A layer of this model is built; an empty path stands for one without a name."""
        path = path or f"attention.{len(self._names)}"
        self._names.append(SiteName(path, _block(path)))
        return Layer(self, path)

    def attend(self, path: str, call: AttentionCall, where: Where) -> torch.Tensor:
        """Attention [B, S, H, D] of a layer.

        Args:
            path: Of the layer.
            call: The call; `call.own()` is the server's own attention [B, S, H, D].
            where: Where the tokens of this forward sit.

        Raises:
            ValueError: If the run is strict and the layer cannot run its pattern.
        """
        self._assign()
        given = self.sites[path]
        if given is None:
            return call.own()
        self._begin(path, where)
        self.enter(path)
        runner, key = self._runner(given), None
        if call.mask is None and call.layouts is None and not call.causal:
            found = runner.attend_alike(*call.tensors, call.scale, False, "eager", call.own)
            if found is not None:
                return found[0]
            key = runner.key(*call.tensors, call.scale, False, "eager")
        out = runner.attend(call.autocast(), path, key=key)[0]
        self._explain(path)
        return out

    def _assign(self) -> None:
        """All layers are built once one is called: what is each given?"""
        if self.sites:
            return
        found = self.schedule.assign(self._names, self.schedule.model or self.name)
        self.sites = {site.path: given for site, given in zip(self._names, found, strict=True)}
        self.sparse_sites = [path for path, given in self.sites.items() if not isinstance(given, Dense | None)]

    def _begin(self, path: str, where: Where) -> None:
        """A layer that is called again, or at another place or step, is one of the next forward."""
        at, state = self.at, (where, self.told())
        if self.here.forward is None or at.state != state or path in at.done:
            at.state, at.done = state, frozenset()
            self.start(where, learns=False, gradients=False)
        at.done |= {path}

    def _explain(self, path: str) -> None:
        """Say once why a layer ran dense attention instead of its pattern."""
        forward = self.here.forward
        assert forward is not None
        why = "" if path in forward.excused else forward.reasons.get(path, "")
        if why and self.strict:
            raise ValueError(f"strict: {path} of {self.name} did not run its pattern: {why}")
        if why and why not in self._reasons:
            self._reasons.add(why)
            warnings.warn(f"{path} of {self.name} ran dense attention instead of its pattern: {why}", stacklevel=4)

    def _runner(self, given: Given) -> Runner:
        if given not in self._runners:
            self._runners[given] = Runner(self, given, self.request.backend, _run_stock)
        return self._runners[given]

    def report(self) -> Report:
        """What happened so far."""
        given = {path: pattern for path, pattern in self.sites.items() if pattern is not None}
        sites = self.reports(given, self.request.backend)
        return Report(tuple(sites), self.schedule.dense_steps, self.schedule.dense_last_steps)


class Layer:
    """One layer of a served model.

    Attributes:
        run: Of its model.
        path: Its name there.
    """

    def __init__(self, run: ServedRun, path: str) -> None:
        self.run, self.path = run, path

    def attend(self, call: AttentionCall, where: Where) -> torch.Tensor:
        """See `ServedRun.attend`."""
        return self.run.attend(self.path, call, where)


class Builder:
    """Gives layers that are built one after the other to the run of their model."""

    def __init__(self) -> None:
        self._last: weakref.ref[ServedRun] | None = None

    def layer(self, name: str, owner: Any, path: str, made: Callable[[], ServedRun]) -> Layer:
        """The layer of a path.

        Args:
            name: Of its model.
            owner: What the layers of a model have in common, or None.
            path: Of the layer in it.
            made: Makes a run where this is the first layer of its model.
        """
        run = None if self._last is None else self._last()
        if run is None or not run.takes(name, owner, path):
            run = made()
            self._last = weakref.ref(run)
        return run.join(path)


def reports() -> dict[str, Report]:
    """The report of each model whose layers live in this process, by its name; of equal names with a number."""
    found: dict[str, Report] = {}
    for run in sorted(_RUNS, key=lambda run: run.name):
        count = sum(name.split(" ")[0] == run.name for name in found)
        found[f"{run.name} {count + 1}" if count else run.name] = run.report()
    return found


def _block(path: str) -> str:
    """The path up to its last number: the block around a layer."""
    parts = path.split(".")
    last = max((i for i, part in enumerate(parts) if part.isdigit()), default=len(parts) - 2)
    return ".".join(parts[: last + 1]) or path


def _run_stock(call: AttentionCall) -> torch.Tensor:
    return call.own()
