"""What one call costs on a GPU: of the host, of the wall clock, of the GPU alone; contenders take turns."""

from __future__ import annotations

import cProfile
import io
import pstats
from collections.abc import Callable, Mapping
from typing import Any

import torch

from visattn.timing import captured, host_time, medians, per_call

# Rounds in which every contender has its turn, and calls of one turn.
ROUNDS, CALLS = 5, 40


def host_us(work: Callable[[], Any], repeats: int = CALLS) -> float:
    """Microseconds that one call keeps the host, with an idle device."""
    return 1e6 * host_time(work, repeats)


def wall_us(work: Callable[[], Any], repeats: int = 2 * CALLS) -> float:
    """Microseconds per call in a loop."""
    work()
    return 1e6 * per_call(work, repeats)


def gpu_us(work: Callable[[], Any], repeats: int = 20) -> Callable[[], float]:
    """A measurement of the GPU alone: microseconds per call of a captured graph of so many, by events."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        work()
    torch.cuda.current_stream().wait_stream(side)
    graph = captured(work, repeats)
    assert graph is not None, "the call cannot be captured"

    def measure() -> float:
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        return 1e3 * begin.elapsed_time(end) / repeats

    return measure


def in_turns(contenders: Mapping[str, Callable[[], float]], rounds: int = ROUNDS) -> dict[str, float]:
    """The median of each measurement over rounds in which all have a turn, after one that warms up."""
    medians(contenders, 1)
    return medians(contenders, rounds)


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


def kernels(work: Callable[[], Any], lines: int = 30) -> str:
    """The kernels of one call with their time on the GPU, the longest first, and the time of all of them."""
    work()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        work()
        torch.cuda.synchronize()
    found = sorted(profile.key_averages(), key=lambda each: -each.self_device_time_total)
    total = sum(each.self_device_time_total for each in found)
    rows = [f"{each.self_device_time_total:10.0f} us {each.count:6} x {each.key}" for each in found[:lines]]
    return "\n".join([f"{total:10.0f} us {sum(each.count for each in found):6} x all", *rows, ""])
