"""How much of a search is measured, so that it ends in the time that is given."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator

from visattn.tuning.measure import Measurer, OutOfTime, Plan
from visattn.tuning.subject import DENSE

# Schedules that a search measures before it finds the one to verify.
SCHEDULES = 5
# Runs of a candidate in a layer for its error and its time, in dense calls; share of the candidates that stay for
# stages other than the middle one.
RUNS, STAY = 2.0, 0.5
# Candidates that all stay.
MANY = 10


def fitted(measurer: Measurer, seconds: float, held_out: int) -> Plan:
    """The plan, or one with fewer injections and candidates that is estimated to end in time.

    Args:
        measurer: Measures, or knows, how long dense samples take.
        seconds: For the whole search.
        held_out: Samples that verify.

    Raises:
        ValueError: If the time was over when the model was ready, before any sample.
    """
    plan = measurer.plan
    try:
        # In the journal, so that a search that goes on has the same plan.
        sample = measurer.journal.get(["sample", plan.quick], lambda: _sample(measurer))
    except OutOfTime:
        raise ValueError(f"{seconds / 60:g} minutes were over before a dense sample was drawn: give more") from None
    smaller = plan
    for smaller in _smaller(plan):
        if estimated(smaller, sample, measurer.subject.steps, held_out) <= seconds:
            break
    return smaller


def _sample(measurer: Measurer) -> float:
    """Seconds of a dense sample, the first time that it runs: what is known of it would be played."""
    start = time.perf_counter()
    measurer.quality(((DENSE,) * measurer.plan.stages,) * measurer.subject.layers)
    return (time.perf_counter() - start) / measurer.plan.quick


def estimated(plan: Plan, sample: float, steps: int, held_out: int) -> float:
    """Seconds of a search.

    Args:
        plan: What is measured.
        sample: Seconds of a dense sample.
        steps: Denoising steps.
        held_out: Samples that verify.
    """
    quick = plan.quick * sample
    # An injection runs from its stage on, and they are in all stages alike.
    share = (plan.stages + 1) / (2 * plan.stages)
    injections = (plan.groups * plan.probes + 1) * plan.stages + plan.checks
    candidates = len(plan.candidates) * RUNS * (1 + STAY * (plan.stages - 1)) / steps
    whole = SCHEDULES * plan.seeds + 2 * held_out + plan.seeds
    return quick * (injections * share + candidates) + sample * whole


def _smaller(plan: Plan) -> Iterator[Plan]:
    """Plans with ever less to measure."""
    yield plan
    plan = dataclasses.replace(plan, checks=min(plan.checks, 4), probes=1)
    yield plan
    for groups in (6, 4, 2):
        plan = dataclasses.replace(plan, groups=min(plan.groups, groups))
        yield plan
        # Neighbours of a long list are alike but for how much they keep.
        if len(plan.candidates) > MANY:
            plan = dataclasses.replace(plan, candidates=plan.candidates[:1] + plan.candidates[2::2])
            yield plan
