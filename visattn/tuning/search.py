"""The search: measure, predict, walk the ladder to the rung that holds, and verify it on samples it has never seen."""

from __future__ import annotations

import bisect
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from visattn.tuned import Tuned
from visattn.tuning.measure import Measurer, OutOfTime
from visattn.tuning.overhead import excess, overheads
from visattn.tuning.sensitivity import rank_correlation
from visattn.tuning.solve import Rung, ladder
from visattn.tuning.subject import DENSE, Assignment, Outcome

# Seeds of the samples that verify begin so far behind those that are measured; another round begins as far again.
HELD_OUT = 1_000_000
# A schedule that takes so much longer than one that does not hold is near enough to the fastest that does.
CLOSE = 0.02
# Schedules that predictions choose before halves of what is left do, and by how many dB these go beyond the bound.
GUESSES, BEYOND = 5, 0.5


@dataclass(frozen=True)
class Goal:
    """What is asked for: one of the three.

    Attributes:
        psnr: The fastest schedule with at least so many dB to dense.
        speedup: The best schedule that makes attention so many times faster.
        accuracy: The fastest schedule that loses at most so many points of accuracy.
        share: Of the samples that have to reach `psnr`.
        margin: By how many dB the samples that are measured have to be better than `psnr`.
        held_out: Samples that verify.
        rounds: Times that a schedule which fails to verify is replaced by a better one.
    """

    psnr: float | None = None
    speedup: float | None = None
    accuracy: float | None = None
    share: float = 0.95
    margin: float = 0.5
    held_out: int = 20
    rounds: int = 3

    def score(self, outcome: Outcome) -> float:
        """How good an outcome is, as far as this goal asks: larger is better."""
        if self.accuracy is not None:
            return -outcome.lost_points
        return math.inf if self.psnr is None else outcome.held(self.share)

    @property
    def least(self) -> float:
        """The least score."""
        if self.accuracy is not None:
            return -self.accuracy
        return -math.inf if self.psnr is None else self.psnr

    def __str__(self) -> str:
        if self.accuracy is not None:
            return f"loses at most {self.accuracy:g} points of accuracy"
        return f"has {self.psnr:g} dB in {self.share:.0%} of the samples"


@dataclass
class Found:
    """What a search found.

    Attributes:
        assignment: The schedule.
        verified: Its outcome on held-out samples.
        held: Whether it does there what was asked for.
        tried: All schedules whose quality was measured, as JSON.
        ranks: How well injections predict others, and predictions whole schedules: rank correlations.
        complete: Whether the search ended by itself.
        missed: What is said where nothing does what was asked for.
    """

    assignment: Assignment
    verified: Outcome
    held: bool
    tried: list[dict[str, Any]] = field(default_factory=list)
    ranks: dict[str, float | None] = field(default_factory=dict)
    complete: bool = True
    missed: str = ""


