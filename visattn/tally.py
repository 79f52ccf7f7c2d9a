"""What happens at attention modules, in plain numbers: calls by outcome, and the time of some of them.

On a GPU a timed call records two events, which cost the host more than a whole dense call may, so most calls are only
counted: one in 17 of a kind is timed, at every module another one, so that a step of a model has some of them and
none has many; of modules with many calls one in 137. On a CPU all are. A first call of a kind, which plans and
compiles, is kept apart. Inside `all_timed` all calls are timed, and first ones count like others.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Hashable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from types import TracebackType
from typing import Any, NamedTuple, TypeVar

import torch

from visattn.counts import Cell, Kind, Row, Shared, joined
from visattn.patterns import (
    DynamicPattern,
    Gate,
    HeadsPattern,
    HybridPattern,
    OrderedPattern,
    Pattern,
    SharingPattern,
    Wrapped,
)
from visattn.patterns.choice.listening import listening
from visattn.problem import Problem

# On a GPU one in so many steady calls of a kind is timed, at every module another one. Prime numbers: what calls
# choose or compute anew every few steps is timed as often as it happens.
EVERY = 17
# From so many calls of a module on, one in so many.
MANY_CALLS, SELDOM = 4 * EVERY, 137
# Pairs of CUDA events kept before the finished ones are summed up.
MANY_EVENTS = 1024
_NOTHING = nullcontext()
T = TypeVar("T")
_all: ContextVar[bool] = ContextVar("all_timed", default=False)


@contextmanager
def all_timed() -> Iterator[None]:
    """What is applied inside times every call, also on a GPU, and takes first calls for steady ones.

    For measurements of a model that has run before: nothing is planned or compiled, and calls that choose lists for
    later steps are neither missed nor counted as often as those that take them.
    """
    token = _all.set(True)
    try:
        yield
    finally:
        _all.reset(token)


def tells(pattern: Pattern) -> bool:
    """Whether what a pattern lists is known only when it has chosen, and told then."""
    if isinstance(pattern, Wrapped):
        return tells(pattern.of)
    telling = DynamicPattern | HeadsPattern | OrderedPattern | Gate | HybridPattern | SharingPattern
    return isinstance(pattern, telling)


class Chosen(NamedTuple):
    """Whose choice events are around."""

    cells: Sequence[Cell]


class Tally:
    """Counts of every attention module of one model; safe to use from several threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._every, self._seldom = (1, 1) if _all.get() else (EVERY, SELDOM)
        self._cells: dict[str, dict[Hashable, Cell]] = {}
        # Modules at which calls of a kind happened.
        self._kinds: dict[Hashable, int] = {}
        # Time besides calls, by module and kind.
        self._besides: dict[str, dict[str, float]] = {}
        # Cells, or a module and a kind; whether it is a first call; what was recorded before and after.
        self._events: list[tuple[Any, bool, torch.cuda.Event, torch.cuda.Event]] = []

    def cell(
        self,
        site: str,
        kind: Kind,
        key: Hashable,
        device: torch.device,
        problem: Problem | None = None,
        reason: str = "",
        kept: bool = False,
    ) -> Cell:
        """The cell of calls of a module that have `key` in common."""
        own = (kind, key, problem, reason, kept)
        with self._lock:
            cells = self._cells.setdefault(site, {})
            found = cells.get(own)
            if found is None:
                turn = self._kinds.get(own, 0)
                cells[own] = found = Cell(*own, turn, device.type == "cuda")
                self._kinds[own] = turn + 1
        return found

    def begin(self, cell: Cell) -> Any:
        """A call begins: when, or None if it is not timed."""
        if not cell.on_gpu:
            return time.perf_counter()
        # The first call of all, then the next one of the first module, the one after that of the second.
        late, every = cell.calls - 1 - cell.turn, self._every if cell.calls < MANY_CALLS else self._seldom
        if (late % every and (cell.calls or cell.turn)) or torch.cuda.is_current_stream_capturing():
            return None
        return _event()

    def pass_on(self, cell: Cell) -> bool:
        """Count a call that nothing else is to be known of; False if it is to be timed."""
        late, every = cell.calls - 1 - cell.turn, self._every if cell.calls < MANY_CALLS else self._seldom
        if not (cell.on_gpu and cell.calls and late % every):
            return False
        with self._lock:
            cell.calls += 1
        return True

    def end(self, cells: Sequence[Cell], begun: Any) -> None:
        """A call is over that began at `begun`; several cells share it where its samples differ."""
        if begun is None:
            with self._lock:
                for cell in cells:
                    cell.calls += 1
            return
        stopped: Any = _event() if cells[0].on_gpu else time.perf_counter()
        with self._lock:
            is_first = self._every > 1 and not (cells[0].turn or cells[0].calls)
            for cell in cells:
                cell.calls += 1
            if isinstance(stopped, torch.cuda.Event):
                self._keep(cells, is_first, begun, stopped)
            else:
                for cell in cells:
                    cell.add((stopped - begun) / len(cells), is_first)

    def hearing(self, cells: Sequence[Cell], begun: Any) -> AbstractContextManager[None]:
        """Inside, what the choices of a call list is noted with its cells, whose layouts run one after the other.

        Args:
            cells: Of the call.
            begun: What `begin` gave: choices of timed calls are timed too.
        """
        problem = cells[0].problem
        return self._hearing(cells, begun) if problem is not None and tells(problem.pattern) else _NOTHING

    @contextmanager
    def _hearing(self, cells: Sequence[Cell], begun: Any) -> Iterator[None]:
        shares: list[torch.Tensor] = []
        skips: list[torch.Tensor] = []
        spans: list[tuple[Any, Any]] = []

        @contextmanager
        def clock() -> Iterator[None]:
            start = _now(begun)
            yield
            spans.append((start, _now(begun)))

        sharing: list[tuple[bool, int]] = []
        heard = shares.append, skips.append, None if begun is None else clock
        with listening(*heard, lambda refreshed, nbytes: sharing.append((refreshed, nbytes))):
            yield
        # An engine may choose once for each of its tilings.
        with self._lock:
            is_first = self._every > 1 and not (cells[0].turn or cells[0].calls)
            for i, cell in enumerate(cells):
                cell.reached = _noted(cell.reached, shares, i, len(cells))
                cell.skipped = _noted(cell.skipped, skips, i, len(cells))
                for refreshed, nbytes in _of_cell(sharing, i, len(cells)):
                    cell.shared = (Shared() if cell.shared is None else cell.shared).add(refreshed, nbytes)
            for start, end in spans:
                if isinstance(start, torch.cuda.Event):
                    self._keep(Chosen(cells), is_first, start, end)
                else:
                    _add_choosing(cells, end - start, is_first)

    def count(self, site: str, reason: str = "") -> None:
        """Count a call that was dense, or fell back for a reason, and that nobody timed."""
        self.end((self.cell(site, "dense", None, torch.device("cpu"), reason=reason),), None)

    def timed(self, site: str, kind: Kind, device: torch.device) -> Clock:
        """A context that adds the time of its body, which is no call."""
        return Clock(self, site, kind, device)

    def beside(self, site: str, kind: Kind, begun: Any) -> None:
        """Add the time since `begun`, which is no call."""
        stopped = None if begun is None else _now(begun)
        with self._lock:
            if isinstance(stopped, torch.cuda.Event):
                self._keep((site, kind), False, begun, stopped)
            elif stopped is not None:
                self._beside(site, kind, stopped - begun)

    def rows(self) -> dict[str, Row]:
        """The counts so far, by module; waits for the GPU."""
        with self._lock:
            self._settle(wait=True)
            alike: dict[Hashable, list[Cell]] = {}
            for cells in self._cells.values():
                for own, cell in cells.items():
                    alike.setdefault(own, []).append(cell)
            rows: dict[str, Row] = {}
            for site, cells in self._cells.items():
                row = rows.setdefault(site, Row())
                for own, cell in cells.items():
                    # What was to run and was outdone counts elsewhere.
                    if cell.calls:
                        row.add(cell, _mean(alike[own]), _mean(alike[own], choosing=True))
            for site, seconds in self._besides.items():
                row = rows.setdefault(site, Row())
                for kind, value in seconds.items():
                    row.seconds[kind] += value
        return {site: row for site, row in rows.items() if row.calls or any(row.seconds.values())}

    def counts(self) -> dict[str, int]:
        """Calls so far, by module; waits for nothing."""
        with self._lock:
            return {site: sum(cell.calls for cell in cells.values()) for site, cells in self._cells.items()}

    def _keep(self, of: Any, is_first: bool, start: Any, end: Any) -> None:
        """Remember the events around a call; their time is read later, without waiting."""
        self._events.append((of, is_first, start, end))
        if len(self._events) >= MANY_EVENTS:
            self._settle(wait=False)

    def _settle(self, wait: bool) -> None:
        """Add the time between finished events."""
        left = []
        for of, is_first, start, end in self._events:
            if wait:
                end.synchronize()
            if not end.query():
                left.append((of, is_first, start, end))
                continue
            seconds = start.elapsed_time(end) / 1000
            if isinstance(of, Chosen):
                _add_choosing(of.cells, seconds, is_first)
                continue
            if isinstance(of[0], str):
                self._beside(of[0], of[1], seconds)
                continue
            for cell in of:
                cell.add(seconds / len(of), is_first)
        self._events = left

    def _beside(self, site: str, kind: Kind, seconds: float) -> None:
        times = self._besides.setdefault(site, {"sparse": 0.0, "dense": 0.0})
        times[kind] += seconds


