"""Fair timing: the runs that are compared take turns, so that a slow minute of the machine hits all of them."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch


def gain(speedup: float) -> str:
    """A ratio of times, dense to sparse, in words."""
    return f"{speedup:.2f}x faster" if speedup >= 1 else f"{1 / speedup:.2f}x slower"


@dataclass(frozen=True)
class Timing:
    """Seconds of one run, measured several times.

    Attributes:
        seconds: Every measurement, in the order they were taken.
    """

    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        """Middle measurement."""
        return statistics.median(self.seconds)

    @property
    def spread(self) -> tuple[float, float]:
        """First and third quartile; the extremes where there are fewer than four measurements."""
        if len(self.seconds) < 4:
            return min(self.seconds), max(self.seconds)
        low, _, high = statistics.quantiles(self.seconds, n=4, method="inclusive")
        return low, high

    def to_dict(self) -> dict[str, Any]:
        """As JSON."""
        low, high = self.spread
        return {"median": self.median, "low": low, "high": high, "seconds": list(self.seconds)}


def interleave(
    runs: Mapping[str, Callable[[], object]],
    *,
    repeats: int = 5,
    warmup: int = 1,
    at_least: float = 0.0,
    synchronize: Callable[[], None] | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, Timing]:
    """Time functions in turns: a, b, c, c, b, a, a, b, c, ...

    Args:
        runs: Functions by name.
        repeats: Measurements of each.
        warmup: Calls of each before the first measurement (plans, compilation, caches, first touch of memory).
        at_least: Seconds a measurement should last: shorter functions are called several times in a row.
        synchronize: Waits for the device; None waits for all work on CUDA devices where there are any.
        clock: What is read before and after, in seconds.

    Returns:
        Seconds per call, by name.

    Raises:
        ValueError: If `repeats` is below 1 or `warmup` below 0.
    """
    if repeats < 1 or warmup < 0:
        raise ValueError(f"repeats {repeats} must be at least 1 and warmup {warmup} at least 0")
    wait = synchronize or _wait
    calls = {name: _warm_up(run, warmup, at_least, wait, clock) for name, run in runs.items()}
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(repeats):
        # Every other turn runs backward: what a run leaves in the caches is not always left to the same one.
        for name in list(runs)[:: -1 if turn % 2 else 1]:
            seconds[name].append(_measure(runs[name], calls[name], wait, clock))
    return {name: Timing(tuple(values)) for name, values in seconds.items()}


def time_once(run: Callable[[], object]) -> float:
    """Seconds of one call; waits for CUDA devices before and after."""
    return _measure(run, 1, _wait, time.perf_counter)


def per_call(run: Callable[[], object], calls: int) -> float:
    """Seconds per call of so many in a row; waits for CUDA devices before and after."""
    return _measure(run, calls, _wait, time.perf_counter)


def host_time(run: Callable[[], object], calls: int = 5) -> float:
    """Seconds until a call returns, with idle CUDA devices before it: the median of so many."""
    times = []
    for _ in range(calls):
        _wait()
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    _wait()
    return statistics.median(times)


def captured(run: Callable[[], object], calls: int = 1) -> torch.cuda.CUDAGraph | None:
    """So many calls as a CUDA graph, None if they cannot be captured."""
    run()
    _wait()
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            for _ in range(calls):
                run()
    except RuntimeError:
        return None
    return graph


def medians(measurements: Mapping[str, Callable[[], float]], turns: int) -> dict[str, float]:
    """The median of each measurement over so many turns, every other of which runs backward."""
    found: dict[str, list[float]] = {name: [] for name in measurements}
    for turn in range(turns):
        for name in list(measurements)[:: -1 if turn % 2 else 1]:
            found[name].append(measurements[name]())
    return {name: statistics.median(values) for name, values in found.items()}


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _warm_up(
    run: Callable[[], object], warmup: int, at_least: float, wait: Callable[[], None], clock: Callable[[], float]
) -> int:
    """Call a function before it is measured; returns how many calls last `at_least` seconds."""
    for _ in range(warmup):
        run()
    wait()
    if not at_least:
        return 1
    calls = 1
    while (took := _measure(run, calls, wait, clock) * calls) < at_least / 2:
        calls *= 2
    return max(1, round(calls * at_least / took))


def _measure(run: Callable[[], object], calls: int, wait: Callable[[], None], clock: Callable[[], float]) -> float:
    wait()
    start = clock()
    for _ in range(calls):
        run()
    wait()
    return (clock() - start) / calls
