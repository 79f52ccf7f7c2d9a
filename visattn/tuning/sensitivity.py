"""How much an error at a layer and stage moves the output, and how well that is predicted."""

from __future__ import annotations

import bisect
import math
from collections.abc import Sequence

# Share of an output's error that is a layer's at least, where all of it may be rounding.
UNKNOWN = 0.1


def floor_of(fine: tuple[float, float], coarse: tuple[float, float]) -> float:
    """What an output's error tends to as a layer's does to zero: rounding, which any change of a run changes.

    Args:
        fine: A small error of a layer, and that of the output.
        coarse: A larger one.
    """
    if not fine[0] < coarse[0]:
        return 0.0
    slope = max(0.0, coarse[1] - fine[1]) / (coarse[0] - fine[0])
    return max(0.0, fine[1] - slope * fine[0])


class Response:
    """Squared error of the output over the relative squared error of a layer's output, from a few injections.

    Between measured points it is a power law; below and above them the output's error is in proportion to the layer's.
    """

    def __init__(self, points: Sequence[tuple[float, float]], floor: float = 0.0) -> None:
        """Fit.

        Args:
            points: Errors of the layer that were injected, and of the output that came of them.
            floor: Error of the output however small that of a layer is, see `floor_of`.
        """
        # What is hardly above the floor is not known, but not nothing.
        above = [(e, max(d - floor, d * UNKNOWN)) for e, d in points]
        good = sorted((math.log(e), math.log(d)) for e, d in above if e > 0 and d > 0 and math.isfinite(e + d))
        self._x = [x for x, _ in good]
        # More error in, no less error out: where noise says otherwise, the larger one holds.
        self._y: list[float] = []
        for _, y in good:
            self._y.append(max([y, *self._y[-1:]]))

    def __call__(self, error: float) -> float:
        """The output's squared error for a layer's error."""
        if error <= 0 or not self._x:
            return 0.0
        x = math.log(error)
        i = bisect.bisect(self._x, x)
        if i == 0:
            return math.exp(self._y[0] + x - self._x[0])
        if i == len(self._x):
            return math.exp(self._y[-1] + x - self._x[-1])
        share = (x - self._x[i - 1]) / (self._x[i] - self._x[i - 1])
        return math.exp(self._y[i - 1] + share * (self._y[i] - self._y[i - 1]))


def rank_correlation(one: Sequence[float], two: Sequence[float]) -> float | None:
    """Spearman's rank correlation with mean ranks for ties; None where it is not defined."""
    a, b = _ranks(one), _ranks(two)
    if len(a) < 2:
        return None
    mean = (len(a) + 1) / 2
    product = sum((x - mean) * (y - mean) for x, y in zip(a, b, strict=True))
    size = math.sqrt(sum((x - mean) ** 2 for x in a) * sum((y - mean) ** 2 for y in b))
    return product / size if size else None


def _ranks(values: Sequence[float]) -> list[float]:
    order = sorted(values)
    return [(bisect.bisect_left(order, v) + bisect.bisect_right(order, v) + 1) / 2 for v in values]