class Clock:
    """Times the body of a `with` statement for a `Tally`."""

    __slots__ = ("device", "kind", "site", "start", "tally")

    def __init__(self, tally: Tally, site: str, kind: Kind, device: torch.device) -> None:
        self.tally, self.site, self.device = tally, site, device
        self.kind: Kind = kind
        self.start: Any = None

    def __enter__(self) -> None:
        if self.device.type != "cuda":
            self.start = time.perf_counter()
        elif not torch.cuda.is_current_stream_capturing():
            self.start = _event()

    def __exit__(
        self, raised: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if raised is None:
            self.tally.beside(self.site, self.kind, self.start)


def _of_cell(heard: list[T], i: int, cells: int) -> list[T]:
    """What came from the i-th of so many cells, which ran one after the other."""
    each = len(heard) // cells
    return heard[i * each : (i + 1) * each]


def _noted(known: torch.Tensor | None, shares: list[torch.Tensor], i: int, cells: int) -> torch.Tensor | None:
    """What is known with the shares that came from the i-th of so many cells."""
    for share in _of_cell(shares, i, cells):
        # Filled in on the device: a number that is copied there would wait for all that runs on it.
        new = torch.stack([share.sum(), share.new_full((), share.numel()), share.min(), share.max()])
        known = joined(known, new)
    return known


def _event() -> torch.cuda.Event:
    """An event that is recorded where the work stands."""
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def _now(begun: Any) -> Any:
    """An event or the time, as what began was."""
    return _event() if isinstance(begun, torch.cuda.Event) else time.perf_counter()


def _add_choosing(cells: Sequence[Cell], seconds: float, is_first: bool) -> None:
    """Add time in which a call chose what it lists."""
    for cell in cells:
        cell.choosing[is_first] += seconds / len(cells)


def _mean(cells: Sequence[Cell], choosing: bool = False) -> float | None:
    """Time of a steady call, or of its choosing; None if none was timed."""
    timed = sum(cell.timed for cell in cells)
    return sum(cell.choosing[False] if choosing else cell.seconds for cell in cells) / timed if timed else None
