"""The search: measure, predict, walk ladders to the rung that holds, and verify it on samples it has never seen."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Sequence

from visattn.tuning import layers
from visattn.tuning.found import Found, missed
from visattn.tuning.goal import Goal
from visattn.tuning.injections import Injections
from visattn.tuning.measure import Measurer, OutOfTime
from visattn.tuning.overhead import excess, middle, overheads
from visattn.tuning.predict import choices
from visattn.tuning.sensitivity import rank_correlation
from visattn.tuning.solve import Choice, Rung, front, ladder, rung_of, uniform
from visattn.tuning.subject import DENSE, Outcome
from visattn.tuning.tries import CLOSE, Tries
from visattn.tuning.walk import first


class Search:
    """One search of a measurer for a goal."""

    def __init__(self, measurer: Measurer, goal: Goal) -> None:
        goal.check()
        self.measurer, self.goal = measurer, goal
        # By how many first stages are dense; rungs of what was tried.
        self.ladders: list[list[Rung]] = []
        # Schedules of one candidate for all that is not dense, likewise.
        self._uniform: list[list[Rung]] = []
        # What each layer and stage may have.
        self._units: list[list[Choice]] = []

    def run(self) -> Found:
        """Search; with the minutes over, the best that was seen is verified."""
        complete, ranks = True, None
        try:
            ranks = self.predict()
            rung = self._find()
        except OutOfTime:
            complete = False
            if not self.ladders:
                raise ValueError(
                    "the minutes were over before anything could be predicted: give more of them, and the search goes "
                    "on behind what it has measured"
                ) from None
            rung = self._best()
        for again in range(self.goal.rounds):
            seeds = self.measurer.plan.held_out(again, self.goal.held_out)
            verified = self._verify(rung, seeds)
            held = self.goal.score(verified) >= self.goal.least
            if held or not complete or rung == self._dense or again + 1 == self.goal.rounds:
                break
            self.tries.refuse(rung, seeds)
            try:
                rung = self._find()
            except OutOfTime:
                complete, rung = False, self._best()
        rows, assignment = self.tries.rows(), self.tries.assignment(rung)
        known = [(each["loss"], each["error"]) for each in rows if each["error"]]
        whole = rank_correlation([a for a, _ in known], [b for _, b in known])
        why = missed(self.goal, assignment, rows, all(len(rungs) == 1 for rungs in self.ladders))
        return Found(assignment, verified, held, seeds, rows, {"injections": ranks, "schedules": whole}, complete, why)

    def predict(self) -> float | None:
        """Measure layers and injections, which serve every goal, and make the ladders.

        Returns:
            The rank correlation of injections.

        Raises:
            OutOfTime: If the minutes are over.
        """
        measurer, stages = self.measurer, self.measurer.plan.stages
        local = layers.measured(measurer)
        injections = Injections(measurer, local)
        beyond = overheads(measurer, local)
        self._units = choices(measurer, local, injections, beyond, excess(measurer, local, injections))
        self.ladders, self._uniform = [], []
        for dense in range(stages):
            units = [u if i % stages >= dense else _dense_alone(u) for i, u in enumerate(self._units)]
            self.ladders.append(ladder(units))
            self._uniform.append(uniform(units))
        self.tries = Tries(measurer, self.goal, self._dense)
        # Whole runs of these are measured: what they are good for is known.
        known = set(middle(measurer, local)[1].values()) if beyond else set()
        for rung in self._uniform[0]:
            if known & set(rung.names):
                self.tries.measure(rung)
        return injections.ranks

    def _find(self) -> Rung:
        """The fastest schedule that does what is asked for: the first rung that does, on whichever ladder it is.

        The first steps decide what a sample shows. An error there turns some samples into others, which no mean
        predicts: schedules without any, whose first stages are dense, have ladders of their own. Nor do predictions see
        all: what has one candidate for all layers is tried beside them.
        """
        if self.goal.speedup is not None:
            within = [rung for rung in self.ladders[0] if rung.time <= self._dense.time / self.goal.speedup]
            return within[-1] if within else self.ladders[0][0]
        best = self._dense
        # With the first stage dense most has an answer.
        order = sorted(range(len(self.ladders)), key=lambda dense: abs(dense - 1))
        for dense in order:
            left = _faster(self.ladders[dense], best)
            # Where one ladder has an answer, another has a better one only if its last rung below holds.
            if left and (best is self._dense or self.tries.holds(left[-1])):
                best = first(self.tries, [*left, best])
        for dense in order:
            left = front(_faster(self._uniform[dense], best))
            if left and (dense == order[0] or self.tries.may_hold(left[-1])) and self.tries.holds(left[-1]):
                best = first(self.tries, left)
        return self._fastest(best, self.tries.holds)

    def _fastest(self, best: Rung, holds: Callable[[Rung], bool]) -> Rung:
        """A rung, or what was measured with one candidate for all, if that holds too and took less time."""
        for rung in itertools.chain(*self._uniform):
            if self.tries.held(rung) and self.tries.is_faster(rung, best) and holds(rung):
                best = rung
        return best

    def _best(self) -> Rung:
        """The fastest measured rung that held, in searches for other bounds too; dense where none did."""
        for assignment in self.measurer.known():
            rung = rung_of(self._units, tuple(itertools.chain(*assignment)))
            # What has to be measured on more samples is left out.
            with contextlib.suppress(OutOfTime):
                if rung is not None:
                    self.tries.measure(rung)
        good = [rung for rung in self.tries.rungs if self.tries.held(rung)]
        return self._fastest(min(good, key=lambda rung: rung.time, default=self._dense), self.tries.held)

    def _verify(self, rung: Rung, seeds: Sequence[int]) -> Outcome:
        self.measurer.tell("verifying", 0, 1)
        # Whatever the clock says: no quality is reported without them.
        with self.measurer.unhurried():
            found = self.measurer.outcome(self.tries.assignment(rung), seeds)
        self.measurer.tell("verifying", 1, 1)
        return found

    @property
    def _dense(self) -> Rung:
        """Dense attention, or what has as little error and takes less time: the end of all ladders."""
        return self.ladders[0][-1]


def _dense_alone(unit: Sequence[Choice]) -> list[Choice]:
    return [choice for choice in unit if choice.name == DENSE]


def _faster(rungs: Sequence[Rung], best: Rung) -> list[Rung]:
    """Rungs that are predicted to be faster than the best so far."""
    return [rung for rung in rungs if rung.time < best.time / (1 + CLOSE)]
