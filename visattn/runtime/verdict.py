"""What runs for calls of attention that are alike, and how they count: decided once, then looked up."""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any, Literal, NamedTuple

import torch

from visattn.counts import Cell, Kind
from visattn.crossing import crossing, slower_in_8_bits
from visattn.dispatch import choose
from visattn.layout import Layout
from visattn.outdone import weighing
from visattn.patterns import DynamicPattern, Pattern
from visattn.problem import Problem
from visattn.tally import Tally

# How a call is made. One that a CUDA graph captures is decided as its warm-up was, which made plans and kernels for it.
Mode = Literal["eager", "compiled"]
# Lists are told apart by so many parts of the keys.
SHARES = 32
NOTHING = nullcontext()
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
        weighs: Whether lists that q and k make longer than expected may still be left to the model's own attention.
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
    weighs: bool = False

    def weighing(self) -> AbstractContextManager[None]:
        """Around a call that runs the pattern: engines that are about to run lists raise `Outdone` where those lose."""
        return weighing(self._outdone) if self.weighs else NOTHING

    def _outdone(self, layout: Layout, listed: float) -> bool:
        """Whether dense attention is faster where so large a share of the keys is visited."""
        found = next((_listing(problem, listed) for problem in self.problems if problem.layout == layout), None)
        estimated = None if found is None else crossing(found)
        return estimated is not None and estimated.dense_pays_inside

    def outdone(self, listed: float) -> Verdict:
        """What ran instead where it was; what was decided holds for later calls, whose lists may be shorter."""
        problems = tuple(_listing(problem, listed) for problem in self.problems)
        reasons = [found.reason for found in map(crossing, problems) if found is not None]
        return Verdict("dense", problems=problems, slower=reasons[0])

    def cells(self, tally: Tally, site: str, device: torch.device) -> tuple[Cell, ...]:
        """Where calls of a module count."""
        kept = bool(self.slower or self.exact)
        if not self.problems:
            return (tally.cell(site, self.kind, self.shapes, device, reason=self.why),)
        return tuple(tally.cell(site, self.kind, None, device, problem, kept=kept) for problem in self.problems)


def _listing(problem: Problem, listed: float) -> Problem:
    """A problem whose lists are known to visit a share of the keys, which is rounded so that problems stay few."""
    return replace(problem, listed=math.ceil(listed * SHARES) / SHARES)


def why_exact(problems: tuple[Problem, ...], backend: str, always: bool) -> str:
    """Why a call that is posed in 8 bits is computed in its own dtype, "" if it is not; arguments as of `judge`."""
    reasons = [slower_in_8_bits(problem) for problem in problems] if backend == "auto" and not always else [""]
    return reasons[0] if all(reasons) else ""


def weighs(problems: tuple[Problem, ...], backend: str, always: bool) -> bool:
    """Whether lists are weighed against dense attention once more when they have been made; arguments as of `judge`.

    On a GPU its host would have to wait for them.
    """
    if backend != "auto" or always or any(problem.device != "cpu" for problem in problems):
        return False
    return all(isinstance(problem.pattern, DynamicPattern) and crossing(problem) is not None for problem in problems)


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
    again = dense and precision is None and weighs(problems, backend, always)
    return Verdict("sparse", layouts, chosen, posed, precision=precision, exact=exact, weighs=again)


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
