"""How much of all pairs the pattern of a stage lists."""

from __future__ import annotations

from visattn.layout import Layout
from visattn.patterns import Dense, Pattern
from visattn.plans import density_of


def density(pattern: Pattern, grid: tuple[int, ...]) -> float | None:
    """Computed share of all pairs on a grid, an estimate where q and k choose; None if a pattern does not say."""
    return 1.0 if isinstance(pattern, Dense) else density_of(pattern, Layout(grid))
