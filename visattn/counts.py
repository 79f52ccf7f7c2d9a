"""What is counted of the calls of one attention module: by kind of call, and in all."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable
from dataclasses import dataclass, field, replace
from typing import Literal, NamedTuple

import torch

from visattn.problem import Problem

Kind = Literal["sparse", "dense"]


class Shared(NamedTuple):
    """What calls did whose pattern shares between denoising steps.

    Attributes:
        refreshed: How many computed their output anew.
        nbytes: What was kept for later calls, of the call that kept most.
    """

    refreshed: int = 0
    nbytes: int = 0

    def add(self, refreshed: int, nbytes: int) -> Shared:
        """With further calls."""
        return Shared(self.refreshed + refreshed, max(self.nbytes, nbytes))


class Cell:
    """Calls of one module that are alike: same outcome, same shapes.

    Attributes:
        kind: Whether they count as sparse or dense.
        key: What they have in common, shared by all modules at which it happens.
        problem: What ran or was kept dense, None for calls that are dense anyway or fell back.
        reason: Why the pattern did not run, "" if it ran or a schedule keeps the call dense.
        kept: Whether `auto` kept them dense, where the pattern would take longer; of those that ran it, whether it
            computed them in their own dtype although `problem` has 8 bits.
        turn: How many modules had such calls before: 0 where the first of them is the first of its kind in the model.
        on_gpu: Whether only some are timed.
        calls: How many.
        timed: How many steady ones were timed.
        seconds: Time of those.
        first_seconds: Time of the first call, 0 if it was none or was not timed.
        reached: Listed shares of grid pairs, where q and k choose: sum, number, least and largest, on their device.
        skipped: The same of what was listed and then passed over, None where nothing can be.
        choosing: Time in which the timed calls chose what they list, the first one's and that of the others.
        shared: What they did where their pattern shares between steps, None for others.
    """

    __slots__ = (
        "calls", "choosing", "first_seconds", "kept", "key", "kind", "on_gpu", "problem", "reached", "reason",
        "seconds", "shared", "skipped", "timed", "turn",
    )  # fmt: skip

    def __init__(
        self, kind: Kind, key: Hashable, problem: Problem | None, reason: str, kept: bool, turn: int, on_gpu: bool
    ) -> None:
        self.kind: Kind = kind
        self.key, self.problem, self.reason, self.kept = key, problem, reason, kept
        self.turn, self.on_gpu = turn, on_gpu
        self.calls = self.timed = 0
        self.seconds = self.first_seconds = 0.0
        self.choosing = {True: 0.0, False: 0.0}
        self.reached: torch.Tensor | None = None
        self.skipped: torch.Tensor | None = None
        self.shared: Shared | None = None

    def add(self, seconds: float, is_first: bool) -> None:
        """Add the time of a call."""
        if is_first:
            self.first_seconds += seconds
        else:
            self.timed += 1
            self.seconds += seconds


@dataclass
class Row:
    """The counts of one attention module.

    Attributes:
        hits: Calls that ran the pattern, by problem.
        dense: Calls that a schedule or `auto` kept dense.
        kept: Those of them that `auto` did, by problem.
        exact: Calls among `hits` that `auto` computed in their own dtype instead of 8 bits, by the problem in 8 bits.
        fallbacks: Calls that could not run the pattern, by reason.
        seconds: Estimated time of all calls by kind, first ones as if they were steady; fallbacks count as dense.
        first_seconds: Time of first calls by kind.
        timed: How many steady calls that estimate is from.
        calls: All calls.
        reached: Listed shares of grid pairs by problem, as in `Cell`.
        skipped: Likewise.
        choosing_seconds: Estimated time of all calls in which they chose what they list, a part of `seconds`.
        shared: What calls did whose pattern shares between steps, by problem.
    """

    hits: Counter[Problem] = field(default_factory=Counter)
    dense: int = 0
    kept: Counter[Problem] = field(default_factory=Counter)
    exact: Counter[Problem] = field(default_factory=Counter)
    fallbacks: Counter[str] = field(default_factory=Counter)
    seconds: dict[str, float] = field(default_factory=lambda: {"sparse": 0.0, "dense": 0.0})
    first_seconds: float = 0.0
    timed: int = 0
    calls: int = 0
    reached: dict[Problem, torch.Tensor] = field(default_factory=dict)
    skipped: dict[Problem, torch.Tensor] = field(default_factory=dict)
    choosing_seconds: float = 0.0
    shared: dict[Problem, Shared] = field(default_factory=dict)

    def add(self, cell: Cell, mean: float | None, choosing: float | None) -> None:
        """Add the calls of a cell.

        Args:
            cell: The cell.
            mean: Time of a steady call of its kind, None if none was timed.
            choosing: What of it is choosing.
        """
        ran = cell.problem
        if cell.kept:
            assert cell.problem is not None
            (self.kept if cell.kind == "dense" else self.exact)[cell.problem] += cell.calls
            ran = replace(cell.problem, precision=None)
        if cell.reason:
            self.fallbacks[cell.reason] += cell.calls
        elif cell.kind == "dense":
            self.dense += cell.calls
        elif ran is not None:
            self.hits[ran] += cell.calls
            if cell.reached is not None:
                self.reached[ran] = joined(self.reached.get(ran), cell.reached)
            if cell.skipped is not None:
                self.skipped[ran] = joined(self.skipped.get(ran), cell.skipped)
            if cell.shared is not None:
                self.shared[ran] = self.shared.get(ran, Shared()).add(*cell.shared)
        own = cell.seconds / cell.timed if cell.timed else mean
        untimed = cell.first_seconds if own is None else own * (cell.calls - cell.timed)
        self.seconds[cell.kind] += cell.seconds + untimed
        own = cell.choosing[False] / cell.timed if cell.timed else choosing
        untimed = cell.choosing[True] if own is None else own * (cell.calls - cell.timed)
        self.choosing_seconds += cell.choosing[False] + untimed
        self.first_seconds += cell.first_seconds
        self.timed += cell.timed
        self.calls += cell.calls


def joined(known: torch.Tensor | None, new: torch.Tensor) -> torch.Tensor:
    """Sum, number, least and largest of two sets of shares."""
    if known is None:
        return new
    return torch.stack([*(known[:2] + new[:2]), torch.minimum(known[2], new[2]), torch.maximum(known[3], new[3])])
