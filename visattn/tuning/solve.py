"""The knapsack: a candidate for each unit (layer and stage), so that the sum of losses is least for a sum of times.

On the lower convex hull of each unit's (time, loss) points a Lagrange multiplier `l` picks the point of least
`loss + l * time`. As `l` falls, units change to their next point one by one, in the order of the slopes: these changes
are the ladder. Each of its rungs is the exact optimum for the time that it takes; between two rungs, whose times differ
by one unit, a mixture off the hulls may be better by less than that unit's part.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import NamedTuple


class Choice(NamedTuple):
    """What a candidate means for a unit.

    Attributes:
        name: The candidate.
        time: Seconds.
        loss: Predicted squared error of the output.
    """

    name: str
    time: float
    loss: float


class Rung(NamedTuple):
    """A choice for every unit.

    Attributes:
        names: Candidate of each unit.
        time: Their sum.
        loss: Their sum.
    """

    names: tuple[str, ...]
    time: float
    loss: float


def hull(choices: Sequence[Choice]) -> list[Choice]:
    """The lower convex hull of a unit's choices, from the fastest to the one of least loss."""
    found: list[Choice] = []
    for each in sorted(choices, key=lambda choice: (choice.time, choice.loss, choice.name)):
        if found and each.loss >= found[-1].loss:
            continue
        while len(found) > 1 and _slope(found[-2], found[-1]) <= _slope(found[-1], each):
            found.pop()
        found.append(each)
    return found


def ladder(units: Sequence[Sequence[Choice]]) -> list[Rung]:
    """All optima along the multiplier, from the fastest to the one of least loss.

    Args:
        units: The choices of each unit, one at least.
    """
    hulls = [hull(choices) for choices in units]
    steps = [
        (_slope(one, two), i, position)
        for i, points in enumerate(hulls)
        for position, (one, two) in enumerate(itertools.pairwise(points))
    ]
    # The largest gain first; the slopes of one hull fall, so that its points come in their order.
    steps.sort(key=lambda step: (-step[0], step[1], step[2]))
    at = [points[0] for points in hulls]
    rungs = [_rung(at)]
    for _, i, position in steps:
        at[i] = hulls[i][position + 1]
        rungs.append(_rung(at))
    return rungs


def uniform(units: Sequence[Sequence[Choice]]) -> list[Rung]:
    """The rungs with one candidate for all units, from the fastest to the slowest.

    Args:
        units: The choices of each unit; one with a single choice keeps it.
    """
    free = [{choice.name: choice for choice in unit} for unit in units if len(unit) > 1]
    names = [name for name in (free[0] if free else ()) if all(name in each for each in free)]
    rungs = [_rung([u[0] if len(u) == 1 else next(c for c in u if c.name == name) for u in units]) for name in names]
    return sorted(rungs, key=lambda rung: (rung.time, rung.loss, rung.names))


def rung_of(units: Sequence[Sequence[Choice]], names: Sequence[str]) -> Rung | None:
    """The rung with a candidate for each unit, None where a unit has no such choice."""
    found: list[Choice] = []
    for unit, name in zip(units, names, strict=True):
        choice = next((each for each in unit if each.name == name), None)
        if choice is None:
            return None
        found.append(choice)
    return _rung(found)


def front(rungs: Sequence[Rung]) -> list[Rung]:
    """Those of some rungs, sorted by time, that have less loss than all that take less time."""
    found: list[Rung] = []
    for rung in rungs:
        if not found or rung.loss < found[-1].loss:
            found.append(rung)
    return found


def _slope(one: Choice, two: Choice) -> float:
    """How fast loss falls with time: larger is steeper."""
    gained, took = one.loss - two.loss, two.time - one.time
    return gained / took if took > 0 else float("inf")


def _rung(at: Sequence[Choice]) -> Rung:
    return Rung(tuple(c.name for c in at), sum(c.time for c in at), sum(c.loss for c in at))
