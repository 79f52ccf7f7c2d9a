"""Schedules that ship with the package, each measured and verified, and what `apply(target, "auto")` makes of them.

The folder holds files of `visattn tune`, named after the model and the least PSNR in dB that they have: emoji-30.json.
Beside what the search verified, `verified` may have `elsewhere`: the same on other grids and with other steps.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from visattn.presets.place import Place, span_of
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
    def bound(self) -> float:
        """Least PSNR to dense attention that it was tuned for, in dB."""
        return float(self.tuned.settings["goal"]["psnr"])

    @property
    def share(self) -> float:
        """Of the samples that have to have it."""
        return float(self.tuned.settings["goal"]["share"])

    @property
    def places(self) -> tuple[Place, ...]:
        """Where it was verified: first where it was tuned."""
        subject, verified = self.tuned.settings["subject"], self.tuned.verified
        return (Place.of(subject, verified), *(Place.of(each, each) for each in verified.get("elsewhere", ())))

    @property
    def span(self) -> Span | None:
        """The grids and numbers of steps that it is taken for, None if it is for none."""
        return span_of(self.places)

    def to_dict(self) -> dict[str, Any]:
        """As JSON."""
        tuned, span = self.tuned, self.span
        return {
            "name": self.name,
            "class": tuned.model,
            "layers": tuned.count,
            "parameters": tuned.parameters,
            "bound": self.bound,
            "share": self.share,
            "span": None if span is None else span._asdict(),
            "verified": [place.to_dict() for place in self.places],
        }

    @property
    def summary(self) -> str:
        """What it has, and where, in a line."""
        devices = ", ".join(dict.fromkeys(place.device for place in self.places))
        return (
            f"{self.name}: at least {self.bound:g} dB to dense in {self.share:.0%} of the samples, verified on "
            f"{self.span} on {devices}"
        )

    def __str__(self) -> str:
        tuned = self.tuned
        head = f"{tuned.model} with {tuned.count} layers and {tuned.parameters:,} parameters"
        return "\n".join([self.summary, f"  {head}", *(f"  {place}" for place in self.places)])


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


def automatic(target: Any, pattern: str = "auto") -> Schedule:
    """The presets of a pipeline's or model's size where they were verified, else a careful schedule.

    Of several the fastest that has the quality runs, each in its span; labels say which.

    Args:
        target: What `apply` takes.
        pattern: "auto" for 30 dB, or "auto(psnr=35)": the fastest preset with at least so many.
    """
    found = re.fullmatch(_AUTO, pattern.strip())
    assert found is not None
    least = float(found[1] or BOUND)
    parts = _parts(target)
    fit = [preset for preset in presets() if _is_for(preset.tuned, parts) and preset.span is not None]
    good = sorted((each for each in fit if each.bound >= least), key=lambda each: (each.bound, each.name))
    # A model without a pipeline tells no steps.
    everywhere = Staged.of(CAREFUL_STEPS if _has_steps(target) else CAREFUL)
    if good:
        return _in_spans(good, everywhere)
    best_bound = max((preset.bound for preset in fit), default=math.nan)
    why = (
        f"no preset of this model has {least:g} dB, the best has {best_bound:g}"
        if fit
        else f"no preset is for {type(target).__name__} of this size"
    )
    return Schedule(((None, everywhere.stages[0].pattern if everywhere.whole else everywhere),), label=_careful(why))


def _in_spans(good: Sequence[Preset], everywhere: Staged) -> Schedule:
    """Each preset in its span, the first that has a run, and what is for everywhere else."""
    tuned = good[0].tuned
    spans = " or ".join(dict.fromkeys(str(preset.span) for preset in good))
    careful = replace(everywhere, label=_careful(f"the presets of this model are for {spans}"))
    rows: dict[Staged, list[str]] = {}
    for layer in range(tuned.count):
        row = careful
        for preset in reversed(good):
            own = _layer(preset.tuned, str(layer))
            row = replace(own, span=preset.span, otherwise=row, label=f"preset {preset.summary}")
        # Equal rows share an object, and with it a group of compiled code.
        rows.setdefault(row, []).append(str(layer))
    rules = tuple((tuple(layers), row) for row, layers in rows.items())
    label = f"preset {good[0].summary}; careful on others"
    return Schedule(rules, model=tuned.model, layers=tuned.count, label=label, simulates=False)


def _layer(tuned: Tuned, layer: str) -> Staged:
    """What a layer of a tuned schedule has; dense if it names none."""
    stages: Mapping[str, str] = tuned.layers.get(layer, {"0-": "dense"})
    return Staged.of(stages, tuned.grid, tuned.scales)


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
    return [model for model in models if type(model).__name__ in classes]


def _is_for(tuned: Tuned, parts: list[Any]) -> bool:
    """Whether all parts are models of the class and size that a schedule was tuned for."""
    return bool(parts) and all(
        type(part).__name__ == tuned.model and tuned.parameters == sum(each.numel() for each in part.parameters())
        for part in parts
    )


def _has_steps(target: Any) -> bool:
    return hasattr(target, "scheduler")
