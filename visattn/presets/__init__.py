"""Schedules that ship with the package, each measured and verified, and what `apply(target, "auto")` makes of them.

The folder holds files of `visattn tune`, named after the model and what they were tuned for. Beside what the search
verified, `verified` has `elsewhere`: the same on other prompts, other grids and with other numbers of steps. That says
what a preset is taken for; what it has on the prompts that it was tuned with does not.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from visattn.given import class_among
from visattn.presets.place import SHARE, Place, spans_of
from visattn.schedule import Schedule
from visattn.staged import Span, Staged
from visattn.tuned import Tuned

FOLDER = Path(__file__).parent
# The least PSNR of `auto` where none is given, in dB.
BOUND = 30.0
# Where nothing was measured: what no model is known to suffer from, not what is fastest.
CAREFUL = "topk(keep=0.5, rest=mean)"
# Early steps decide what a sample shows.
CAREFUL_STEPS = {"0-0.25": "dense", "0.25-": CAREFUL}
_AUTO = re.compile(r"auto(?:\(\s*psnr\s*=\s*(\d+(?:\.\d+)?)\s*\))?")


@dataclass(frozen=True)
class Preset:
    """A schedule that ships with the package.

    Attributes:
        name: Of its file.
        tuned: The schedule with what was verified.
    """

    name: str
    tuned: Tuned

    @property
    def places(self) -> tuple[Place, ...]:
        """Where it was verified: first where it was tuned."""
        subject, verified = self.tuned.settings["subject"], self.tuned.verified
        return (Place.of(subject, verified), *(Place.of(each, each) for each in verified.get("elsewhere", ())))

    @property
    def best(self) -> float:
        """The most dB that it was verified for anywhere, minus infinity if nowhere."""
        return max((place.level for place in self.places if place.level is not None), default=-math.inf)

    def inside(self, span: Span) -> list[Place]:
        """The places in a span that count."""
        return [each for each in self.places if each.level is not None and span.has(each.grid, each.steps)]

    def to_dict(self) -> dict[str, Any]:
        """As JSON."""
        tuned = self.tuned
        return {
            "name": self.name,
            "class": tuned.model,
            "layers": tuned.count,
            "parameters": tuned.parameters,
            "verified": [place.to_dict() for place in self.places],
        }

    def __str__(self) -> str:
        tuned = self.tuned
        head = f"{self.name}: {tuned.model} with {tuned.count} layers and {tuned.parameters:,} parameters"
        return "\n".join([head, *(f"  {place}" for place in self.places)])


class Taken(NamedTuple):
    """A preset, and the runs that it is taken for."""

    preset: Preset
    span: Span

    @property
    def share(self) -> float:
        """Time in attention there, as a share of that of dense attention."""
        places = self.preset.inside(self.span)
        return sum(place.share for place in places) / len(places)

    def __str__(self) -> str:
        places = self.preset.inside(self.span)
        level = min(place.level for place in places if place.level is not None)
        return (
            f"preset {self.preset.name}: {SHARE:.0%} of the samples have at least {level:.1f} dB to dense, in "
            f"{self.share:.0%} of the time of dense attention, verified on {self.span} on "
            f"{', '.join(dict.fromkeys(place.device for place in places))}"
        )


def presets() -> tuple[Preset, ...]:
    """All that ship, by name."""
    return _read(FOLDER)


def is_auto(pattern: Any) -> bool:
    """Whether a pattern is "auto" or "auto(psnr=35)".

    Raises:
        ValueError: If it is "auto" with anything else.
    """
    if not isinstance(pattern, str) or re.match(r"\s*auto\s*(\(|$)", pattern) is None:
        return False
    if re.fullmatch(_AUTO, pattern.strip()) is None:
        raise ValueError(f"{pattern!r} must be auto, or auto(psnr=35) for a least PSNR to dense attention in dB")
    return True


def taken(found: Iterable[Preset], least: float) -> list[Taken]:
    """Those of some presets that were verified to have so many dB anywhere, the fastest first."""
    good = [Taken(preset, span) for preset in found for span in spans_of(preset.places, least)]
    good.sort(key=lambda each: (each.share, each.preset.name))
    # What an earlier one is for in any case is never reached.
    return [each for i, each in enumerate(good) if not any(other.span.covers(each.span) for other in good[:i])]


def automatic(target: Any, pattern: str = "auto", eight_bits: bool = True, precision: str | None = None) -> Schedule:
    """The presets of a pipeline's or model's size where they were verified, else a careful schedule.

    A run has the fastest of those that have the quality on its grid with its number of steps; labels say which.

    Args:
        target: What `apply` takes.
        pattern: "auto" for 30 dB, or "auto(psnr=35)" for at least so many.
        eight_bits: Whether parts that presets have in 8 bits may stay so.
        precision: What `apply` was asked to compute in: nothing was verified in another than a model's own.
    """
    found = re.fullmatch(_AUTO, pattern.strip())
    assert found is not None
    least, parts = float(found[1] or BOUND), _parts(target)
    fit = [preset for preset in presets() if _is_for(preset.tuned, parts)]
    good = taken(fit, least) if precision is None else []
    # A model without a pipeline tells no steps.
    everywhere = Staged.of(CAREFUL_STEPS if _has_steps(target) else CAREFUL)
    if good:
        return _in_spans(good, everywhere, eight_bits)
    best = max((preset.best for preset in fit), default=-math.inf)
    if precision is not None:
        why = f"no preset was verified with precision={precision!r}"
    elif math.isfinite(best):
        why = f"no preset of this model has {least:g} dB, the best has {best:.1f}"
    else:
        why = f"no preset is for {type(target).__name__} of this size"
    return Schedule(((None, everywhere.stages[0].pattern if everywhere.whole else everywhere),), label=_careful(why))


def _in_spans(good: Sequence[Taken], everywhere: Staged, eight_bits: bool) -> Schedule:
    """Each preset in its span, the first that has a run, and what is for everywhere else."""
    tuned = good[0].preset.tuned
    spans = " or ".join(dict.fromkeys(str(each.span) for each in good))
    careful = replace(everywhere, label=_careful(f"the presets of this model are for {spans}"))
    rows: dict[Staged, list[str]] = {}
    for layer in map(str, range(tuned.count)):
        row = careful
        for each in reversed(good):
            row = replace(_layer(each.preset.tuned, layer, eight_bits), span=each.span, otherwise=row, label=str(each))
        # Equal rows share an object, and with it a group of compiled code.
        rows.setdefault(row, []).append(layer)
    rules = tuple((tuple(layers), row) for row, layers in rows.items())
    label = f"{'; '.join(map(str, good))}; careful on others"
    return Schedule(rules, model=tuned.model, layers=tuned.count, label=label, simulates=False)


def _layer(tuned: Tuned, layer: str, eight_bits: bool) -> Staged:
    """What a layer of a tuned schedule has; dense if it names none."""
    stages: Mapping[str, str] = tuned.layers.get(layer, {"0-": "dense"})
    found = Staged.of(stages, tuned.grid, tuned.scales)
    return found if eight_bits else replace(found, stages=tuple(s._replace(precision=None) for s in found.stages))


def _careful(why: str) -> str:
    return f"careful, quality and time not measured: {why}; `visattn tune` finds one that is"


@cache
def _read(folder: Path) -> tuple[Preset, ...]:
    return tuple(Preset(path.stem, Tuned.read(path)) for path in sorted(folder.glob("*.json")))


def _parts(target: Any) -> list[Any]:
    """The models of a pipeline whose class has a preset; a model is its own only part."""
    import torch

    if isinstance(target, torch.nn.Module):
        return [getattr(target, "_orig_mod", target)]
    components = getattr(target, "components", {})
    models = [getattr(each, "_orig_mod", each) for each in components.values() if isinstance(each, torch.nn.Module)]
    classes = {preset.tuned.model for preset in presets()}
    return [model for model in models if class_among(model, classes)]


def _is_for(tuned: Tuned, parts: list[Any]) -> bool:
    """Whether all parts are models of the class and size that a schedule was tuned for."""
    return bool(parts) and all(
        class_among(part, [tuned.model]) and tuned.parameters == sum(each.numel() for each in part.parameters())
        for part in parts
    )


def _has_steps(target: Any) -> bool:
    return hasattr(target, "scheduler")
