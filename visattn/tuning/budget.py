"""How much of a search is measured, so that it ends in the time that is given."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

from visattn.tuning.measure import Measurer, OutOfTime
from visattn.tuning.plan import Plan

# Schedules that a search measures before it finds the one to verify, beside one of a single candidate for each stage.
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
    smaller = plan = measurer.plan
    try:
        sample = measurer.sample_seconds()
    except OutOfTime:
        raise ValueError(
            f"{seconds / 60:g} minutes were over before a dense sample was drawn: give more of them"
        ) from None
    for smaller in _smaller(plan):
        if estimated(smaller, sample, measurer.subject.steps, held_out) <= seconds:
            break
    return smaller


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
    whole = (SCHEDULES + plan.stages) * plan.seeds + 2 * held_out + plan.seeds
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
