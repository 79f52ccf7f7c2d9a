"""What one call costs on a GPU: of the host, of the wall clock, of the GPU alone; contenders take turns."""

from __future__ import annotations

import cProfile
import io
import pstats
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch

# Rounds in which every contender has its turn, and calls of one turn.
ROUNDS, CALLS = 5, 40


def host_us(work: Callable[[], Any], repeats: int = CALLS) -> float:
    """Microseconds that one call keeps the host, with an idle device."""
    times = []
    for _ in range(repeats):
        torch.cuda.synchronize()
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    torch.cuda.synchronize()
    return 1e6 * statistics.median(times)


def wall_us(work: Callable[[], Any], repeats: int = 2 * CALLS) -> float:
    """Microseconds per call in a loop."""
    work()
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(repeats):
        work()
    torch.cuda.synchronize()
    return 1e6 * (time.perf_counter() - start) / repeats


def gpu_us(work: Callable[[], Any], repeats: int = 20) -> Callable[[], float]:
    """A measurement of the GPU alone: microseconds per call of a captured graph of so many, by events."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        work()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(repeats):
            work()

    def measure() -> float:
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        return 1e3 * begin.elapsed_time(end) / repeats

    return measure


def in_turns(contenders: Mapping[str, Callable[[], float]], rounds: int = ROUNDS) -> dict[str, float]:
    """The median of each measurement over rounds in which all have a turn; the first round warms up."""
    found: dict[str, list[float]] = {name: [] for name in contenders}
    for turn in range(rounds + 1):
        for name, measure in contenders.items():
            value = measure()
            if turn:
                found[name].append(value)
    return {name: statistics.median(values) for name, values in found.items()}


def profiled(work: Callable[[], Any], calls: int = 200, lines: int = 30) -> str:
    """The functions in which so many calls spend the host's time, those with the most of their own first."""
    torch.cuda.synchronize()
    profile = cProfile.Profile()
    profile.enable()
    for _ in range(calls):
        work()
    profile.disable()
    torch.cuda.synchronize()
    text = io.StringIO()
    pstats.Stats(profile, stream=text).sort_stats("tottime").print_stats(lines)
    return text.getvalue()
