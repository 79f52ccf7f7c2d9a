"""What candidates do inside layers, in the middle step of each stage."""

from __future__ import annotations

import bisect
import statistics
from collections.abc import Mapping, Sequence

from visattn.tuning.ages import of_stage
from visattn.tuning.candidates import is_steady
from visattn.tuning.measure import Measurer
from visattn.tuning.solve import Choice, hull
from visattn.tuning.subject import DENSE, Local

# What candidates do, by layer and stage.
Locals = list[list[dict[str, Local]]]
# How many times the error on a layer's hull a candidate may have that is measured in all stages.
NEAR = 1.5


def measured(measurer: Measurer) -> Locals:
    """What candidates do, by layer and stage.

    Those that no layer would choose in the middle stage are not measured in the others, and left out.
    """
    plan, between = measurer.plan, measurer.plan.stages // 2
    measurer.tell("candidates in each layer", 0, plan.stages)
    found = {between: in_the_middle(measurer)}
    names = promising(found[between], plan.candidates)
    # Times that do not depend on values are measured once.
    timed = [name for name in names if not is_steady(name)]
    for stage in range(plan.stages):
        if stage != between:
            measurer.tell("candidates in each layer", len(found), plan.stages)
            found[stage] = measurer.local(stage, names, timed)
    measurer.tell("candidates in each layer", plan.stages, plan.stages)
    steadied = _steadied(
        [
            [{n: v for n, v in found[stage][layer].items() if n in names} for stage in range(plan.stages)]
            for layer in range(measurer.subject.layers)
        ]
    )
    return [[of_stage(*pair) for pair in zip(layer, measurer.calls, strict=True)] for layer in steadied]


def in_the_middle(measurer: Measurer) -> list[dict[str, Local]]:
    """What all candidates do in the middle stage, by layer."""
    plan = measurer.plan
    return measurer.local(plan.stages // 2, plan.candidates, plan.candidates)


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
        return points[-1].loss if i else float("inf")
    one, two = points[i - 1], points[i]
    return one.loss + (two.loss - one.loss) * (seconds - one.time) / (two.time - one.time)


def _steadied(local: Locals) -> Locals:
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
