"""What runs for calls of attention that are alike, and how they count: decided once, then looked up."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, Literal, NamedTuple

import torch

from visattn.counts import Cell, Kind
from visattn.crossing import crossing, slower_in_8_bits
from visattn.dispatch import choose
from visattn.layout import Layout
from visattn.patterns import Pattern
from visattn.problem import Problem
from visattn.tally import Tally

# How a call is made. One that a CUDA graph captures is decided as its warm-up was, which made plans and kernels for it.
Mode = Literal["eager", "compiled"]
# Decisions kept for one kind of forward; each is a few hundred bytes.
MANY = 1024


class Verdict(NamedTuple):
    """What runs for a call, and how it counts.

    Attributes:
        kind: Whether it counts as sparse or dense.
        layouts: Where its tokens sit, of each sample where they differ; empty if the model's own attention runs.
        backend: Who runs the pattern.
        problems: What is counted, one for each layout.
        shapes: What dense calls have in common.
        why: Why the pattern does not run although it should, "" if nothing is wrong.
        slower: What the estimates are, if `auto` keeps the call dense.
        precision: What the pattern computes in, None for the dtype of the call.
        exact: What the estimates are, if that is so although the problems are posed in 8 bits.
    """

    kind: Kind
    layouts: tuple[Layout, ...] = ()
    backend: str = "auto"
    problems: tuple[Problem, ...] = ()
    shapes: Any = None
    why: str = ""
    slower: str = ""
    precision: str | None = None
    exact: str = ""

    def cells(self, tally: Tally, site: str, device: torch.device) -> tuple[Cell, ...]:
        """Where calls of a module count."""
        kept = bool(self.slower or self.exact)
        if not self.problems:
            return (tally.cell(site, self.kind, self.shapes, device, reason=self.why),)
        return tuple(tally.cell(site, self.kind, None, device, problem, kept=kept) for problem in self.problems)


def why_exact(problems: tuple[Problem, ...], backend: str, always: bool) -> str:
    """Why a call that is posed in 8 bits is computed in its own dtype, "" if it is not; arguments as of `judge`."""
    reasons = [slower_in_8_bits(problem) for problem in problems] if backend == "auto" and not always else [""]
    return reasons[0] if all(reasons) else ""


def judge(
    pattern: Pattern,
    problems: tuple[Problem, ...],
    layouts: tuple[Layout, ...],
    backend: str,
    always: bool,
    dense: bool = True,
) -> Verdict:
    """What runs for a call that can run its pattern.

    Args:
        pattern: The pattern.
        problems: What the call poses, one for each layout, all in one precision.
        layouts: Where its tokens sit, of each sample where they differ.
        backend: "auto" or the name of a backend.
        always: Whether the pattern runs also where dense attention is estimated to be faster, and in 8 bits also where
            the call's own dtype is.
        dense: Whether the model's own attention sees every pair; else it never stands for the pattern.
    """
    automatic, posed = backend == "auto" and dense, problems
    exact = why_exact(problems, backend, always)
    if exact:
        problems = tuple(replace(problem, precision=None) for problem in problems)
    precision = problems[0].precision
    if automatic and precision is None and all(pattern.covers(*layout.grids) for layout in layouts):
        # The model's own attention is the pattern.
        return Verdict("sparse", problems=posed, exact=exact)
    if automatic and not always:
        crossings = [crossing(problem) for problem in problems]
        slower = [found for found in crossings if found is not None and found.dense_pays_inside]
        if slower and len(slower) == len(problems):
            return Verdict("dense", problems=problems, slower=slower[0].reason)
    chosen = choose(problems[0], backend).name if len(problems) == 1 else backend
    return Verdict("sparse", layouts, chosen, posed, precision=precision, exact=exact)


@dataclass
class Ready:
    """A verdict that holds for every call with the same key.

    Attributes:
        verdict: That.
        plain: Whether nobody is told what the pattern chose, and it keeps nothing from step to step.
        cells: Where calls count, by module.
    """

    verdict: Verdict
    plain: bool
    cells: dict[str, tuple[Cell, ...]] = field(default_factory=dict)
