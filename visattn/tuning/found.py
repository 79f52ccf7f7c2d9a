"""What a search found, and the file that comes of it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from visattn.tuned import Tuned
from visattn.tuning.goal import Goal
from visattn.tuning.measure import Measurer
from visattn.tuning.plan import stages_of
from visattn.tuning.subject import DENSE, Assignment, Outcome, everywhere


@dataclass
class Found:
    """What a search found.

    Attributes:
        assignment: The schedule.
        verified: Its outcome on held-out samples.
        held: Whether it does there what was asked for.
        seeds: Of these samples.
        tried: All schedules whose quality was measured, as JSON.
        ranks: How well injections predict others, and predictions whole schedules: rank correlations.
        complete: Whether the search ended by itself.
        missed: What is said where nothing does what was asked for.
    """

    assignment: Assignment
    verified: Outcome
    held: bool
    seeds: Sequence[int]
    tried: list[dict[str, Any]] = field(default_factory=list)
    ranks: dict[str, float | None] = field(default_factory=dict)
    complete: bool = True
    missed: str = ""


def tuned(measurer: Measurer, goal: Goal, found: Found) -> Tuned:
    """The file of what a search found."""
    subject, plan = measurer.subject, measurer.plan
    settings = {"goal": {k: v for k, v in vars(goal).items() if v is not None}, "subject": subject.about()}
    settings |= {"edges": plan.edges, "seeds": plan.seeds, "seed": plan.seed, "rank_correlation": found.ranks}
    return Tuned(
        subject.model,
        subject.layers,
        subject.grid,
        {str(i): stages_of(plan.edges, row) for i, row in enumerate(found.assignment)},
        parameters=subject.parameters,
        settings=settings,
        verified=_figures(measurer, found),
    )


def missed(goal: Goal, assignment: Assignment, tried: Sequence[dict[str, Any]], hopeless: bool) -> str:
    """Why only dense attention does what is asked for, in words; empty where something else does.

    Args:
        goal: What is asked for.
        assignment: What was found.
        tried: See `Found.tried`.
        hopeless: Whether no candidate is faster than dense attention in any layer.
    """
    if any(name != DENSE for row in assignment for name in row) or goal.speedup is not None:
        return ""
    if hopeless:
        return "no candidate is faster than dense attention here: tune with more tokens, or on another device"
    best = max((each["score"] for each in tried if each["score"] is not None), default=None)
    if goal.accuracy is not None:
        seen, other = f"loses {-(best or 0.0):.2f}", "a larger --accuracy"
    else:
        seen, other = f"has {best or 0.0:.1f} dB", "a lower --psnr"
    seen = "" if best is None else f" (the best that was measured {seen})"
    return (
        f"no schedule faster than dense {goal}{seen}: pass {other}, more --candidates (such as topk with a "
        "larger keep), or more --seeds"
    )


def _figures(measurer: Measurer, found: Found) -> dict[str, Any]:
    """What was verified, beside the dense twins of the same samples."""
    subject, verified = measurer.subject, found.verified
    # No quality without its dense twin.
    with measurer.unhurried():
        twin = measurer.outcome(everywhere(DENSE, subject.layers, measurer.plan.stages), found.seeds)
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
    return figures
