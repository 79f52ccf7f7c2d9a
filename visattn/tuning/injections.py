"""Errors that are injected at layers and stages, and what comes of them in the output."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Mapping, Sequence

from visattn.tuning.layers import Locals
from visattn.tuning.measure import Measurer
from visattn.tuning.sensitivity import Response, floor_of, rank_correlation
from visattn.tuning.solve import Choice, hull
from visattn.tuning.subject import DENSE

# Errors of layers that are injected, as shares of the square of their outputs: in proportion to what they do to the
# output, and mostly above its rounding.
PROBED = (0.03, 0.003)
# A group of layers and a stage.
Unit = tuple[int, int]
# Errors of the layers of a unit that were injected, and of the output that came of them.
Points = Mapping[Unit, Sequence[tuple[float, float]]]


class Injections:
    """Injections of a measurer.

    Attributes:
        responses: What an error of a group's layers does to the output, for each unit.
        ranks: Rank correlation of what they predict of further injections, None where it is not defined.
    """

    def __init__(self, measurer: Measurer, local: Locals) -> None:
        """Measure, or look up.

        Args:
            measurer: Measures.
            local: What candidates do, by layer and stage.
        """
        self._measurer, self._local = measurer, local
        units = list(itertools.product(range(len(measurer.groups)), range(measurer.plan.stages)))
        probes = [self._probes(group) for group in measurer.groups]
        points = self._injected(units, probes)
        floors = [self._floor(stage, points) for stage in range(measurer.plan.stages)]
        self.responses = {unit: Response(some, floors[unit[1]]) for unit, some in points.items()}
        self.ranks = self._checked(units, probes, floors)

    def error(self, unit: Unit, name: str) -> float:
        """Error of a candidate in a group's layers, infinite where it is for none of them."""
        layers = self._with(unit, name)
        return sum(self._local[layer][unit[1]][name].error for layer in layers) if layers else math.inf

    def loss(self, unit: Unit, name: str) -> float:
        """Predicted error of the output with a candidate in a group and stage, infinite where it is for none."""
        error = self.error(unit, name)
        return self.responses[unit](error) if math.isfinite(error) else math.inf

    def _injected(self, units: Sequence[Unit], probes: Sequence[Sequence[str]]) -> Points:
        injected = [(unit, probe) for unit in units for probe in probes[unit[0]]]
        points: dict[Unit, list[tuple[float, float]]] = {unit: [] for unit in units}
        for done, (unit, probe) in enumerate(injected):
            self._measurer.tell("injections", done, len(injected))
            points[unit].append((self.error(unit, probe), self._inject(unit, probe)))
        self._measurer.tell("injections", len(injected), len(injected))
        return points

    def _checked(self, units: Sequence[Unit], probes: Sequence[Sequence[str]], floors: Sequence[float]) -> float | None:
        """How well further injections are predicted."""
        plan = self._measurer.plan
        others = [[name for name in plan.candidates if name not in {*some, DENSE}] for some in probes]
        pairs = [(u, name) for u in units for name in others[u[0]] if math.isfinite(self.error(u, name))]
        chosen = random.Random(plan.seed).sample(pairs, min(plan.checks, len(pairs)))
        seen = []
        for done, (unit, name) in enumerate(chosen):
            self._measurer.tell("checks of what is predicted", done, len(chosen))
            seen.append((floors[unit[1]] + self.loss(unit, name), self._inject(unit, name)))
        self._measurer.tell("checks of what is predicted", len(chosen), len(chosen))
        return rank_correlation([a for a, _ in seen], [b for _, b in seen])

    def _floor(self, stage: int, points: Points) -> float:
        """Error of the output however small a layer's is in a stage: from the smallest that can be injected."""
        names = [name for name in self._measurer.plan.candidates if name != DENSE]
        tried = [group for group in range(len(self._measurer.groups)) if points[group, stage]]
        if not tried:
            return 0.0
        error, group, name = min((self.error((g, stage), n), g, n) for g in tried for n in names)
        return floor_of((error, self._inject((group, stage), name)), max(points[group, stage]))

    def _probes(self, group: Sequence[int]) -> list[str]:
        """Candidates along the hull of all layers together, dense not among them: large enough to be no rounding.

        Where none is for all layers, those of the layers of a group that have any.
        """
        layers, plan = self._local, self._measurer.plan
        names = [n for n in plan.candidates if n != DENSE and all(_runs(n, layer) for layer in layers)]
        if not names:
            layers = [self._local[layer] for layer in group]
            names = [n for n in plan.candidates if n != DENSE and any(_runs(n, layer) for layer in layers)]
        sums, size = [], {}
        for name in (DENSE, *names):
            some = [each[name] for layer in layers if _runs(name, layer) for each in layer]
            sums.append(Choice(name, sum(each.seconds for each in some), sum(each.error for each in some)))
            size[name] = sums[-1].loss / max(1, len(some))
        found = [choice.name for choice in hull(sums) if choice.name != DENSE] or names
        count = min(plan.probes, len(found))
        probes: list[str] = []
        for i in range(count):
            wanted = PROBED[0] * (PROBED[1] / PROBED[0]) ** ((i + 0.5) / count)
            left = [name for name in found if name not in probes]
            probes.append(min(left, key=lambda name: abs(math.log(max(size[name], 1e-12) / wanted))))
        return probes

    def _with(self, unit: Unit, name: str) -> list[int]:
        """The layers of a group that a candidate is for, and runs in."""
        group, stage = unit
        return [layer for layer in self._measurer.groups[group] if name in self._local[layer][stage]]

    def _inject(self, unit: Unit, name: str) -> float:
        """Error of the output with a candidate in a unit and all else dense."""
        layers, plan = self._with(unit, name), self._measurer.plan
        rows = [
            tuple(name if layer in layers and s == unit[1] else DENSE for s in range(plan.stages))
            for layer in range(self._measurer.subject.layers)
        ]
        return self._measurer.quality(tuple(rows)).error


def _runs(name: str, stages: Sequence[Mapping[str, object]]) -> bool:
    """Whether a candidate runs in all stages of a layer."""
    return all(name in each for each in stages)
