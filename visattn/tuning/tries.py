"""The schedules whose quality was measured in a search, and how good they were."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from visattn.tuning.goal import Goal
from visattn.tuning.measure import Measurer
from visattn.tuning.solve import Rung
from visattn.tuning.subject import Assignment, Outcome

# A schedule that takes so much longer than one that does not hold is near enough to the fastest that does; and as much
# less time is no less, as times are measured.
CLOSE = 0.02
# By how many dB a schedule has to be predicted to miss the bound that is not measured for it.
DOUBT = 3.0


class Tries:
    """Whole schedules that are measured, each once, on samples that become more where schedules fail to verify.

    Attributes:
        goal: What is asked for.
        needed: The least score of measured samples.
    """

    def __init__(self, measurer: Measurer, goal: Goal, dense: Rung) -> None:
        """Nothing is measured yet.

        Args:
            measurer: Measures.
            goal: What is asked for.
            dense: Dense attention.
        """
        self._measurer, self.goal, self._dense = measurer, goal, dense
        # Points of accuracy are what they are.
        self.needed = goal.least + (goal.margin if goal.accuracy is None else 0.0)
        self._seeds: list[Sequence[int]] = [measurer.plan.samples]
        self._seen: dict[Assignment, tuple[Rung, Outcome]] = {}
        self._refused: set[Assignment] = set()

    def tell(self, done: int, of: int) -> None:
        """Say how many schedules were measured."""
        self._measurer.tell("schedules", done, of)

    def assignment(self, rung: Rung) -> Assignment:
        """The patterns of a rung by layer and stage."""
        stages = self._measurer.plan.stages
        return tuple(rung.names[i : i + stages] for i in range(0, len(rung.names), stages))

    @property
    def rungs(self) -> list[Rung]:
        """What was measured."""
        return [rung for rung, _ in self._seen.values()]

    def refuse(self, rung: Rung, seeds: Sequence[int]) -> None:
        """Count the samples on which a schedule failed to verify among those that are measured, and never take it.

        More of a margin instead would be for all schedules what one of them lacks on one sample, which has become
        another one.
        """
        self._refused.add(self.assignment(rung))
        self._seeds.append(seeds)

    def measure(self, rung: Rung) -> Outcome:
        """Measure a schedule, or look it up."""
        assignment = self.assignment(rung)
        first, *more = self._seeds
        outcome = self._measurer.outcome(assignment, first)
        # What fails on the first samples needs no more.
        for seeds in more if self.goal.score(outcome) >= self.needed else ():
            outcome = outcome.joined(self._measurer.outcome(assignment, seeds))
        self._seen[assignment] = rung, outcome
        return outcome

    def score(self, rung: Rung) -> float | None:
        """How good a schedule was, None where it was not measured, or holds on some of the samples alone so far."""
        score, seen = self._score(rung), self._seen.get(self.assignment(rung))
        if score is None or seen is None:
            return None
        return score if score < self.needed or len(seen[1].psnr) == sum(map(len, self._seeds)) else None

    def holds(self, rung: Rung) -> bool:
        """Whether a schedule does what is asked for: measures it."""
        self.measure(rung)
        return self.held(rung)

    def held(self, rung: Rung) -> bool:
        """Whether a schedule did what is asked for on all samples that it was measured on."""
        score = self._score(rung)
        return score is not None and score >= self.needed

    def may_hold(self, rung: Rung) -> bool:
        """Whether a schedule is not predicted to be far from the bound, even as far off as the best of the others."""
        offsets = [self.goal.score(outcome) - decibels(each.loss) for each, outcome in self._seen.values()]
        offsets = [each for each in offsets if math.isfinite(each)]
        if self.goal.psnr is None or not offsets:
            return True
        return decibels(rung.loss) + max(offsets) >= self.needed - DOUBT

    def is_faster(self, one: Rung, other: Rung) -> bool:
        """Whether a rung takes less time than another one: as measured, or as predicted where that is not."""
        seen = [self._seen.get(self.assignment(rung)) for rung in (one, other)]
        times = [0.0 if each is None else each[1].attention_seconds for each in seen]
        a, b = times if all(times) else (one.time, other.time)
        return a < b / (1 + CLOSE)

    def rows(self) -> list[dict[str, Any]]:
        """All that was measured as JSON, from the fastest to the slowest."""
        return sorted((self._row(*each) for each in self._seen.values()), key=lambda row: row["time"])

    def _score(self, rung: Rung) -> float | None:
        """How good a schedule was on the samples that it was measured on."""
        seen = self._seen.get(self.assignment(rung))
        if seen is None:
            return None
        return -math.inf if self.assignment(rung) in self._refused else self.goal.score(seen[1])

    def _row(self, rung: Rung, outcome: Outcome) -> dict[str, Any]:
        held, score = outcome.held(self.goal.share), self.goal.score(outcome)
        return {
            "time": rung.time,
            "loss": rung.loss,
            "error": outcome.error,
            "held": None if math.isinf(held) else held,
            "score": None if math.isinf(score) else score,
            "speedup": self._dense.time / rung.time if rung.time else None,
            "seconds": outcome.seconds,
            "attention_seconds": outcome.attention_seconds,
        }


def decibels(loss: float) -> float:
    """A squared error as PSNR."""
    return math.inf if loss <= 0 else -10 * math.log10(loss)
