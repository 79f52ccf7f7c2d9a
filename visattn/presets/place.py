"""Where a preset was verified, and from that for which runs it is taken."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from visattn.staged import Span


@dataclass(frozen=True)
class Place:
    """A grid and a number of steps at which a schedule was verified.

    Attributes:
        grid: Tokens per axis.
        steps: Denoising steps.
        device: Where that was.
        dtype: Of the model.
        figures: What was measured, as `verified` of a tuned schedule.
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
    def held(self) -> bool:
        """Whether the bound held there."""
        return bool(self.figures["held"])

    def to_dict(self) -> dict[str, Any]:
        """As JSON."""
        own = {"grid": list(self.grid), "steps": self.steps, "device": self.device, "dtype": self.dtype}
        return own | dict(self.figures)

    def __str__(self) -> str:
        figures = self.figures
        faster = figures["attention_seconds_dense"] / figures["attention_seconds"]
        return (
            f"grid {'x'.join(map(str, self.grid))}, {self.steps} steps: {'held' if self.held else 'not held'}, "
            f"PSNR {figures['psnr_mean']:.1f} dB in the mean and {figures['psnr_worst']:.1f} at worst of "
            f"{figures['samples']} samples, attention {faster:.2f} times faster than dense on {self.device} "
            f"in {self.dtype}"
        )


def span_of(places: Sequence[Place]) -> Span | None:
    """The runs between those in which a schedule held, of which none was measured that did not; None if there are none.

    If one lies between them that did not hold, the runs are those of the first place alone.
    """
    failed = {(place.grid, place.steps) for place in places if not place.held}
    good = [place for place in places if (place.grid, place.steps) not in failed]
    for some in (good, [place for place in good if place is places[0]]):
        if some:
            axes = list(zip(*(place.grid for place in some), strict=True))
            counts = [place.steps for place in some]
            found = Span(tuple(map(min, axes)), tuple(map(max, axes)), (min(counts), max(counts)))
            if not any(found.has(grid, steps) for grid, steps in failed):
                return found
    return None
