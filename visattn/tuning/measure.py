"""What a search measures of a subject, each kept in its journal: candidates in layers, injections, whole schedules."""

from __future__ import annotations

import bisect
import itertools
import math
import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from visattn.tuning.candidates import is_steady, kind_of
from visattn.tuning.journal import Journal
from visattn.tuning.sensitivity import Response, floor_of, rank_correlation
from visattn.tuning.solve import Choice, hull
from visattn.tuning.subject import DENSE, Assignment, Local, Outcome, Subject

# How many times the error on a layer's hull a candidate may have that is measured in all stages.
NEAR = 1.5
# Errors of layers that are injected, as shares of the square of their outputs: in proportion to what they do to the
# output, and mostly above its rounding.
PROBED = (0.03, 0.003)


class OutOfTime(Exception):
    """The minutes that were given are over."""


@dataclass(frozen=True)
class Plan:
    """How much is measured.

    Attributes:
        candidates: Texts of patterns, dense first.
        stages: Equal parts of the run that have a pattern of their own each.
        groups: Groups of neighbouring layers at most that are injected together.
        probes: Candidates that are injected in each group and stage.
        checks: Further injections, to see how well the others predict them.
        seeds: Samples of a schedule's quality.
        quick: Those of them for injections.
        seed: Of the first sample.
    """

    candidates: tuple[str, ...]
    stages: int = 4
    groups: int = 12
    probes: int = 2
    checks: int = 12
    seeds: int = 8
    quick: int = 4
    seed: int = 0

    @property
    def edges(self) -> tuple[float, ...]:
        """Where stages begin and end."""
        return tuple(i / self.stages for i in range(self.stages + 1))

    @property
    def samples(self) -> tuple[int, ...]:
        """Seeds of a schedule's quality."""
        return tuple(range(self.seed, self.seed + self.seeds))


