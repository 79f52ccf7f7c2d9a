"""Numbers of twice float64's precision, for states that have to be found again to the last bit of a model's input.

The way back enlarges what rounding left. In float64 that reaches 1e-13 and more; of a hundred thousand values and a
hundred evaluations some then lie so near the middle of two floats that the model gets another input than on the way
there. With 106 bits none does. The sums and products without error are those of Dekker, A floating-point technique for
extending the available precision (1971), and Knuth.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

# Splits a float64 into two halves of 26 bits.
_SPLIT = 2.0**27 + 1


class Wide:
    """A tensor of unevaluated sums `hi + lo` of two float64.

    Args:
        hi: The value, rounded to float64.
        lo: What is left, None for nothing.
    """

    def __init__(self, hi: torch.Tensor, lo: torch.Tensor | None = None) -> None:
        self.hi = hi
        self.lo = torch.zeros_like(hi) if lo is None else lo

    def __add__(self, other: Wide | torch.Tensor) -> Wide:
        high, low = (other.hi, other.lo) if isinstance(other, Wide) else (other, None)
        total, rest = _sum(self.hi, high)
        if low is None:
            return _normal(total, rest + self.lo)
        lows, rest_of_lows = _sum(self.lo, low)
        total, rest = _sum(total, rest + lows)
        return _normal(total, rest + rest_of_lows)

    def __sub__(self, other: Wide | torch.Tensor) -> Wide:
        return self + (Wide(-other.hi, -other.lo) if isinstance(other, Wide) else -other)

    def __mul__(self, factor: float) -> Wide:
        product, rest = _product(self.hi, factor)
        return _normal(product, rest + self.lo * factor)

    def __truediv__(self, divisor: float) -> Wide:
        first = self.hi / divisor
        left = self - Wide(*_product(first, divisor))
        second = left.hi / divisor
        left = left - Wide(*_product(second, divisor))
        return _normal(*_sum(first, second)) + left.hi / divisor


class State(tuple[torch.Tensor, torch.Tensor]):
    """Two states in float64, with what float64 leaves out of them.

    Attributes:
        rest: That, of each; None if it is unknown.
    """

    rest: tuple[torch.Tensor, torch.Tensor] | None = None

    @classmethod
    def of(cls, pair: Sequence[Wide]) -> State:
        """Of two wide tensors."""
        made = cls(each.hi for each in pair)
        made.rest = pair[0].lo, pair[1].lo
        return made

    @classmethod
    def wide(cls, state: Sequence[torch.Tensor]) -> tuple[Wide, Wide]:
        """Two states, as `of` made them or of any dtype, as wide tensors."""
        rest = getattr(state, "rest", None) or (None, None)
        first, second = (Wide(each.double(), left) for each, left in zip(state, rest, strict=True))
        return first, second


def _sum(a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The rounded sum, and what that leaves out, exactly."""
    total = a + b
    of_b = total - a
    return total, (a - (total - of_b)) + (b - of_b)


def _product(a: torch.Tensor, factor: float) -> tuple[torch.Tensor, torch.Tensor]:
    """The same of a product."""
    product = a * factor
    split, scaled = _SPLIT * factor, _SPLIT * a
    f_high = split - (split - factor)
    a_high = scaled - (scaled - a)
    f_low, a_low = factor - f_high, a - a_high
    return product, ((a_high * f_high - product) + a_high * f_low + a_low * f_high) + a_low * f_low


def _normal(hi: torch.Tensor, lo: torch.Tensor) -> Wide:
    total = hi + lo
    return Wide(total, lo - (total - hi))