class Search:
    """One search of a measurer for a goal."""

    def __init__(self, measurer: Measurer, goal: Goal) -> None:
        if sum(each is not None for each in (goal.psnr, goal.speedup, goal.accuracy)) != 1:
            raise ValueError("pass either the least PSNR, the most accuracy to lose, or the speed-up that you need")
        self.measurer, self.goal = measurer, goal
        self.tried: dict[Assignment, dict[str, Any]] = {}
        self._rungs: list[Rung] = []

    def run(self) -> Found:
        """Search; with the minutes over, the best that was seen is verified."""
        measurer, complete, ranks = self.measurer, True, None
        # Points of accuracy are what they are: no margin before held-out samples say otherwise.
        rung, margin = 0, self.goal.margin if self.goal.accuracy is None else 0.0
        try:
            local = measurer.local()
            responses, ranks = measurer.responses(local)
            beyond = overheads(measurer, local), excess(measurer, local, responses)
            self._rungs = ladder(measurer.choices(local, responses, *beyond))
            rung = self._find(margin)
        except OutOfTime:
            complete = False
            if not self._rungs:
                raise ValueError("the minutes were over before anything could be predicted: go on with more") from None
            rung = self._best(margin)
        # Held-out samples are measured whatever the clock says: no quality is reported without them.
        measurer.deadline = math.inf
        for again in range(self.goal.rounds):
            verified = self._verify(rung, again)
            held = self.goal.score(verified) >= self.goal.least
            if held or not complete or rung == len(self._rungs) - 1:
                break
            margin += max(0.25, self.goal.least - self.goal.score(verified))
            rung = max(self._find(margin), rung + 1)
        predicted = [(each["loss"], each["error"]) for each in self.tried.values() if each["error"]]
        whole = rank_correlation([a for a, _ in predicted], [b for _, b in predicted])
        assignment = self._assignment(rung)
        missed = self._missed(assignment)
        tried = sorted(self.tried.values(), key=lambda each: each["time"])
        return Found(assignment, verified, held, tried, {"injections": ranks, "schedules": whole}, complete, missed)

    def _find(self, margin: float) -> int:
        """The first rung that does what is asked for: the ladder goes from fast to good."""
        goal = self.goal
        if goal.speedup is not None:
            most = self._dense_time / goal.speedup
            within = [i for i, rung in enumerate(self._rungs) if rung.time <= most]
            return within[-1] if within else 0
        low, high = self._bracket(margin)
        rounds = max(1, math.ceil(math.log2(high + 1)))
        done = 0
        while low < high and not self._alike(low - 1, high):
            self.measurer.tell("schedules", min(done, rounds), rounds)
            # Predictions may be off all in one direction: then halves end it.
            rung = self._guess(low, high, margin) if done < GUESSES else (low + high) // 2
            done += 1
            if self._holds(rung, margin):
                high = rung
            else:
                low = rung + 1
        self.measurer.tell("schedules", rounds, rounds)
        return high

    def _bracket(self, margin: float) -> tuple[int, int]:
        """The first rung that may hold, and the first that is known to: what was measured for another margin counts."""
        scores = {}
        for rung in range(len(self._rungs)):
            each = self.tried.get(self._assignment(rung))
            if each is not None:
                scores[rung] = math.inf if each["score"] is None else each["score"]
        needed = self.goal.least + margin
        high = min((i for i, score in scores.items() if score >= needed), default=len(self._rungs) - 1)
        return max((i + 1 for i, score in scores.items() if i < high and score < needed), default=0), high

    def _alike(self, failed: int, held: int) -> bool:
        """Whether a rung that holds takes hardly longer than one that does not."""
        return failed >= 0 and self._rungs[held].time <= self._rungs[failed].time * (1 + CLOSE)

    def _guess(self, low: int, high: int, margin: float) -> int:
        """The next rung to measure: with one end of what is left measured, the first that is predicted to hold.

        It goes a little beyond, to the side that is not measured. With both ends, or none, it is the middle in time.
        """
        seen = {i: self.tried.get(self._assignment(i), {}).get("score") for i in {low - 1, high} if i >= 0}
        offsets = [score - _decibels(self._rungs[i].loss) for i, score in seen.items() if score is not None]
        times = [rung.time for rung in self._rungs[low:high]]
        middle = min(low + bisect.bisect(times, (times[0] + self._rungs[high].time) / 2), high - 1)
        if self.goal.psnr is None or len(offsets) != 1:
            return middle
        # Of what holds the fastest is looked for: a guess that should just fail after one that held, and the reverse.
        beyond = BEYOND if seen.get(high) is None else -BEYOND
        needed = self.goal.least + margin + beyond - offsets[0]
        return next((i for i in range(low, high) if _decibels(self._rungs[i].loss) >= needed), high - 1)

    def _holds(self, rung: int, margin: float) -> bool:
        return self.goal.score(self._outcome(rung)) >= self.goal.least + margin

    def _best(self, margin: float) -> int:
        """The fastest measured rung that holds; dense where none does."""
        known = {self._assignment(i): i for i in range(len(self._rungs))}
        good = [
            known[a]
            for a, each in self.tried.items()
            if (math.inf if each["score"] is None else each["score"]) >= self.goal.least + margin
        ]
        return min(good, default=len(self._rungs) - 1)

    def _outcome(self, rung: int) -> Outcome:
        assignment, found = self._assignment(rung), self._rungs[rung]
        outcome = self.measurer.outcome(assignment, self.measurer.plan.samples)
        held, score = outcome.held(self.goal.share), self.goal.score(outcome)
        self.tried[assignment] = {
            "time": found.time,
            "loss": found.loss,
            "error": outcome.error,
            "held": None if math.isinf(held) else held,
            "score": None if math.isinf(score) else score,
            "speedup": self._dense_time / found.time if found.time else None,
            "seconds": outcome.seconds,
            "attention_seconds": outcome.attention_seconds,
        }
        return outcome

    def _verify(self, rung: int, again: int) -> Outcome:
        first = self.measurer.plan.seed + HELD_OUT * (again + 1)
        self.measurer.tell("verifying", 0, 1)
        found = self.measurer.outcome(self._assignment(rung), range(first, first + self.goal.held_out))
        self.measurer.tell("verifying", 1, 1)
        return found

    @property
    def _dense_time(self) -> float:
        """Predicted time of dense attention."""
        return self._rungs[-1].time

    def _assignment(self, rung: int) -> Assignment:
        names, stages = self._rungs[rung].names, self.measurer.plan.stages
        return tuple(names[i : i + stages] for i in range(0, len(names), stages))

    def _missed(self, assignment: Assignment) -> str:
        """Why only dense attention does what is asked for, in words; empty where something else does."""
        if any(name != DENSE for row in assignment for name in row) or self.goal.speedup is not None:
            return ""
        if len(self._rungs) == 1:
            return "no candidate is faster than dense attention here: tune with more tokens, or on another device"
        best = max((each["score"] for each in self.tried.values() if each["score"] is not None), default=None)
        if self.goal.accuracy is not None:
            seen, other = (
                "" if best is None else f" (the best that was measured loses {-best:.2f})",
                "a larger --accuracy",
            )
        else:
            seen, other = "" if best is None else f" (the best that was measured has {best:.1f} dB)", "a lower --psnr"
        return (
            f"no schedule faster than dense {self.goal}{seen}: pass {other}, more --candidates (such as topk with a "
            "larger keep), or more --seeds"
        )


