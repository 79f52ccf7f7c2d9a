"""The first steps of a comparison, in which both runs are dense: the run that goes first draws them for both."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch

from visattn.pipelines.patch.targets import DENOISERS
from visattn.pipelines.played import Played
from visattn.report import Report


class Parted(NamedTuple):
    """Where two runs part.

    Attributes:
        seconds: Time since the call of the pipeline.
        report: What was counted until then.
        forwards: How many forwards of the models are known.
    """

    seconds: float
    report: Report
    forwards: int


class Alike:
    """The steps in which a sparse run and its dense twin do the same, from the same noise.

    The second run is given what the denoising models gave in the first, and takes over what the first one counted: its
    time until then, and its calls of attention. Where the pipeline does not show its steps, or its models do more than
    give outputs (a cache between steps, compiled code), both runs draw everything.
    """

    def __init__(self, pipe: Any, steps: int, alike: int) -> None:
        """Nothing is drawn yet.

        Args:
            pipe: The pipeline.
            steps: Denoising steps of a run.
            alike: How many of them, from the first one on, are dense in both runs.
        """
        models = [part for name in DENOISERS if isinstance(part := getattr(pipe, name, None), torch.nn.Module)]
        self._played, self._total, self._steps = Played(models, steps, 1), steps, alike
        self._begun, self._report = 0.0, _nothing
        # Time, report and forwards when the first run, and the current one, had drawn these steps.
        self._first: Parted | None = None
        self._now: Parted | None = None

    @contextmanager
    def run(self) -> Iterator[None]:
        """Inside, the pipeline is patched and runs once: what the first run gives is recorded, and given to the second.

        It is around the patch, whose hooks count the steps that are played too.
        """
        self._now = None
        if not self._steps:
            yield
        elif self._first is None:
            with self._played.recorded():
                yield
            self._first = self._now
        else:
            with self._played.until(self.shared):
                yield

    def begin(self, report: Callable[[], Report]) -> None:
        """Says that the pipeline is called now, and what tells its counts."""
        self._begun, self._report = time.perf_counter(), report

    @property
    def last(self) -> int:
        """The last step (from 0) that both have, -1 if there is none."""
        return self._steps - 1

    def part(self) -> None:
        """Says that this step of the run is over, and the device through with it."""
        self._now = Parted(time.perf_counter() - self._begun, self._report(), len(self._played))

    @property
    def shared(self) -> int:
        """Steps that the second run is given: all that are alike, or none."""
        first, played = self._first, self._played
        # Schedulers that evaluate twice a step may tell each evaluation as a step.
        all_of_them = first is not None and first.forwards * self._total == self._steps * len(played)
        return self._steps if all_of_them and played.known else 0

    def whole(self, seconds: float, report: Report) -> tuple[float, Report, int]:
        """Time and report of a run as if it had drawn all of its steps itself, and how many it was given.

        Args:
            seconds: What it took.
            report: What it counted.
        """
        first, now = self._first, self._now
        if first is None or first is now or not self.shared:
            return seconds, report, 0
        assert now is not None, "a pipeline tells its steps in each run or in none"
        return first.seconds + seconds - now.seconds, _with_dense(report, first.report), self.shared


def _nothing() -> Report:
    return Report(())


def _with_dense(report: Report, first: Report) -> Report:
    """A report with the calls of steps that another run had, which were dense."""
    known = {(site.model, site.site): site for site in first.sites}
    sites = []
    for site in report.sites:
        other = known[site.model, site.site]
        sites.append(
            dataclasses.replace(
                site,
                dense=site.dense + other.called,
                dense_seconds=site.dense_seconds + other.sparse_seconds + other.dense_seconds,
                first_seconds=site.first_seconds + other.first_seconds,
                timed=site.timed + other.timed,
                called=site.called + other.called,
            )
        )
    return dataclasses.replace(report, sites=tuple(sites))
