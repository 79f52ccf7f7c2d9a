"""Another pattern for each head: told by the user, or measured while the model runs."""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar, NamedTuple

from visattn.patterns.base import Pattern
from visattn.patterns.dense import Dense
from visattn.patterns.kinds import ComposedPattern, ListedPattern
from visattn.patterns.text import parse
from visattn.patterns.values import drift_of, whole_number

HEADS = re.compile(r"(\d+)(?:(-)(\d*))?")


class Part(NamedTuple):
    """Heads and their pattern.

    Attributes:
        heads: As text: "3", "0-3" or "4-".
        pattern: The pattern.
    """

    heads: str
    pattern: Pattern

    def __str__(self) -> str:
        return f"{self.heads}: {self.pattern}"

    @property
    def span(self) -> tuple[int, int | None]:
        """First head and the one behind the last, None for all that follow."""
        match = HEADS.fullmatch(self.heads)
        assert match
        first = int(match[1])
        if not match[2]:
            return first, first + 1
        return first, int(match[3]) + 1 if match[3] else None


class HeadsPattern(ComposedPattern):
    """A composed pattern that is one listed pattern for each head."""

    @property
    def patterns(self) -> tuple[ListedPattern, ...]:
        """The patterns that heads may have."""
        raise NotImplementedError

    def check(self, grid: tuple[int, ...]) -> None:
        """Raise a ValueError if one of them is not defined on this grid."""
        for pattern in self.patterns:
            pattern.check(grid)

    def covers(self, grid: tuple[int, ...]) -> bool:
        """Whether all of them do."""
        return all(pattern.covers(grid) for pattern in self.patterns)

    @property
    def needs_steps(self) -> bool:
        """Whether one of them does."""
        return any(pattern.needs_steps for pattern in self.patterns)

    @property
    def remembers(self) -> bool:
        """Whether one of them does."""
        return self.needs_steps or any(pattern.remembers for pattern in self.patterns)

    @property
    def joins_heads(self) -> bool:
        """Whether heads of one of them choose together."""
        return any(pattern.joins_heads for pattern in self.patterns)

    def instead(self, grid: tuple[int, ...]) -> str:
        """Several patterns."""
        return "another list of tiles for each head: plan the patterns of its heads one by one"


def listed(value: object, where: str) -> ListedPattern:
    """A pattern of a head from a pattern or its text.

    Raises:
        ValueError: If it is none, or no list of tiles.
    """
    if not isinstance(value, str | Pattern):
        raise ValueError(f"{where}: {value!r} is no pattern: give one, or its text")
    pattern = parse(value)
    if not isinstance(pattern, ListedPattern):
        raise ValueError(f"{where}: {pattern} is a composition: give patterns that are lists of key tiles")
    if pattern.learnable:
        raise ValueError(f"{where}: {pattern} has parameters to train, which heads cannot have one by one")
    return pattern


