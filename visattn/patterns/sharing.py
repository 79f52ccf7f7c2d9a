"""Patterns that share attention between denoising steps: some compute it, the others take from the last of those."""

from __future__ import annotations

import dataclasses
import math
from abc import abstractmethod
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, ClassVar

from visattn.patterns.around import AroundPattern
from visattn.patterns.base import Pattern
from visattn.patterns.dense import Dense
from visattn.patterns.dynamic import DynamicPattern
from visattn.patterns.kinds import ListedPattern, reads_products
from visattn.patterns.values import drift_of, whole_number


class SharingPattern(AroundPattern):
    """A pattern whose calls in some steps *refresh*: they compute anew, and keep something that later steps *share*.

    What is kept is one tensor of the output's size for each call of a step: each module, and each half of guidance
    where halves have forwards of their own. It is for calls of the same module, half, run, grid, shape, dtype, scale
    and device alone, goes when no step needs it any more, and is never kept with gradients, inside of a CUDA graph, or
    for the last step: such calls refresh, all of them.

    Attributes:
        of: Another pattern.
        every: Denoising steps from one refresh to the next, at most.
        drift: How far the means of runs of 64 queries, keys or values may move, relative to their norm, before a call
            refreshes all the same; looking waits for the device. inf never looks.
    """

    every: int
    drift: float

    def put_in_form(self) -> str:
        """Check the parameters, and give them the form that equal patterns share. Returns what errors call `of`.

        Raises:
            ValueError: If `of` shares between steps itself, has parameters to train or keeps lists for other steps, or
                a number is out of range.
        """
        where = self.parse_of()
        if isinstance(self.of, SharingPattern):
            raise ValueError(f"{where} shares between steps already: give {self.of.of}, which it is around")
        if self.of.learnable:
            raise ValueError(
                f"{where} has parameters to train, and steps that share what was kept would train none: give a "
                "pattern without"
            )
        try:
            every = whole_number(self.every, "every", 2)
        except ValueError as error:
            raise ValueError(f"{error}, the steps that share what the first of them computes") from None
        object.__setattr__(self, "every", every)
        object.__setattr__(self, "drift", drift_of(self.drift))
        own = _kept_for(self.of)
        if own not in (1, every):
            raise ValueError(
                f"{where} keeps its choice for {own} steps and {self.name} for every={every}: leave every out of it, "
                "as what it chooses is kept until the next refresh"
            )
        if own > 1:
            given = {name: default for name, default in _parameters(self.of).items() if name in ("every", "drift")}
            object.__setattr__(self, "of", dataclasses.replace(self.of, **given))  # type: ignore[type-var]
        return where

    @cached_property
    def running(self) -> Pattern:
        """What runs of `of`: what it chooses in a refresh holds until the next one."""
        of: Any = self.of
        if not (isinstance(of, DynamicPattern) and "every" in _parameters(of)):
            return self.of
        return dataclasses.replace(of, every=self.every, drift=math.inf)  # type: ignore[type-var]

    @abstractmethod
    def mean(self, of: float, dense: float) -> float:
        """What a call takes on average, of what `of` and dense attention take: one refresh in `every` steps."""

    @property
    def needs_steps(self) -> bool:
        """Always."""
        return True

    @property
    def stepless(self) -> str:
        """The pattern inside."""
        return f"give {self.of}"

    @property
    def remembers(self) -> bool:
        """Always."""
        return True

    @property
    def of_products(self) -> bool:
        """Whether the pattern inside is made of the products of queries and keys."""
        return reads_products(self.of)

    @property
    def runs_lists(self) -> bool:
        """Whether the pattern inside does, so that it may be in 8 bits."""
        listed = isinstance(self.of, ListedPattern) and not isinstance(self.of, Dense)
        return listed or bool(getattr(self.of, "runs_lists", False))

    def instead(self, grid: tuple[int, ...]) -> str:
        """What other steps left, and the pattern inside."""
        return f"what an earlier step kept, and {self.of}: plan that"


@dataclass(frozen=True)
class Residual(SharingPattern):
    """Window attention with residual sharing: another pattern, and what it left of dense attention in an earlier step.

    A refresh computes dense attention and `of`, gives the dense output and keeps dense minus `of`; the every - 1 steps
    after it give `of` plus that difference. Source: Yuan et al., "DiTFastAttn: Attention Compression for Diffusion
    Transformer Models" (NeurIPS 2024), section 3.2, where `of` is a window.

    What `of` chooses by blocks (topk, topp, above) is chosen in a refresh and holds until the next one, as what is kept
    is the difference to those lists. In 8 bits `of` is, dense attention is not: the difference mends its rounding too.

    Attributes:
        of: The pattern of all steps: `residual(of=na(window=9x9))`.
        every: Denoising steps from one refresh to the next, at most.
        drift: How far means of queries, keys or values may move before a call refreshes all the same.

    Raises:
        ValueError: If `of` is dense, shares between steps itself, has parameters to train or keeps its choice for other
            steps, or a number is out of range.
    """

    of: Pattern
    every: int = 4
    drift: float = 0.3

    name: ClassVar[str] = "residual"

    def __post_init__(self) -> None:
        where = self.put_in_form()
        if isinstance(self.of, Dense):
            raise ValueError(
                f"{where} leaves nothing of dense attention: give a pattern that does, like na(window=9x9), or share "
                f"the output itself: broadcast(every={self.every})"
            )

    def covers(self, grid: tuple[int, ...]) -> bool:
        """Whether the pattern inside does: it leaves nothing then."""
        return self.of.covers(grid)

    def mean(self, of: float, dense: float) -> float:
        """`of` in all steps, dense attention in one of `every`."""
        return of + dense / self.every


@dataclass(frozen=True)
class Broadcast(SharingPattern):
    """Attention sharing across timesteps: the output of one step is that of the every - 1 steps after it.

    Sources: Zhao et al., "Real-Time Video Generation with Pyramid Attention Broadcast" (2024), section 3.2; Yuan et
    al., "DiTFastAttn" (NeurIPS 2024), section 3.3.

    Attributes:
        of: What a refresh computes, dense attention or another pattern.
        every: Denoising steps from one refresh to the next, at most.
        drift: How far means of queries, keys or values may move before a call refreshes all the same.

    Raises:
        ValueError: If `of` shares between steps itself, has parameters to train or keeps its choice for other steps, or
            a number is out of range.
    """

    of: Pattern = field(default_factory=Dense)
    every: int = 2
    drift: float = 0.3

    name: ClassVar[str] = "broadcast"

    def __post_init__(self) -> None:
        self.put_in_form()

    def mean(self, of: float, dense: float) -> float:
        """`of` in one of `every` steps."""
        return of / self.every


def _parameters(pattern: Pattern) -> dict[str, Any]:
    """The parameters of a pattern with what they are where nobody gives them."""
    return {f.name: f.default for f in dataclasses.fields(pattern)}  # type: ignore[arg-type]


def _kept_for(pattern: Pattern) -> int:
    """Steps that a pattern keeps its choice for."""
    return getattr(pattern, "every", 1)
