"""Measures a subject for a search, or looks up what its journal knows."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from visattn.tuning.journal import Journal
from visattn.tuning.plan import Plan
from visattn.tuning.subject import DENSE, Assignment, Local, Outcome, Subject, everywhere


class OutOfTime(Exception):
    """The minutes that were given are over."""


class Measurer:
    """Measures a subject, or looks it up.

    Attributes:
        subject: What is measured.
        plan: How much.
        journal: What is known.
        deadline: `time.monotonic()` after which nothing new is begun.
        tell: Called with what is done, and how many of how many.
        groups: Neighbouring layers that are injected together.
        calls: Steps of each stage.
    """

    def __init__(
        self,
        subject: Subject,
        plan: Plan,
        journal: Journal,
        deadline: float = math.inf,
        tell: Callable[[str, int, int], None] = lambda what, done, of: None,
    ) -> None:
        self.subject, self.plan, self.journal, self.deadline, self.tell = subject, plan, journal, deadline, tell
        count = min(plan.groups, subject.layers)
        edges = [round(i * subject.layers / count) for i in range(count + 1)]
        self.groups = [range(a, b) for a, b in itertools.pairwise(edges)]
        steps = [round(edge * subject.steps) for edge in plan.edges]
        self.calls = [end - first for first, end in itertools.pairwise(steps)]

    @contextmanager
    def unhurried(self) -> Iterator[None]:
        """Inside, measurements begin whatever the clock says."""
        deadline, self.deadline = self.deadline, math.inf
        try:
            yield
        finally:
            self.deadline = deadline

    def outcome(self, assignment: Assignment, seeds: Sequence[int]) -> Outcome:
        """Quality and time of a schedule."""
        edges = self.plan.edges
        key = ["outcome", assignment, list(seeds)]
        return Outcome.of(self._get(key, lambda: self.subject.outcome(edges, assignment, seeds).to_dict()))

    def known(self) -> list[Assignment]:
        """The schedules whose outcome on the plan's samples is known, of whichever search."""
        found = [key[1] for key in self.journal.measured() if key[0] == "outcome" and key[2] == list(self.plan.samples)]
        return [tuple(tuple(row) for row in assignment) for assignment in found]

    def quality(self, assignment: Assignment) -> Outcome:
        """Quality alone, of the quick samples: those of an outcome that is known, or without times."""
        edges, seeds = self.plan.edges, self.plan.quick_samples
        key, whole = ["quality", assignment, list(seeds)], ["outcome", assignment, list(self.plan.samples)]
        if not self.journal.knows(key) and self.journal.knows(whole):
            return Outcome(self.outcome(assignment, self.plan.samples).psnr[: len(seeds)])
        return Outcome.of(self._get(key, lambda: self.subject.outcome(edges, assignment, seeds, False).to_dict()))

    def local(self, stage: int, names: Sequence[str], timed: Sequence[str]) -> list[dict[str, Local]]:
        """What candidates do in the middle step of a stage, by layer.

        Args:
            stage: The stage.
            names: The candidates.
            timed: Those whose time is measured.
        """
        step = int((self.plan.edges[stage] + self.plan.edges[stage + 1]) / 2 * self.subject.steps)
        seeds = self.plan.quick_samples
        # Another budget has other candidates.
        key = ["local", step, list(seeds), list(names)]
        rows = self._get(key, lambda: self.subject.local(step, names, seeds, timed))
        return [{name: Local(*value) for name, value in row.items()} for row in rows]

    def sample_seconds(self) -> float:
        """Seconds of a dense sample, the first time that it runs: what is known of it would be played.

        In the journal, so that a search that goes on has the same figure.

        Raises:
            OutOfTime: If the minutes are over.
        """
        quick, dense = self.plan.quick_samples, everywhere(DENSE, self.subject.layers, self.plan.stages)

        def run() -> float:
            start = time.perf_counter()
            self.subject.outcome(self.plan.edges, dense, quick, False)
            return (time.perf_counter() - start) / len(quick)

        return self._get(["sample", len(quick)], run)

    def _get(self, key: Any, measure: Callable[[], Any]) -> Any:
        if not self.journal.knows(key) and time.monotonic() > self.deadline:
            raise OutOfTime
        return self.journal.get(key, measure)
