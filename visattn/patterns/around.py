"""What patterns around another one have in common."""

from __future__ import annotations

from visattn.patterns.base import Pattern
from visattn.patterns.kinds import ComposedPattern, MergingPattern, StaticPattern
from visattn.patterns.text import parse


class AroundPattern(ComposedPattern):
    """A composed pattern that runs the attention of another one, whatever kind that is.

    Attributes:
        of: The other pattern.
    """

    of: Pattern

    def parse_of(self) -> str:
        """Parse `of` where it is a text; for `__post_init__`. Returns what errors call it.

        Raises:
            ValueError: If it merges tokens.
        """
        pattern = parse(self.of)
        where = f"of={pattern} of {self.name}"
        if isinstance(pattern, MergingPattern):
            raise ValueError(f"{where} merges tokens before they become queries and keys: give another pattern")
        object.__setattr__(self, "of", pattern)
        return where

    @property
    def inner(self) -> StaticPattern | None:
        """The pattern inside where the grid alone decides it, or what that is composed around."""
        if isinstance(self.of, ComposedPattern):
            return self.of.inner
        return self.of if isinstance(self.of, StaticPattern) else None

    @property
    def needs_steps(self) -> bool:
        """Whether the pattern inside does."""
        return self.of.needs_steps

    @property
    def stepless(self) -> str:
        """As of the pattern inside."""
        return self.of.stepless

    @property
    def remembers(self) -> bool:
        """Whether the pattern inside does."""
        return self.of.remembers

    @property
    def joins_heads(self) -> bool:
        """Whether the pattern inside does."""
        return self.of.joins_heads

    @property
    def needs_weights(self) -> bool:
        """Whether the pattern inside does."""
        return self.of.needs_weights

    def check(self, grid: tuple[int, ...]) -> None:
        """Raise a ValueError if the pattern inside is not defined on this grid."""
        self.of.check(grid)
