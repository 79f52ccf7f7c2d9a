"""What a search is asked for."""

from __future__ import annotations

import math
from dataclasses import dataclass

from visattn.tuning.subject import Outcome


@dataclass(frozen=True)
class Goal:
    """What is asked for: one of the first three.

    Attributes:
        psnr: The fastest schedule with at least so many dB to dense.
        speedup: The best schedule that makes attention so many times faster.
        accuracy: The fastest schedule that loses at most so many points of accuracy.
        share: Of the samples that have to reach `psnr`.
        margin: By how many dB the samples that are measured have to be better than `psnr`.
        held_out: Samples that verify.
        rounds: Times that a schedule which fails to verify is replaced by a better one.
    """

    psnr: float | None = None
    speedup: float | None = None
    accuracy: float | None = None
    share: float = 0.95
    margin: float = 0.5
    held_out: int = 20
    rounds: int = 3

    def check(self) -> None:
        """Raise a ValueError unless it is one of the three."""
        if sum(each is not None for each in (self.psnr, self.speedup, self.accuracy)) != 1:
            raise ValueError(
                f"psnr={self.psnr}, speedup={self.speedup} and accuracy={self.accuracy}: pass one, the least PSNR, "
                "the speed-up that you need, or the most accuracy to lose"
            )

    def score(self, outcome: Outcome) -> float:
        """How good an outcome is, as far as this goal asks: larger is better."""
        if self.accuracy is not None:
            return -outcome.lost_points
        return math.inf if self.psnr is None else outcome.held(self.share)

    @property
    def least(self) -> float:
        """The least score."""
        if self.accuracy is not None:
            return -self.accuracy
        return -math.inf if self.psnr is None else self.psnr

    def __str__(self) -> str:
        if self.accuracy is not None:
            return f"loses at most {self.accuracy:g} points of accuracy"
        if self.psnr is None:
            return f"makes attention {self.speedup:g} times faster"
        return f"has {self.psnr:g} dB in {self.share:.0%} of the samples"
