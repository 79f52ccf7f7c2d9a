"""Schedules that ship with the package, each measured and verified, and what `apply(target, "auto")` makes of them.

The folder holds files of `visattn tune`, named after the model and the least PSNR in dB that they have: emoji-30.json.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from visattn.schedule import Schedule
from visattn.tuned import Tuned

FOLDER = Path(__file__).parent
# The least PSNR of `auto` where none is given, in dB.
BOUND = 30.0
# Where nothing was measured: what no model is known to suffer from, not what is fastest.
CAREFUL = "topk(keep=0.5, rest=mean)"
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
    def device(self) -> str:
        """Where its times were measured."""
        return str(self.tuned.settings["subject"]["device"])

    def to_dict(self) -> dict[str, Any]:
        """As JSON."""
        tuned = self.tuned
        return {
            "name": self.name,
            "class": tuned.model,
            "layers": tuned.count,
            "parameters": tuned.parameters,
            "grid": list(tuned.grid),
            "bound": self.bound,
            "device": self.device,
            "verified": dict(tuned.verified),
        }

    def __str__(self) -> str:
        figures, steps = self.tuned.verified, self.tuned.settings["subject"]["steps"]
        faster = figures["attention_seconds_dense"] / figures["attention_seconds"]
        return (
            f"{self.name}: {self.tuned.model} with {self.tuned.count} layers, grid "
            f"{'x'.join(map(str, self.tuned.grid))}: attention {faster:.2f} times faster than dense on {self.device}, "
            f"PSNR to dense {figures['psnr_mean']:.1f} dB in the mean and {figures['psnr_worst']:.1f} at worst of "
            f"{figures['samples']} samples of {steps} steps"
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


def automatic(target: Any, pattern: str = "auto") -> Schedule:
    """The preset of a pipeline's or model's size, else a careful schedule; its `label` says which.

    Args:
        target: What `apply` takes.
        pattern: "auto" for 30 dB, or "auto(psnr=35)": the fastest preset with at least so many.
    """
    found = re.fullmatch(_AUTO, pattern.strip())
    assert found is not None
    least = float(found[1] or BOUND)
    parts = _parts(target)
    fit = [preset for preset in presets() if _is_for(preset.tuned, parts)]
    good = [preset for preset in fit if preset.bound >= least]
    if good:
        best = min(good, key=lambda preset: (preset.bound, preset.name))
        return replace(Schedule.tuned(best.tuned), label=f"preset {best}")
    best_bound = max((preset.bound for preset in fit), default=math.nan)
    why = (
        f"no preset of this model has {least:g} dB, the best has {best_bound:g}"
        if fit
        else f"no preset is for {type(target).__name__} of this size"
    )
    # Early steps decide what a sample shows; a model without a pipeline tells no steps.
    staged = {"0-0.25": "dense", "0.25-": CAREFUL}
    schedule = Schedule.of({"0-": staged} if _has_steps(target) else CAREFUL)
    return replace(schedule, label=f"careful, quality and time not measured: {why}; `visattn tune` finds one that is")


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