@dataclass(frozen=True)
class PerHead(HeadsPattern):
    """The patterns of heads as they are told: `perhead(heads={0-3: dense, 4-: na(window=9x9)})`.

    Retrieval heads that see everything beside others with windows (DuoAttention), windows of different sizes (MoA),
    and tables that were searched for offline (MInference) have this form. Sources: Xiao et al., "DuoAttention" (2024),
    section 2; Fu et al., "MoA: Mixture of Sparse Attention" (2024), section 3.

    Attributes:
        heads: Pairs of heads and their pattern; a mapping too. Heads are "3", "0-3" or "4-", from 0.
        rest: The pattern of all other heads.

    Raises:
        ValueError: If heads are named twice, a pattern is no list of tiles, or nothing is named.
    """

    heads: tuple[Part, ...]
    rest: Pattern = field(default_factory=Dense)

    name: ClassVar[str] = "perhead"

    def __post_init__(self) -> None:
        given = self.heads.items() if isinstance(self.heads, Mapping) else self.heads
        if not isinstance(given, tuple | list) and not isinstance(self.heads, Mapping):
            raise ValueError(
                f"heads={self.heads!r} must map heads to patterns, like {{0-3: dense, 4-: na(window=7x7)}}"
            )
        parts = []
        for each in given:
            if not isinstance(each, tuple | list) or len(each) != 2:
                raise ValueError(f"heads: {each!r} is no pair of heads and a pattern")
            text = re.sub(r"\s+", "", str(each[0]))
            if not HEADS.fullmatch(text):
                raise ValueError(f"heads: {each[0]!r} must be one head like 3, or a range like 0-3 or 4-")
            parts.append(Part(text, listed(each[1], f"heads {text}")))
        if not parts:
            raise ValueError("heads={} names no head: give a pattern for some, like {0-3: dense}")
        parts.sort(key=lambda part: part.span[0])
        for one, next_one in itertools.pairwise(parts):
            last = one.span[1]
            if last is None or last > next_one.span[0]:
                raise ValueError(f"heads {one.heads} and {next_one.heads} overlap: give each head one pattern")
        for part in parts:
            first, last = part.span
            if last is not None and last <= first:
                raise ValueError(f"heads {part.heads} is empty: give the lower head first")
        object.__setattr__(self, "heads", tuple(parts))
        object.__setattr__(self, "rest", listed(self.rest, "rest"))

    @property
    def patterns(self) -> tuple[ListedPattern, ...]:
        """Those of the heads, and the rest's."""
        found = dict.fromkeys([*(part.pattern for part in self.heads), self.rest])
        return tuple(found)  # type: ignore[arg-type]

    def of_heads(self, number: int) -> list[ListedPattern]:
        """The pattern of each of so many heads.

        Raises:
            ValueError: If a head is named that is not there.
        """
        found = [self.rest] * number
        for part in self.heads:
            first, last = part.span
            if first >= number or (last is not None and last > number):
                raise ValueError(
                    f"heads {part.heads} of {self} are not among the {number} heads of the call: "
                    f"name some of 0 to {number - 1}"
                )
            last = number if last is None else last
            found[first:last] = [part.pattern] * (last - first)
        return found  # type: ignore[return-value]

    def among(self, number: int, heads: range) -> Pattern:
        """The pattern of some neighbouring heads of so many, as heads of a call of their own."""
        found = self.of_heads(number)[heads.start : heads.stop]
        if len(set(found)) == 1:
            return found[0]
        return PerHead(tuple(Part(str(i), pattern) for i, pattern in enumerate(found)))


@dataclass(frozen=True)
class Best(HeadsPattern):
    """Each head of each sample has the pattern whose output is nearest to dense attention on some of its queries.

    Source: Xi et al., "Sparse VideoGen: Accelerating Video Diffusion Transformers with Spatial-Temporal Sparsity"
    (ICML 2025), whose patterns are one of space and one of time. The queries are spread over all axes of the grid and
    compared by their mean square error; of equal patterns the first wins. Which heads have which pattern is decided on
    the host, so that a call waits for the device, and a CUDA graph cannot hold it.

    Attributes:
        of: The patterns, at least two: `best(of=[na(window=5x-1x-1), na(window=-1x9x9)])`.
        rows: How many queries are compared, at most.
        every: Denoising steps that a decision is kept for, as in `topk`.
        drift: As in `topk`, for means of 64 neighbouring tokens of the sequence.

    Raises:
        ValueError: If there are fewer than two patterns, one is no list of tiles, or a number is out of range.
    """

    of: tuple[Pattern, ...]
    rows: int = 64
    every: int = 1
    drift: float = 0.3

    name: ClassVar[str] = "best"

    def __post_init__(self) -> None:
        if not isinstance(self.of, tuple | list):
            raise ValueError(f"of={self.of!r} must be several patterns, like [na(window=5x-1x-1), na(window=-1x9x9)]")
        found = tuple(dict.fromkeys(listed(each, "of") for each in self.of))
        if len(found) < 2:
            raise ValueError(f"of has {len(found)} pattern{'s' * (len(found) != 1)}: give at least two to choose from")
        object.__setattr__(self, "of", found)
        for name in ("rows", "every"):
            object.__setattr__(self, name, whole_number(getattr(self, name), name, 1))
        object.__setattr__(self, "drift", drift_of(self.drift))

    @property
    def patterns(self) -> tuple[ListedPattern, ...]:
        """All of them."""
        return self.of  # type: ignore[return-value]

    @property
    def needs_steps(self) -> bool:
        """Whether a decision, or lists of one of the patterns, are kept from step to step."""
        return self.every > 1 or super().needs_steps
