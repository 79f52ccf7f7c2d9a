"""How much a search measures: candidates, stages of the run, injections, samples."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

# Seeds of the samples that verify begin so far behind those that are measured; another round begins as far again.
HELD_OUT = 1_000_000


@dataclass(frozen=True)
class Plan:
    """How much is measured.

    Attributes:
        candidates: Texts of patterns, dense first.
        stages: Parts of the run that have a pattern of their own each.
        groups: Groups of neighbouring layers at most that are injected together.
        probes: Candidates that are injected in each group and stage.
        checks: Further injections, to see how well the others predict them.
        seeds: Samples of a schedule's quality.
        quick: Those of them for injections.
        seed: Of the first sample.
        steps: Denoising steps of a run.
    """

    candidates: tuple[str, ...]
    stages: int = 4
    groups: int = 12
    probes: int = 2
    checks: int = 12
    seeds: int = 8
    quick: int = 4
    seed: int = 0
    steps: int = 0

    @property
    def edges(self) -> tuple[float, ...]:
        """Where stages begin and end: each is as long as those before it, for the first steps matter most.

        They are equal where the steps are too few for that.
        """
        halves = (0.0, *(0.5**i for i in range(self.stages - 1, -1, -1)))
        counts = [round(edge * self.steps) for edge in halves]
        if all(a < b for a, b in itertools.pairwise(counts)):
            return halves
        return tuple(i / self.stages for i in range(self.stages + 1))

    @property
    def samples(self) -> tuple[int, ...]:
        """Seeds of a schedule's quality."""
        return tuple(range(self.seed, self.seed + self.seeds))

    @property
    def quick_samples(self) -> tuple[int, ...]:
        """Seeds of injections."""
        return self.samples[: self.quick]

    def held_out(self, again: int, count: int) -> tuple[int, ...]:
        """Seeds that verify.

        Args:
            again: Which round of them.
            count: How many.
        """
        first = self.seed + HELD_OUT * (again + 1)
        return tuple(range(first, first + count))


def stages_of(edges: Sequence[float], row: Sequence[str]) -> dict[str, str]:
    """The stages of a layer as a file has them: neighbours with one pattern are one."""
    found: list[tuple[float, float, str]] = []
    for first, end, name in zip(edges, edges[1:], row, strict=False):
        if found and found[-1][2] == name:
            found[-1] = (found[-1][0], end, name)
        else:
            found.append((first, end, name))
    return {f"{first:g}-{end:g}" if first or end < 1 else "0-": name for first, end, name in found}
