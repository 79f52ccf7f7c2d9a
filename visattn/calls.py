"""What one call costs: the device's time, the host's, the wall's, and from how many tokens on a pattern pays."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from visattn.bench import DENSE, Case, check_case, contenders
from visattn.patterns import Pattern, Radial, parse
from visattn.patterns.values import axis_values
from visattn.timing import captured, host_time, medians, per_call

# Sides of the square or cubic grids that a crossing is looked for on, by the number of axes.
SIDES = {1: (256, 1024, 4096, 16384), 2: (16, 24, 32, 48, 64, 96), 3: (4, 8, 12, 16, 24)}


@dataclass(frozen=True)
class CallTime:
    """What a call of one backend costs, in seconds.

    Attributes:
        backend: Its name, or "dense" for plain SDPA without the pattern.
        wall: Per call of many in a row.
        host: How long a call keeps the caller while the device is idle; on a CPU that is all of it.
        gpu: Of the device alone: replays of a CUDA graph, None on a CPU and for calls that cannot be captured.
        chosen: Whether "auto" takes it.
        reason: Why it cannot run, "" if it can.
        other: Whether it cannot because it is made for patterns of another kind.
    """

    backend: str
    wall: float | None = None
    host: float | None = None
    gpu: float | None = None
    chosen: bool = False
    reason: str = ""
    other: bool = False


@dataclass(frozen=True)
class CallTimes:
    """What calls of every backend cost on one case.

    Attributes:
        case: The problem.
        lines: One per backend, dense SDPA first.
    """

    case: Case
    lines: tuple[CallTime, ...]

    def to_dict(self) -> dict[str, Any]:
        """As JSON."""
        case = dataclasses.asdict(self.case)
        case["layout"]["tokens"] = self.case.layout.length
        return {"case": case, "lines": [dataclasses.asdict(line) for line in self.lines]}


def sweep(patterns: Sequence[str]) -> list[tuple[int, ...]]:
    """Grids from few to many tokens on which every one of some patterns can be, with as many axes as they name."""
    parsed = [parse(text) for text in patterns]
    named = [len(v) for pattern in parsed for v in axis_values(pattern).values() if isinstance(v, tuple)]
    dims = max(named, default=3 if any(isinstance(pattern, Radial) for pattern in parsed) else 2)
    return [grid for side in SIDES[dims] if all(_fits(pattern, grid := (side,) * dims) for pattern in parsed)]


def time_calls(case: Case, backends: Sequence[str], *, repeats: int = 5) -> CallTimes:
    """Time the calls of dense SDPA and of backends, in turns.

    Args:
        case: The problem.
        backends: Names of backends.
        repeats: Measurements of each; times are medians.

    Raises:
        ValueError: If the case cannot be.
    """
    check_case(case)
    runs, refused, asked = contenders(case, backends)
    on_gpu = torch.device(case.device).type == "cuda"
    measurements: dict[str, Callable[[], float]] = {}
    for name, run in runs.items():
        count = _count(run)
        measurements |= {f"{name} wall": partial(per_call, run, count), f"{name} host": partial(host_time, run)}
        graph = captured(run) if on_gpu and not case.backward else None
        if graph is not None:
            measurements[f"{name} gpu"] = partial(per_call, graph.replay, count)
    found = medians(measurements, repeats)
    lines = [CallTime(name, reason=each.reason, other=each.other) for name, each in refused.items()]
    for name in runs:
        times = found[f"{name} wall"], found[f"{name} host"], found.get(f"{name} gpu")
        lines.append(CallTime(name, *times, chosen=name == asked.choice))
    order = (DENSE, *backends)
    return CallTimes(case, tuple(sorted(lines, key=lambda line: order.index(line.backend))))


def overtaking(dense: Mapping[int, float], sparse: Mapping[int, float]) -> int | None:
    """From how many tokens on a backend is faster than dense attention, for good.

    Args:
        dense: Wall time of dense attention by number of tokens.
        sparse: That of a backend.

    Returns:
        The number, between two that were measured where both times are taken as powers of it; the smallest measured one
        if it is faster everywhere, None if it is not the faster one at the largest.
    """
    sizes = sorted(dense.keys() & sparse.keys())
    slower = [n for n in sizes if sparse[n] >= dense[n]]
    if not sizes or sizes[-1] in slower:
        return None
    if not slower:
        return sizes[0]
    low = slower[-1]
    high = sizes[sizes.index(low) + 1]
    # Logarithms of the two ratios: where the line between them crosses zero.
    before, after = (math.log(sparse[n] / dense[n]) for n in (low, high))
    return round(low * (high / low) ** (before / (before - after)))


def crossings(results: Sequence[CallTimes]) -> dict[str, int | None]:
    """`overtaking` of every backend that ran on two grids or more, from the results of one pattern."""
    walls: dict[str, dict[int, float]] = {}
    for result in results:
        for line in result.lines:
            if line.wall is not None:
                walls.setdefault(line.backend, {})[result.case.layout.length] = line.wall
    dense = walls.pop(DENSE, {})
    return {name: overtaking(dense, times) for name, times in walls.items() if len(times) > 1}


def _fits(pattern: Pattern, grid: tuple[int, ...]) -> bool:
    try:
        pattern.check(grid)
    except ValueError:
        return False
    return True


def _count(run: Callable[[], object]) -> int:
    """How many calls last about a fiftieth of a second."""
    run()
    return max(1, min(200, round(0.02 / max(per_call(run, 1), 1e-6))))
