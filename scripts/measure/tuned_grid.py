"""The grid of single patterns that tuned schedules are compared with, and the choice of the best."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Sequence
from typing import Any

from visattn.patterns import SharingPattern
from visattn.staged import with_precision
from visattn.tuning.candidates import checked, kind_of
from visattn.tuning.goal import Goal
from visattn.tuning.layers import in_the_middle
from visattn.tuning.measure import Measurer, OutOfTime
from visattn.tuning.subject import DENSE, Assignment, Outcome, everywhere

# Further windows of the grid beyond the candidates of the search, as shares of the axes.
WINDOWS = (0.2, 0.3, 0.6, 0.9)
# What patterns list more of the larger it is.
SHARES = ("keep", "p", "window")
# First stages that single patterns leave dense, at most.
DENSE_STAGES = 2


def grid_of(names: Sequence[str], shape: tuple[int, ...]) -> tuple[str, ...]:
    """Single patterns for a grid of tokens: the candidates of the search, those without means, and more windows."""
    more = [f"na(window={'x'.join(str(max(1, round(w * n)) | 1) for n in shape)})" for w in WINDOWS]
    bare: list[Any] = [p for p, _ in map(with_precision, names) if getattr(p, "rest", "") == "mean"]
    return checked([*names, *(str(dataclasses.replace(each, rest="drop")) for each in bare), *more], shape)[1:]


def fields_of(name: str) -> dict[str, Any]:
    """Parameters of a pattern."""
    pattern: Any = with_precision(name)[0]
    if isinstance(pattern, SharingPattern):
        # That it shares, and for how long, is beside what it lists.
        return dataclasses.asdict(pattern.of) | {"shared": pattern.every}  # type: ignore[call-overload]
    return dataclasses.asdict(pattern)


def is_within(one: str, other: str) -> bool:
    """Whether a pattern lists no more than another one of its kind for every query."""
    a, b = (fields_of(name) | {"kind": kind_of(name)} for name in (one, other))
    share = next((name for name in SHARES if name in a), "")
    if not share or share not in b or {**a, share: None} != {**b, share: None}:
        return one == other
    x, y = a[share], b[share]
    return all(i <= j for i, j in zip(x, y, strict=True)) if isinstance(x, tuple) else x <= y


def largest_first(names: Sequence[str]) -> list[str]:
    """Patterns in an order in which those within others come behind them."""
    sizes = {}
    for name in names:
        values = fields_of(name)
        size = next((values[share] for share in SHARES if share in values), 0.0)
        sizes[name] = math.prod(size) if isinstance(size, tuple) else size
    return sorted(names, key=lambda name: -sizes[name])


def single(measurer: Measurer, pattern: str, dense: int) -> Assignment:
    """A pattern at all layers and stages but so many first ones."""
    return everywhere(pattern, measurer.subject.layers, measurer.plan.stages, dense)


def families(names: Sequence[str]) -> list[list[str]]:
    """Patterns that differ in how much they list alone, from the least to the most."""
    found: list[list[str]] = []
    for name in reversed(largest_first(names)):
        home = next((some for some in found if is_within(some[-1], name)), None)
        if home is None:
            found.append([name])
        else:
            home.append(name)
    return found


def measure_grid(measurer: Measurer, patterns: Sequence[str], goals: Sequence[Goal]) -> list[dict[str, Any]]:
    """Quality and time of every single pattern, as far as the time reaches; of those left out it says why.

    Of patterns that differ in how much they list alone, those are left out that list less than one far from all bounds,
    or more than one that holds all of them.

    Args:
        measurer: Measures.
        patterns: The single patterns.
        goals: One for each bound.
    """
    lowest, highest = (pick(goals, key=lambda goal: goal.psnr or 0.0) for pick in (min, max))
    slow, far = slower_than_dense(measurer), []
    rows: dict[tuple[str, int], dict[str, Any]] = {}

    def visit(pattern: str, first: int) -> dict[str, Any]:
        row = rows[pattern, first] = {"pattern": pattern, "dense_stages": first}
        measure_single(row, measurer, lowest)
        if "quick" in row:
            far.append(pattern)
        print(f"grid {len(rows)} of at most {(DENSE_STAGES + 1) * len(patterns)}: {pattern}, {first}", flush=True)
        return row

    try:
        # What is far off even with the first steps dense is farther without.
        stages = range(min(DENSE_STAGES, measurer.plan.stages - 1), -1, -1)
        for first, family in itertools.product(stages, families(patterns)):
            left = []
            for pattern in family:
                farther = next((name for name in far if is_within(pattern, name)), None)
                if pattern in slow:
                    why = "takes longer than dense attention"
                elif farther is not None:
                    why = f"far from all bounds, as {farther} with as many dense steps or more"
                else:
                    left.append(pattern)
                    continue
                rows[pattern, first] = {"pattern": pattern, "dense_stages": first, "error": why}
            # Halves find where bounds begin to hold, then one by one until all of them do.
            low, high = 0, len(left)
            while low < high:
                middle = (low + high) // 2
                low, high = (middle + 1, high) if "quick" in visit(left[middle], first) else (low, middle)
            for at, pattern in enumerate(left):
                if (pattern, first) in rows and "psnr" not in rows[pattern, first]:
                    continue
                if at < low:
                    why = f"far from all bounds, as {left[low - 1]}"
                    rows[pattern, first] = {"pattern": pattern, "dense_stages": first, "error": why}
                    continue
                row = rows.get((pattern, first)) or visit(pattern, first)
                if "psnr" in row and holds(row, highest):
                    for more in left[at + 1 :]:
                        why = f"lists more than {pattern}, which holds all bounds"
                        rows.setdefault((more, first), {"pattern": more, "dense_stages": first, "error": why})
                    break
    except OutOfTime:
        print("the grid is cut by --seconds", flush=True)
    return list(rows.values())


def holds(row: dict[str, Any], goal: Goal) -> bool:
    """Whether the measured samples of a row have a bound and its margin."""
    assert goal.psnr is not None
    return Outcome.of(row).held(goal.share) >= goal.psnr + goal.margin


def measure_single(row: dict[str, Any], measurer: Measurer, goal: Goal) -> None:
    """Measure a row of the grid: unless its quick samples alone say that it misses the bound, all of them."""
    assert goal.psnr is not None
    assignment, samples = single(measurer, row["pattern"], row["dense_stages"]), measurer.plan.samples
    try:
        # The quick samples are some of all: more of them below the bound than may be of all is enough. Where they are
        # all, they are measured with their time at once.
        some = len(measurer.plan.quick_samples) < len(samples)
        quick = measurer.quality(assignment) if some else measurer.outcome(assignment, samples)
        below = sum(value < goal.psnr + goal.margin for value in quick.psnr)
        if below > int((1 - goal.share) * len(samples) + 1e-9):
            row["quick"] = list(quick.psnr)
        else:
            row |= measurer.outcome(assignment, samples).to_dict()
    except (ValueError, RuntimeError) as error:
        row["error"] = str(error).splitlines()[0]


def slower_than_dense(measurer: Measurer) -> set[str]:
    """Candidates whose calls take longer than dense ones in every layer; none where no times were measured."""
    try:
        rows = in_the_middle(measurer)
    except OutOfTime:
        return set()
    faster = {name for row in rows for name, each in row.items() if each.seconds < row[DENSE].seconds}
    return set(measurer.plan.candidates) - faster - {DENSE}


def best_single(rows: Sequence[dict[str, Any]], goal: Goal, measurer: Measurer) -> dict[str, Any]:
    """The fastest that holds on the measured samples, verified on held-out ones: of the grid, or dense attention."""
    dense = single(measurer, DENSE, 0)
    good = [row for row in rows if "psnr" in row and holds(row, goal)]
    good.append({"pattern": DENSE, "dense_stages": 0} | measurer.outcome(dense, measurer.plan.samples).to_dict())
    best = min(good, key=lambda row: row["attention_seconds"])
    assignment = single(measurer, best["pattern"], best["dense_stages"])
    found = measurer.outcome(assignment, measurer.plan.held_out(0, goal.held_out))
    return {"pattern": best["pattern"], "dense_stages": best["dense_stages"], **found.to_dict()}
