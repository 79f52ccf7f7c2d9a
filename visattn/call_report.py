"""The calls of one attention module that posed the same problem: who ran them, and why."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from visattn.counts import Shared
from visattn.crossing import CLEAR, crossing, dense_cost
from visattn.dispatch import candidates, choose
from visattn.patterns import MergingPattern
from visattn.plans import density_of
from visattn.problem import Problem
from visattn.reached import Reached
from visattn.report_text import call_text


@dataclass(frozen=True)
class CallReport:
    """The calls of one module that posed the same problem.

    Attributes:
        problem: Shapes, pattern and layout.
        hits: How many calls.
        backend: Who ran them.
        why: Why that one.
        refused: Why each other one could not, by name.
        density: Visible share of all (query, key) pairs; None if the pattern does not say.
        reached: The same as it was, where q and k choose; `density` is its mean then.
        skipped: Mean share of all pairs that was listed and then passed over (`skip`), None where nothing can be.
        shared: How many calls computed anew, and what was kept for later steps, where the pattern shares between them.
        slower: Whether "auto" ran them although dense attention is estimated to be faster.
    """

    problem: Problem
    hits: int
    backend: str
    why: str
    refused: dict[str, str]
    density: float | None
    reached: Reached | None = None
    skipped: float | None = None
    shared: Shared | None = None
    slower: bool = False

    @classmethod
    def of(
        cls,
        problem: Problem,
        hits: int,
        backend: str,
        sums: torch.Tensor | None = None,
        skips: torch.Tensor | None = None,
        shared: Shared | None = None,
    ) -> CallReport:
        """Explain calls after the fact: the choice of a backend is a function of the problem."""
        if isinstance(problem.pattern, MergingPattern):
            return cls(problem, hits, problem.pattern.name, "the only one that merges tokens", {}, None)
        # A model's own attention stands for a pattern on plain tensors alone.
        plain = problem.precision is None and not problem.rpb
        if backend == "auto" and plain and problem.pattern.covers(*problem.layout.grids):
            return cls(problem, hits, "stock", "the pattern covers the whole grid", {}, 1.0)
        name = choose(problem, backend).name
        reached = None if sums is None else Reached.of(sums, problem.layout)
        share = density(problem) if reached is None else reached.mean
        skipped = None
        if skips is not None:
            skipped = float(skips[0] / skips[1]) * problem.layout.tokens**2 / problem.layout.length**2
        why, refused, slower = _why(problem, name, backend)
        return cls(problem, hits, name, why, refused, share, reached, skipped, shared, slower)

    def __str__(self) -> str:
        return call_text(self.to_dict())

    @property
    def reason(self) -> str:
        """Why that backend, and why no other."""
        return "; ".join([self.why, *(f"{name}: {reason}" for name, reason in self.refused.items())])

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers and texts."""
        layout = self.problem.layout
        return {
            "pattern": str(self.problem.pattern),
            "layout": str(layout),
            "grid": list(layout.grid),
            "prefix": layout.prefix,
            "suffix": layout.suffix,
            "batch": self.problem.batch,
            "heads": self.problem.heads,
            "head_dim": self.problem.head_dim,
            "hits": self.hits,
            "backend": self.backend,
            "precision": self.problem.precision,
            "reason": self.reason,
            "why": self.why,
            "refused": dict(self.refused),
            "density": self.density,
            "reached": None if self.reached is None else self.reached._asdict(),
            "skipped": self.skipped,
            "shared": None if self.shared is None else self.shared._asdict(),
            "slower": self.slower,
        }


def density(problem: Problem) -> float | None:
    """Visible share of all (query, key) pairs, None for a composed pattern that is no list of pairs."""
    return density_of(problem.pattern, problem.layout)


def why_kept(problem: Problem) -> str:
    """Why `auto` kept calls dense, in words."""
    found = crossing(problem)
    return "" if found is None else found.reason


def _why(problem: Problem, name: str, asked: str) -> tuple[str, dict[str, str], bool]:
    """Why a backend ran calls, why each other one could not, and whether dense attention would be faster."""
    if asked != "auto":
        return "asked for", {}, False
    why, refused, slower = "", {}, False
    dense = dense_cost(problem)
    for backend, support, cost in candidates(problem):
        if backend.name == name:
            found = crossing(problem)
            slower = cost > CLEAR * dense
            why = f"cheapest: {cost / dense:.2f} of dense (estimate)" + (f", {found}" if found else "")
            why += ", slower than dense attention" * slower
        elif not support.ok and not support.other:
            refused[backend.name] = support.reason
    return why, refused, slower