def _decibels(loss: float) -> float:
    """A squared error as PSNR."""
    return math.inf if loss <= 0 else -10 * math.log10(loss)


def stages_of(edges: Sequence[float], row: Sequence[str]) -> dict[str, str]:
    """The stages of a layer as a file has them: neighbours with one pattern are one."""
    found: list[tuple[float, float, str]] = []
    for first, end, name in zip(edges, edges[1:], row, strict=False):
        if found and found[-1][2] == name:
            found[-1] = (found[-1][0], end, name)
        else:
            found.append((first, end, name))
    return {f"{first:g}-{end:g}" if first or end < 1 else "0-": name for first, end, name in found}


def tuned(search: Search, found: Found) -> Tuned:
    """The file of what a search found."""
    measurer, goal = search.measurer, search.goal
    subject, plan, verified = measurer.subject, measurer.plan, found.verified
    layers = {str(i): stages_of(plan.edges, row) for i, row in enumerate(found.assignment)}
    dense = tuple((DENSE,) * plan.stages for _ in range(subject.layers))
    first = plan.seed + HELD_OUT
    # No quality without its dense twin, whatever the clock says.
    deadline, measurer.deadline = measurer.deadline, math.inf
    try:
        twin = measurer.outcome(dense, range(first, first + goal.held_out))
    finally:
        measurer.deadline = deadline
    finite = [value for value in verified.psnr if math.isfinite(value)]
    figures: dict[str, Any] = {
        "held": found.held,
        "samples": len(verified.psnr),
        f"{subject.measure}_mean": round(sum(finite) / len(finite), 2) if finite else None,
        f"{subject.measure}_worst": round(min(finite), 2) if finite else None,
        "attention_seconds": verified.attention_seconds,
        "attention_seconds_dense": twin.attention_seconds,
        "seconds": verified.seconds,
        "seconds_dense": twin.seconds,
    }
    if verified.lost:
        figures |= {"accuracy_lost": verified.lost_points, "accuracy_dense": verified.twin_accuracy}
    for name in ("ssim", "lpips"):
        values = getattr(verified, name)
        if values:
            figures[f"{name}_mean"] = round(sum(values) / len(values), 4)
            figures[f"{name}_worst"] = round((min if name == "ssim" else max)(values), 4)
    settings = {"goal": {k: v for k, v in vars(goal).items() if v is not None}, "subject": subject.about()}
    settings |= {"stages": plan.stages, "seeds": plan.seeds, "seed": plan.seed, "rank_correlation": found.ranks}
    return Tuned(
        subject.model,
        subject.layers,
        subject.grid,
        layers,
        parameters=subject.parameters,
        settings=settings,
        verified=figures,
    )
