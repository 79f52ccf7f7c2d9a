"""How much an error at a layer and stage moves the output, and how well that is predicted."""

from __future__ import annotations

import bisect
import math
from collections.abc import Sequence


class Response:
    """Squared error of the output over the relative squared error of a layer's output, from a few injections.

    Between measured points it is a power law; below and above them the output's error is in proportion to the layer's.
    """

    def __init__(self, points: Sequence[tuple[float, float]]) -> None:
        """Fit.

        Args:
            points: Errors of the layer that were injected, and of the output that came of them.
        """
        good = sorted((math.log(e), math.log(d)) for e, d in points if e > 0 and d > 0 and math.isfinite(e + d))
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
