"""Denoising steps: which one it is, of how many, and what is not known of them."""

from __future__ import annotations

import operator
from typing import Any

from visattn.given import said


def among_first(first: int | float, what: str, step: int | None, total: int | None) -> bool:
    """Whether a denoising step (from 0) of so many is among the first ones.

    Args:
        first: A count of steps or a fraction of them.
        what: What errors call it.
        step: Index of the step, None if unknown.
        total: Number of steps, None if unknown.

    Raises:
        ValueError: If the answer depends on something unknown.
    """
    at, number = known_step(what, step, total, isinstance(first, float))
    return at < (first if isinstance(first, int) else round(first * number))


def known_step(what: str, step: int | None, total: int | None, needs_total: bool) -> tuple[int, int]:
    """Step and number of steps, 0 for an unknown one that is not needed.

    Raises:
        ValueError: If `what`, as errors call it, needs what is unknown.
    """
    if step is None or (total is None and needs_total):
        missing = "the step" if step is None else "the number of steps"
        raise ValueError(
            f"{what} needs {missing}, and nothing tells it: apply to the pipeline instead of the model, before it "
            "runs, or call handle.set_step(i, n) before each forward"
        )
    return step, total or 0


def check_step(step: Any, total: Any) -> None:
    """Raise a ValueError for a step that is none, or not one of so many."""
    for name, value in (("step", step), ("total", total)):
        if value is not None and (isinstance(value, bool) or not _is_index(value)):
            raise ValueError(f"{name}={said(value)} must be a whole number, or None")
    if step is not None and (step < 0 or (total is not None and step >= total)):
        most = "" if total is None else f" and below the number of steps, total={total}"
        raise ValueError(f"step={step} must be at least 0{most}")


def _is_index(value: Any) -> bool:
    try:
        operator.index(value)
    except TypeError:
        return False
    return True
