"""What is known about one forward of a model, and where each thread is in it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import torch

from visattn.layout import Layout
from visattn.patterns import Pattern
from visattn.patterns.choice.memory import Memory
from visattn.runtime.rest import Rest, Rested
from visattn.runtime.verdict import Ready, Verdict
from visattn.staged import Staged


class Where(Protocol):
    """Where the tokens of one forward sit."""

    @property
    def grid(self) -> tuple[int, ...]:
        """Tokens per axis at full resolution."""
        ...

    def layouts(self, length: int) -> tuple[Layout, ...] | str:
        """The layout of a sequence of `length` tokens, of each sample where they differ, or why there is none."""
        ...


@dataclass
class Forward:
    """One forward of the model.

    Attributes:
        where: Where its tokens sit.
        dense: Whether the schedule keeps its step dense.
        precise: Whether the schedule keeps its step in the model's own dtype.
        step: Index of the denoising step, None where nothing depends on it.
        total: Number of steps, None if unknown.
        hits: Modules that ran their pattern, in compiled code the same name again and again.
        reasons: Why others did not.
        excused: Modules that a pattern leaves as they are on purpose.
        resting: Modules whose pattern of this step is dense.
        kept: How many calls of compiled code, which does not tell its modules, `auto` kept dense.
        resolved: Layouts of sequence lengths, resolved once.
        ready: What was decided for calls in forwards like this one, by what they have in common.
        rests: Modules that were left to the model's own code in forwards like this one, by path.
        learns: Whether blocks of it may be recomputed for gradients.
        chosen: Patterns of this step and grid, by the identity of what they were chosen from.
    """

    where: Where
    dense: bool
    step: int | None = None
    total: int | None = None
    hits: list[str] = field(default_factory=list)
    reasons: dict[str, str] = field(default_factory=dict)
    excused: set[str] = field(default_factory=set)
    resting: set[str] = field(default_factory=set)
    kept: int = 0
    resolved: dict[int, tuple[Layout, ...] | str] = field(default_factory=dict)
    ready: dict[Hashable, Ready] = field(default_factory=dict)
    rests: dict[str, Rest] = field(default_factory=dict)
    learns: bool = True
    precise: bool = False
    chosen: dict[int, Pattern] = field(default_factory=dict)

    def pattern(self, staged: Staged) -> Pattern:
        """The pattern of this step and grid."""
        found = self.chosen.get(id(staged))
        if found is None:
            self.chosen[id(staged)] = found = staged.at(self.step, self.total, self.where.grid)
        return found

    def precision(self, staged: Staged) -> str | None:
        """What the pattern of this step is computed in."""
        found = staged.on(self.total, self.where.grid)
        index = found.index(self.step, self.total)
        return None if index < 0 else found.stages[index].precision

    def layouts(self, length: int) -> tuple[Layout, ...] | str:
        """The layout of a sequence of `length` tokens, of each sample where they differ, or why there is none."""
        if length not in self.resolved:
            self.resolved[length] = self.where.layouts(length)
        return self.resolved[length]

    def note(self, name: str, verdict: Verdict, anonymous: bool = False, staged: bool = False) -> None:
        """Remember what happened at a module.

        Args:
            name: Its path, or what stands for modules of compiled code.
            verdict: What ran.
            anonymous: Whether it is the latter.
            staged: Whether the module has patterns by step.
        """
        if verdict.slower:
            self.reasons[name] = verdict.slower
            self.excused.add(name)
            self.kept += anonymous
        elif verdict.kind == "dense" and not verdict.why and staged:
            self.resting.add(name)
            self.kept += anonymous
        elif verdict.kind == "sparse":
            self.hits.append(name)
        elif verdict.why:
            self.reasons.setdefault(name, verdict.why)


class Here(threading.local):
    """Where a thread is.

    Attributes:
        forward: The forward.
        site: The attention module.
        told: The module that a call of compiled code told, by which alone patterns keep what they keep there.
        merged: What a merging group has made of its tokens, None where it leaves them.
        kept: Why it leaves them, see `merging`.
        memory: What patterns keep from step to step; None where no forward began that may keep anything.
        perturbed: What stands for modules in the perturbed forward that it is in; None in a plain one.
        rested: What the call was that a processor made; None before it made one, False if that was no such call.
    """

    forward: Forward | None = None
    site: str | None = None
    told: str | None = None
    merged: Any = None
    kept: str = ""
    memory: Memory | None = None
    rested: Rested | Literal[False] | None = None
    perturbed: Mapping[str, Callable[[Any, str], torch.Tensor]] | None = None

    def stand_in(self, call: Any, site: str | None) -> torch.Tensor | None:
        """What a perturbed forward has in place of a module's attention, None where it is as ever.

        Args:
            call: The call.
            site: Path of the module.

        Raises:
            ValueError: If nothing tells at which module.
        """
        modules = self.perturbed
        if modules is None:
            return None
        if site is None:
            raise ValueError("guide: compiled code does not tell its attention modules: guide the model uncompiled")
        if site not in modules:
            return None
        # What stands for a module may call it.
        self.perturbed = None
        try:
            return modules[site](call, site)
        finally:
            self.perturbed = modules
