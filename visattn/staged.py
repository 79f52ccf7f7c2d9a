"""Patterns that follow each other over the denoising steps of a run."""

from __future__ import annotations

import functools
import itertools
import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from visattn.patterns import Dense, ListedPattern, MergingPattern, Pattern, parse
from visattn.problem import PRECISIONS
from visattn.scaling import scaled

_WHOLE = re.compile(r"(\d+)(?:(-)(\d*))?")
_IN = re.compile(rf"(.+?)\s+in\s+({'|'.join(PRECISIONS)})\s*")
_SHARE = re.compile(r"([01]?\.\d+|[01])\s*-\s*([01]?\.\d+|[01])?")


class Stage(NamedTuple):
    """Some steps of a run and their pattern.

    Attributes:
        first: The first step, a count from 0, or a share of the run.
        end: The step behind the last, likewise; None for the end of the run.
        pattern: The pattern.
        precision: What its products are computed in, as in `visattn.attention`; None for the model's own dtype.
    """

    first: int | float
    end: int | float | None
    pattern: Pattern
    precision: str | None = None

    @classmethod
    def of(cls, steps: Any, pattern: Pattern | str) -> Stage:
        """From a text: "3", "0-3" (with step 3) and "4-" count, "0.25-0.5" and "0.5-" are shares of the run.

        Raises:
            ValueError: If it is no such text, or the pattern is not one that steps may have one by one, or in 8 bits.
        """
        made, precision = with_precision(pattern)
        if made.learnable or made.needs_weights or isinstance(made, MergingPattern):
            raise ValueError(f"steps {steps!r}: {made} must be the pattern of all steps: leave the steps away")
        text = str(steps).strip()
        found = re.fullmatch(_WHOLE, text)
        if found:
            first = int(found[1])
            last = first if not found[2] else int(found[3]) if found[3] else None
            stage = cls(first, None if last is None else last + 1, made, precision)
        elif found := re.fullmatch(_SHARE, text):
            stage = cls(float(found[1]), None if found[2] is None else float(found[2]), made, precision)
        else:
            raise ValueError(
                f"steps {steps!r} must be counts like 0-3 or 4-, or shares of the run like 0.25-0.5 or 0.5-"
            )
        if stage.end is not None and not stage.first < stage.end <= (1 if stage.shares else stage.end):
            raise ValueError(f"steps {steps!r} are none: the end must be behind the beginning, and a share at most 1")
        return stage

    @property
    def shares(self) -> bool:
        """Whether its steps are shares of the run."""
        return isinstance(self.first, float)

    @property
    def steps(self) -> str:
        """Its steps as text."""
        if self.shares:
            return f"{self.first:g}-{'' if self.end is None else f'{self.end:g}'}"
        last = "" if self.end is None else int(self.end) - 1
        return f"{self.first}" if last == self.first else f"{self.first}-{last}"

    @property
    def text(self) -> str:
        """Its pattern and precision as text."""
        return str(self.pattern) if self.precision is None else f"{self.pattern} in {self.precision}"

    def has(self, step: int, total: int | None) -> bool:
        """Whether a step of so many is one of its steps."""
        if not self.shares:
            return self.first <= step and (self.end is None or step < self.end)
        assert total is not None
        return round(self.first * total) <= step and (self.end is None or step < round(self.end * total))


class Span(NamedTuple):
    """Grids and numbers of steps that something is for.

    Attributes:
        low: Fewest tokens on each axis.
        high: Most tokens on each axis.
        steps: Fewest and most denoising steps.
    """

    low: tuple[int, ...]
    high: tuple[int, ...]
    steps: tuple[int, int]

    def has_grid(self, grid: tuple[int, ...]) -> bool:
        """Whether a grid is in it."""
        rows = zip(self.low, grid, self.high, strict=False)
        return len(grid) == len(self.low) and all(low <= n <= high for low, n, high in rows)

    def has(self, grid: tuple[int, ...], total: int | None) -> bool:
        """Whether a run of so many steps on a grid is in it."""
        return total is not None and self.steps[0] <= total <= self.steps[1] and self.has_grid(grid)

    def covers(self, other: Span) -> bool:
        """Whether all of another span is in it."""
        return all(self.has(grid, steps) for grid in (other.low, other.high) for steps in other.steps)

    def __str__(self) -> str:
        grids = dict.fromkeys("x".join(map(str, grid)) for grid in (self.low, self.high))
        steps = " to ".join(map(str, dict.fromkeys(self.steps)))
        return f"grid{'s' * (len(grids) > 1)} {' to '.join(grids)} with {steps} steps"


