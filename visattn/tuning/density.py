"""How much of all pairs the pattern of a stage lists."""

from __future__ import annotations

from visattn.layout import Layout
from visattn.patterns import Dense, ListedPattern, Pattern
from visattn.plans import plan


def density(pattern: Pattern, grid: tuple[int, ...]) -> float | None:
    """Visible share of all pairs on a grid, an estimate where q and k choose; None if a pattern does not say."""
    if isinstance(pattern, Dense):
        return 1.0
    return plan(pattern, Layout(grid)).density if isinstance(pattern, ListedPattern) else None
