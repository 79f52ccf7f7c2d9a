"""Where a preset was verified, and from that for which runs it is taken."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from visattn.staged import Span

# Of the samples, that have to have a quality.
SHARE = 0.95


@dataclass(frozen=True)
class Place:
    """A grid and a number of steps at which a schedule was verified.

    Attributes:
        grid: Tokens per axis.
        steps: Denoising steps.
        device: Where that was.
        dtype: Of the model.
        figures: What was measured, as `verified` of a tuned schedule. `others` are samples of prompts that it was not
            tuned with, if there are any, and `psnr_held` is what nearly all of these have.
    """

    grid: tuple[int, ...]
    steps: int
    device: str
    dtype: str
    figures: Mapping[str, Any] = field(hash=False)

    @classmethod
    def of(cls, where: Mapping[str, Any], figures: Mapping[str, Any]) -> Place:
        """From what files have: where that was, and what was measured there."""
        known = {"grid", "steps", "device", "dtype", "elsewhere"}
        own = {name: value for name, value in figures.items() if name not in known}
        return cls(tuple(where["grid"]), where["steps"], where["device"], where["dtype"], own)

    @property
    def level(self) -> float | None:
        """PSNR to dense that it is taken for; None where only prompts that it was tuned with were drawn."""
        return self.figures.get("psnr_held")

    @property
    def share(self) -> float:
        """Time in attention, as a share of that of dense attention."""
        return self.figures["attention_seconds"] / self.figures["attention_seconds_dense"]

    def to_dict(self) -> dict[str, Any]:
        """As JSON."""
        own = {"grid": list(self.grid), "steps": self.steps, "device": self.device, "dtype": self.dtype}
        return own | dict(self.figures)

    def __str__(self) -> str:
        figures = self.figures
        known = "all of prompts that it was tuned with"
        if self.level is not None:
            known = f"{SHARE:.0%} of {figures['others']} of other prompts have {self.level:.1f} dB"
        return (
            f"grid {'x'.join(map(str, self.grid))}, {self.steps} steps: {figures['samples']} samples, {known}, PSNR "
            f"{figures['psnr_mean']:.1f} dB in the mean and {figures['psnr_worst']:.1f} at worst, attention "
            f"{1 / self.share:.2f} times faster than dense on {self.device} in {self.dtype}"
        )


def spans_of(places: Sequence[Place], least: float) -> list[Span]:
    """The runs between places that have so many dB in less time than dense attention, without one that has not.

    Where others lie between them, those of one grid, or places alone; none if no place has it.
    """
    known = [place for place in places if place.level is not None]
    bad = {(place.grid, place.steps) for place in known if (place.level or 0.0) < least or place.share >= 1}
    left = [place for place in known if (place.grid, place.steps) not in bad]
    found: list[Span] = []
    while left:
        grids = [list(some) for _, some in itertools.groupby(sorted(left, key=_grid), _grid)]
        tried = map(_around, (left, *sorted(grids, key=len, reverse=True), *([place] for place in left)))
        span = next(span for span in tried if not any(span.has(*each) for each in bad))
        found.append(span)
        left = [place for place in left if not span.has(place.grid, place.steps)]
    return found


def _grid(place: Place) -> tuple[int, ...]:
    return place.grid


def _around(places: Iterable[Place]) -> Span:
    """The smallest span with some places."""
    axes = list(zip(*(place.grid for place in places), strict=True))
    counts = [place.steps for place in places]
    return Span(tuple(map(min, axes)), tuple(map(max, axes)), (min(counts), max(counts)))