class Measurer:
    """Measures a subject, or looks it up.

    Attributes:
        subject: What is measured.
        plan: How much.
        journal: What is known.
        deadline: `time.monotonic()` after which nothing new is begun.
        tell: Called with what is done, and how many of how many.
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

    def outcome(self, assignment: Assignment, seeds: Sequence[int]) -> Outcome:
        """Quality and time of a schedule."""
        edges = self.plan.edges
        key = ["outcome", assignment, list(seeds)]
        return Outcome.of(self._get(key, lambda: self.subject.outcome(edges, assignment, seeds).to_dict()))

    def quality(self, assignment: Assignment) -> Outcome:
        """Quality alone, of the quick samples."""
        edges, seeds = self.plan.edges, self.plan.samples[: self.plan.quick]
        key = ["quality", assignment, list(seeds)]
        return Outcome.of(self._get(key, lambda: self.subject.outcome(edges, assignment, seeds, False).to_dict()))

    def middle(self) -> list[dict[str, Local]]:
        """What all candidates do in the middle stage, by layer."""
        return self._stage(self.plan.stages // 2, self.plan.candidates, self.plan.candidates)

    def local(self) -> list[list[dict[str, Local]]]:
        """What candidates do, by layer and stage: in the middle step of each stage.

        Those that no layer would choose in the middle stage are not measured in the others, and left out.
        """
        plan, middle = self.plan, self.plan.stages // 2
        self.tell("candidates in each layer", 0, plan.stages)
        found = {middle: self.middle()}
        names = promising(found[middle], plan.candidates)
        # Times that do not depend on values are measured once.
        timed = [name for name in names if not is_steady(name)]
        for stage in range(plan.stages):
            if stage != middle:
                self.tell("candidates in each layer", len(found), plan.stages)
                found[stage] = self._stage(stage, names, timed)
        self.tell("candidates in each layer", plan.stages, plan.stages)
        return _steadied(
            [
                [{n: v for n, v in found[stage][layer].items() if n in names} for stage in range(plan.stages)]
                for layer in range(self.subject.layers)
            ]
        )

    def _stage(self, stage: int, names: Sequence[str], timed: Sequence[str]) -> list[dict[str, Local]]:
        step = int((self.plan.edges[stage] + self.plan.edges[stage + 1]) / 2 * self.subject.steps)
        seeds = self.plan.samples[: self.plan.quick]
        rows = self._get(["local", step, list(seeds)], lambda: self.subject.local(step, names, seeds, timed))
        return [{name: Local(*value) for name, value in row.items()} for row in rows]

    def responses(self, local: list[list[dict[str, Local]]]) -> tuple[list[list[Response]], float | None]:
        """The output's error over each layer's, by layer and stage, and its rank correlation with other injections."""
        plan, units = self.plan, list(itertools.product(range(len(self.groups)), range(self.plan.stages)))
        probes, total = self._probes(local), len(units) * plan.probes
        points: dict[tuple[int, int], list[tuple[float, float]]] = {unit: [] for unit in units}
        for done, (unit, probe) in enumerate(itertools.product(units, probes)):
            self.tell("injections", done, total)
            points[unit].append((self._error(local, unit, probe), self._inject(unit, probe)))
        self.tell("injections", total, total)
        floors = [self._floor(local, stage, points) for stage in range(plan.stages)]
        fits = {unit: Response(some, floors[unit[1]]) for unit, some in points.items()}
        others = [name for name in plan.candidates if name not in {*probes, DENSE}]
        pairs = [(unit, name) for unit in units for name in others if math.isfinite(self._error(local, unit, name))]
        chosen = random.Random(plan.seed).sample(pairs, min(plan.checks, len(pairs)))
        seen = []
        for done, (unit, name) in enumerate(chosen):
            self.tell("checks of what is predicted", done, len(chosen))
            seen.append((floors[unit[1]] + fits[unit](self._error(local, unit, name)), self._inject(unit, name)))
        self.tell("checks of what is predicted", len(chosen), len(chosen))
        ranks = rank_correlation([a for a, _ in seen], [b for _, b in seen])
        by_layer = {layer: g for g, group in enumerate(self.groups) for layer in group}
        stages = range(plan.stages)
        return [[fits[by_layer[layer], stage] for stage in stages] for layer in range(self.subject.layers)], ranks

    def choices(
        self,
        local: list[list[dict[str, Local]]],
        responses: list[list[Response]],
        overheads: Mapping[str, float] = MappingProxyType({}),
        excess: Mapping[str, float] = MappingProxyType({}),
    ) -> list[list[Choice]]:
        """Candidates of each unit (layer by layer, stage by stage) with time and predicted loss.

        Args:
            local: What they do, by layer and stage.
            responses: What an error of a layer does to the output, likewise.
            overheads: Seconds of a call beyond those in `local`, by kind of pattern.
            excess: How many times more error than predicted, likewise.
        """
        found = []
        edges = [round(e * self.subject.steps) for e in self.plan.edges]
        group_of = {layer: group for group in self.groups for layer in group}
        for layer, stage in itertools.product(range(self.subject.layers), range(self.plan.stages)):
            calls, here = edges[stage + 1] - edges[stage], local[layer][stage]
            respond, group = responses[layer][stage], group_of[layer]
            unit = []
            for name, (error, seconds) in here.items():
                # A group's loss is shared by its layers as their errors are.
                whole = sum(local[other][stage].get(name, Local(math.inf, 0.0)).error for other in group)
                loss = 0.0 if name == DENSE or whole <= 0 else respond(whole) * error / whole
                loss *= excess.get(kind_of(name), 1.0)
                if math.isfinite(loss):
                    beyond = 0.0 if name == DENSE else overheads.get(kind_of(name), 0.0)
                    unit.append(Choice(name, (seconds + beyond) * calls, loss))
            found.append(unit)
        return found

    def _floor(
        self,
        local: list[list[dict[str, Local]]],
        stage: int,
        points: Mapping[tuple[int, int], Sequence[tuple[float, float]]],
    ) -> float:
        """Error of the output however small a layer's is in a stage: from the smallest that can be injected."""
        names = [name for name in self.plan.candidates if name != DENSE]
        groups = range(len(self.groups))
        error, group, name = min((self._error(local, (g, stage), n), g, n) for g in groups for n in names)
        some = points[group, stage]
        return floor_of((error, self._inject((group, stage), name)), max(some)) if some else 0.0

    def _probes(self, local: list[list[dict[str, Local]]]) -> list[str]:
        """Candidates along the hull of all layers together, dense not among them: large enough to be no rounding."""
        names = [n for n in self.plan.candidates if all(n in each for layer in local for each in layer)]
        sums = [
            Choice(
                n,
                sum(each[n].seconds for la in local for each in la),
                sum(each[n].error for la in local for each in la),
            )
            for n in names
        ]
        found = [choice.name for choice in hull(sums) if choice.name != DENSE] or [n for n in names if n != DENSE]
        size = {choice.name: choice.loss / (len(local) * self.plan.stages) for choice in sums}
        count = min(self.plan.probes, len(found))
        probes: list[str] = []
        for i in range(count):
            wanted = PROBED[0] * (PROBED[1] / PROBED[0]) ** ((i + 0.5) / count)
            left = [name for name in found if name not in probes]
            probes.append(min(left, key=lambda name: abs(math.log(max(size[name], 1e-12) / wanted))))
        return probes

    def _error(self, local: list[list[dict[str, Local]]], unit: tuple[int, int], name: str) -> float:
        group, stage = unit
        return sum(local[layer][stage].get(name, Local(math.inf, 0.0)).error for layer in self.groups[group])

    def _inject(self, unit: tuple[int, int], name: str) -> float:
        group, stage = unit
        rows = [
            tuple(name if layer in self.groups[group] and s == stage else DENSE for s in range(self.plan.stages))
            for layer in range(self.subject.layers)
        ]
        return self.quality(tuple(rows)).typical

    def _get(self, key: Any, measure: Callable[[], Any]) -> Any:
        if not self.journal.knows(key) and time.monotonic() > self.deadline:
            raise OutOfTime
        return self.journal.get(key, measure)


def promising(layers: Sequence[Mapping[str, Local]], names: Sequence[str]) -> tuple[str, ...]:
    """Candidates that are near what some layer would choose: with `NEAR` times less error, on its convex hull."""
    kept = {DENSE}
    for layer in layers:
        points = hull([Choice(name, seconds, error) for name, (error, seconds) in layer.items()])
        kept |= {name for name, (error, seconds) in layer.items() if error <= NEAR * _error_at(points, seconds)}
    return tuple(name for name in names if name in kept)


def _error_at(points: Sequence[Choice], seconds: float) -> float:
    """Error on a hull at a time, infinite before its first point."""
    i = bisect.bisect_right([point.time for point in points], seconds)
    if i in (0, len(points)):
        return points[-1].loss if i else math.inf
    one, two = points[i - 1], points[i]
    return one.loss + (two.loss - one.loss) * (seconds - one.time) / (two.time - one.time)


def _steadied(local: list[list[dict[str, Local]]]) -> list[list[dict[str, Local]]]:
    """Times of a layer that do not depend on values are the median over its stages, as far as they are measured."""
    found = []
    for layer in local:
        seen: dict[str, list[float]] = {}
        for each in layer:
            for name, (_, seconds) in each.items():
                if seconds and is_steady(name):
                    seen.setdefault(name, []).append(seconds)
        steady = {name: statistics.median(values) for name, values in seen.items()}
        found.append([{n: Local(e, steady.get(n, seconds)) for n, (e, seconds) in each.items()} for each in layer])
    return found