@dataclass(frozen=True)
class Staged:
    """Patterns of a layer by denoising step; steps that none names stay dense.

    Attributes:
        stages: In the order of the steps, none of them twice; a single one from 0 without an end is of all steps.
        grid: Tokens per axis that windows, blocks and radii are for: on other grids they are scaled. None if they are
            meant as they are.
        scales: Smallest and largest factor on an axis of that grid for which they are meant, where there is one.
        span: The runs that it is for, where others have `otherwise`; None for all.
        otherwise: What other runs have.
        label: What reports say of runs that have it, "" for nothing.
    """

    stages: tuple[Stage, ...]
    grid: tuple[int, ...] | None = None
    scales: tuple[float, float] = (0.0, float("inf"))
    span: Span | None = None
    otherwise: Staged | None = None
    label: str = ""

    @classmethod
    def of(
        cls,
        given: Pattern | str | Mapping[Any, Any],
        grid: tuple[int, ...] | None = None,
        scales: tuple[float, float] = (0.0, float("inf")),
    ) -> Staged:
        """From a pattern of all steps, or a mapping from steps to patterns, see `Stage.of`.

        Raises:
            ValueError: If steps are named twice, or some are counted and others shares.
        """
        if not isinstance(given, Mapping):
            return cls((Stage(0, None, *with_precision(given)),), grid, scales)
        if not given:
            raise ValueError("a layer's {} names no steps: pass e.g. {'0-3': 'dense', '4-': 'na(window=7x7)'}")
        stages = sorted((Stage.of(steps, pattern) for steps, pattern in given.items()), key=lambda stage: stage.first)
        if len({stage.shares for stage in stages}) > 1:
            raise ValueError(f"steps {', '.join(s.steps for s in stages)} must all be counts or all shares of the run")
        for one, next_ in itertools.pairwise(stages):
            if one.end is None or one.end > next_.first:
                raise ValueError(f"steps {one.steps} and {next_.steps} overlap: give every step one pattern")
        return cls(tuple(stages), grid, scales)

    @property
    def constant(self) -> bool:
        """Whether all steps have one pattern."""
        return self.otherwise is None and self.whole

    @property
    def whole(self) -> bool:
        """Whether it has one stage alone, which is of all steps."""
        return len(self.stages) == 1 and not self.stages[0].first and self.stages[0].end is None

    @functools.cached_property
    def choices(self) -> tuple[Staged, ...]:
        """Itself and what other runs have, in the order in which they are asked."""
        return (self,) if self.otherwise is None else (self, *self.otherwise.choices)

    def choice(self, total: int | None, grid: tuple[int, ...]) -> int:
        """Which of `choices` a run of so many steps on a grid has."""
        if self.otherwise is None:
            return 0
        last = len(self.choices) - 1
        spans = (each.span for each in self.choices[:-1])
        return next((i for i, span in enumerate(spans) if span is None or span.has(grid, total)), last)

    def on(self, total: int | None, grid: tuple[int, ...]) -> Staged:
        """What a run of so many steps on a grid has: one of `choices`."""
        return self if self.otherwise is None else self.choices[self.choice(total, grid)]

    @property
    def patterns(self) -> tuple[Pattern, ...]:
        """The patterns of its stages and of what other runs have, each once."""
        return tuple(dict.fromkeys(stage.pattern for each in self.choices for stage in each.stages))

    @property
    def precision(self) -> str | None:
        """The first precision of its stages or of what other runs have, None if all compute in the model's dtype."""
        return next((stage.precision for each in self.choices for stage in each.stages if stage.precision), None)

    def index(self, step: int | None, total: int | None) -> int:
        """Which of its own stages a step of so many is in, -1 for none."""
        if self.whole:
            return 0
        assert step is not None
        return next((i for i, stage in enumerate(self.stages) if stage.has(step, total)), -1)

    def at(self, step: int | None, total: int | None, grid: tuple[int, ...]) -> Pattern:
        """The pattern of a step of so many on a grid."""
        found = self.on(total, grid)
        return found.pattern(found.index(step, total), grid)

    def pattern(self, index: int, grid: tuple[int, ...]) -> Pattern:
        """The pattern of one of its own stages on a grid; that of none is dense."""
        if index < 0:
            return Dense()
        found = self.stages[index].pattern
        if self.grid is not None and not self.fits(grid):
            warnings.warn(
                f"grid {'x'.join(map(str, grid))} is far from {'x'.join(map(str, self.grid))}, for which this schedule "
                "was tuned: its patterns are scaled, and their quality is unknown there",
                stacklevel=2,
            )
        return found if self.grid is None or self.grid == grid else scaled(found, self.grid, grid)

    def fits(self, grid: tuple[int, ...]) -> bool:
        """Whether a grid is one that its patterns are meant for."""
        if self.grid is None:
            return True
        low, high = self.scales
        return len(grid) == len(self.grid) and all(low <= m / n <= high for n, m in zip(self.grid, grid, strict=True))

    def __str__(self) -> str:
        text = f"{{{', '.join(f'{stage.steps}: {stage.text}' for stage in self.stages)}}}"
        text = self.stages[0].text if self.whole else text
        return text if self.otherwise is None else f"{text} on {self.span}, else {self.otherwise}"


def lists_tiles(pattern: Pattern) -> bool:
    """Whether a pattern, or what it is built around, runs along lists of key tiles, which 8 bits are for."""
    return isinstance(pattern, ListedPattern) or getattr(pattern, "runs_lists", False)


def with_precision(text: Pattern | str) -> tuple[Pattern, str | None]:
    """A pattern, and what a text like "topk(keep=0.2) in fp8" says that it is computed in.

    Raises:
        ValueError: If it is no pattern, or one that 8 bits are not for.
    """
    found = re.fullmatch(_IN, text.strip()) if isinstance(text, str) else None
    pattern = parse(text if found is None else found[1])
    if found is not None and (isinstance(pattern, Dense) or not lists_tiles(pattern)):
        raise ValueError(
            f"{text}: 8 bits are for patterns that list key tiles, which {pattern} does not; dense attention in 8 bits "
            "is a window of the whole grid"
        )
    return pattern, None if found is None else found[2]
