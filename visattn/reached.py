"""The density that choices of a pattern reach."""

from __future__ import annotations

from typing import NamedTuple

import torch

from visattn.layout import Layout


class Reached(NamedTuple):
    """Density of calls whose pattern lists what q and k choose, over heads, samples and calls.

    Attributes:
        mean: Of all.
        least: The smallest.
        most: The largest.
    """

    mean: float
    least: float
    most: float

    @classmethod
    def of(cls, sums: torch.Tensor, layout: Layout) -> Reached:
        """From sum, number, least and largest of shares of grid pairs; pairs with a dense token are all listed."""
        total, number, least, most = sums.tolist()
        grid, every = layout.tokens**2, layout.length**2
        mean, least, most = ((share * grid + every - grid) / every for share in (total / number, least, most))
        return cls(mean, least, most)
