"""Where a pattern is worth it: what its fastest engine would take for a call, against dense attention."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache

import torch

from visattn.dispatch import choose, current_gpu, load, milliseconds
from visattn.patterns import Dense, ListedPattern, SharingPattern
from visattn.problem import Problem
from visattn.registry import REGISTRY

# Devices whose estimates were held against measurements (scripts/check/crossing_gpu.py and crossing_cpu.py).
DEVICES = ("cpu", "cuda")
# How much faster a pattern has to be by its estimate.
CLEAR = 1.05
# What an eager call of ours costs the host in a model beyond one in a loop, whose code and data are in its caches:
# SDXL at 1024 pixels on an H200, a step with 70 patched modules against one with none (docs/performance.md).
INSIDE_MS = 0.07
# How many times that the device has to be saved. Nobody knows before a model runs whether it waits for its host (then
# the call only costs) or for its device (then it gains the difference).
WORTH = 2


@dataclass(frozen=True)
class Crossing:
    """Estimated wall times of a call: of the pattern, and of dense attention without it.

    Attributes:
        backend: The fastest engine for the pattern.
        sparse_ms: What it would take.
        dense_ms: What torch's dense attention would.
        mode: How the call is made, see `Problem`.
        saved_ms: Time of the device alone that the pattern saves.
        device: Whose times these are, "cpu" or "cuda".
        listed: Share of the keys that q and k made their lists visit, None for what is expected.
    """

    backend: str
    sparse_ms: float
    dense_ms: float
    mode: str
    saved_ms: float = 0.0
    device: str = "cuda"
    listed: float | None = None

    @property
    def dense_pays(self) -> bool:
        """Whether dense attention is the faster one, or as fast within what an estimate can tell."""
        return self.dense_ms < CLEAR * self.sparse_ms

    @property
    def dense_pays_inside(self) -> bool:
        """Whether it does in a model, where the host of a GPU has other work and an eager call costs it more."""
        waits = self.device == "cuda" and self.mode == "eager"
        return self.dense_pays or (waits and self.saved_ms < WORTH * INSIDE_MS)

    @property
    def reason(self) -> str:
        """Why a module of a model is left dense."""
        if self.dense_pays and self.sparse_ms < self.dense_ms:
            return f"{self}: nearer than estimates can tell ({CLEAR - 1:.0%})"
        if self.dense_pays or self.device != "cuda":
            return str(self)
        return (
            f"{self}: the device would be saved {self.saved_ms:.3f} ms, less than {WORTH} times what a call in a "
            f"model costs the host ({INSIDE_MS} ms)"
        )

    def __str__(self) -> str:
        way = "" if self.mode == "eager" else f" ({self.mode})"
        way += "" if self.listed is None else f", for up to {self.listed:.2f} of the keys are listed"
        return f"estimated {self.sparse_ms:.3f} ms by {self.backend}, {self.dense_ms:.3f} ms dense{way}"


def crossing(problem: Problem) -> Crossing | None:
    """The estimates of a call; None where none are good enough to leave a pattern out.

    These are calls without gradients, of patterns that are lists of keys, or share between steps what those give (by
    their mean over the steps): what replaces the softmax is other attention than the model's, and what is being trained
    must run. A CPU simulates 8 bits for their errors, whatever that takes.
    """
    pattern = problem.pattern
    listed = pattern.of if isinstance(pattern, SharingPattern) else pattern
    if problem.device not in DEVICES or problem.grad or not isinstance(listed, ListedPattern):
        return None
    if problem.device == "cpu" and problem.precision is not None:
        return None
    return _crossing(problem, REGISTRY.version, current_gpu(problem.device), torch.get_num_threads())


def dense_cost(problem: Problem) -> float:
    """What torch's dense attention would cost in the place of a call's pattern, its own launches included."""
    return load("sdpa").cost(replace(problem, pattern=Dense(), precision=None))


# What `choose` keeps its answers by.
@lru_cache(maxsize=1024)
def _crossing(problem: Problem, version: int, gpu: int, threads: int) -> Crossing:
    sparse = choose(problem)
    times = milliseconds(problem, sparse.cost(problem)), milliseconds(problem, dense_cost(problem))
    alone = replace(problem, mode="captured")
    saved = dense_cost(alone) - sparse.cost(alone)
    saved_ms = milliseconds(problem, saved)
    return Crossing(sparse.name, *times, problem.mode, saved_ms, problem.device, problem.listed)


def slower_in_8_bits(problem: Problem) -> str:
    """Why a call in 8 bits is computed in its own dtype instead; "" where that is not estimated to be faster.

    These are calls of which `crossing` has estimates.
    """
    if problem.precision is None or crossing(problem) is None:
        return ""
    return _slower_in_8_bits(problem, REGISTRY.version, current_gpu(problem.device))


@lru_cache(maxsize=1024)
def _slower_in_8_bits(problem: Problem, version: int, gpu: int) -> str:
    exact = replace(problem, precision=None)
    times = [milliseconds(each, choose(each).cost(each)) for each in (problem, exact)]
    if times[1] >= times[0]:
        return ""
    return f"estimated {times[0]:.3f} ms in {problem.precision}, quantising included, {times[1]:.3f} ms without"
