"""The walk over a ladder of schedules, from fast to good, to the first that does what is asked for."""

from __future__ import annotations

import bisect
import math
from collections.abc import Sequence

from visattn.tuning.solve import Rung
from visattn.tuning.tries import CLOSE, Tries, decibels

# Schedules that predictions choose before halves of what is left do, and by how many dB these go beyond the bound.
GUESSES, BEYOND = 5, 0.5


def first(tries: Tries, rungs: Sequence[Rung]) -> Rung:
    """The first rung that holds, of some of which the last does."""
    low, high = _bracket(tries, rungs)
    rounds = max(1, math.ceil(math.log2(high + 1)))
    done = 0
    while low < high and not (low and rungs[high].time <= rungs[low - 1].time * (1 + CLOSE)):
        tries.tell(min(done, rounds), rounds)
        # Predictions may be off all in one direction: then halves end it.
        rung = _guess(tries, rungs, low, high) if done < GUESSES else (low + high) // 2
        done += 1
        if tries.holds(rungs[rung]):
            high = rung
        else:
            low = rung + 1
    tries.tell(rounds, rounds)
    return rungs[high]


def _bracket(tries: Tries, rungs: Sequence[Rung]) -> tuple[int, int]:
    """The first rung that may hold, and the first that is known to: what was measured before counts."""
    scores = {i: tries.score(rung) for i, rung in enumerate(rungs)}
    known = {i: score for i, score in scores.items() if score is not None}
    high = min((i for i, score in known.items() if score >= tries.needed), default=len(rungs) - 1)
    return max((i + 1 for i, score in known.items() if i < high and score < tries.needed), default=0), high


def _guess(tries: Tries, rungs: Sequence[Rung], low: int, high: int) -> int:
    """The next rung to measure: with one end of what is left measured, the first that is predicted to hold.

    It goes a little beyond, to the side that is not measured. With both ends, or none, it is the middle in time.
    """
    seen = {i: tries.score(rungs[i]) for i in {low - 1, high} if i >= 0}
    offsets = [s - decibels(rungs[i].loss) for i, s in seen.items() if s is not None and math.isfinite(s)]
    times = [rung.time for rung in rungs[low:high]]
    middle = min(low + bisect.bisect(times, (times[0] + rungs[high].time) / 2), high - 1)
    if tries.goal.psnr is None or len(offsets) != 1:
        return middle
    # Of what holds the fastest is looked for: a guess that should just fail after one that held, and the reverse.
    beyond = BEYOND if seen.get(high) is None else -BEYOND
    needed = tries.needed + beyond - offsets[0]
    return next((i for i in range(low, high) if decibels(rungs[i].loss) >= needed), high - 1)
