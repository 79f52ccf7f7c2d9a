"""The file of a tuned schedule: which layer of which model has which pattern in which steps, and what was verified."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from visattn.files import read_text, write_json
from visattn.patterns.values import is_number
from visattn.staged import Staged

VERSION = 1
# Grids further from the tuned one than these factors are warned of.
SCALES = (0.5, 2.0)
_NEEDED = {"visattn_schedule", "model", "grid", "layers"}
_KNOWN = {*_NEEDED, "scales", "settings", "verified"}


@dataclass(frozen=True)
class Tuned:
    """A tuned schedule.

    Attributes:
        model: Class of the model.
        count: How many layers it has.
        grid: Tokens per axis at which it was tuned.
        layers: Layer, by its index as text, to text of steps to text of a pattern.
        scales: Smallest and largest factor on an axis of the grid for which it is meant.
        parameters: How many numbers the model has, 0 where that is not said: tells sizes of a family apart.
        settings: What it was tuned with: prompts, seeds, steps, bound, device.
        verified: What was measured of it.
    """

    model: str
    count: int
    grid: tuple[int, ...]
    layers: Mapping[str, Mapping[str, str]]
    scales: tuple[float, float] = SCALES
    parameters: int = 0
    settings: Mapping[str, Any] = field(default_factory=dict)
    verified: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, found: Mapping[str, Any], where: str) -> Tuned:
        """From what a file holds.

        Args:
            found: That.
            where: What errors call the file.

        Raises:
            ValueError: If it is of another version, or a field is missing, unknown or of another type.
        """
        if found.get("visattn_schedule") != VERSION:
            raise ValueError(
                f"{where}: visattn_schedule {found.get('visattn_schedule')!r} is another version than {VERSION}: write "
                "it anew with `visattn tune`, or install the visattn that wrote it"
            )
        missing, strange = sorted(_NEEDED - set(found)), sorted(set(found) - _KNOWN)
        if missing or strange:
            raise ValueError(f"{where}: {'lacks ' + missing[0] if missing else 'has an unknown field ' + strange[0]}")
        model, grid, layers = found["model"], found["grid"], found["layers"]
        good = {
            "model (a class and its number of layers)": isinstance(model, Mapping)
            and {"class", "layers"} <= set(model) <= {"class", "layers", "parameters"}
            and isinstance(model["class"], str)
            and _whole(model["layers"])
            and _whole(model.get("parameters", 1)),
            "grid (one to three numbers)": isinstance(grid, list) and 0 < len(grid) < 4 and all(map(_whole, grid)),
            "layers (each with steps and patterns)": isinstance(layers, Mapping)
            and all(isinstance(each, Mapping) and each for each in layers.values()),
            "scales (two numbers)": len(found.get("scales", SCALES)) == 2
            and all(map(is_number, found.get("scales", SCALES))),
        }
        for name, fine in good.items():
            if not fine:
                raise ValueError(f"{where}: {name} is {found.get(name.split()[0])!r}")
        low, high = found.get("scales", SCALES)
        rest = found.get("settings", {}), found.get("verified", {})
        made = cls(model["class"], model["layers"], tuple(grid), layers, (low, high), model.get("parameters", 0), *rest)
        try:
            assert made.rules
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from error
        return made

    @classmethod
    def read(cls, path: str | Path) -> Tuned:
        """Read a file.

        Raises:
            ValueError: If it is missing or no such file.
        """
        if not Path(path).is_file():
            raise ValueError(f"schedule {path} does not exist: `visattn tune` writes one")
        try:
            found = json.loads(read_text(Path(path)))
        except ValueError as error:
            raise ValueError(f"{path} is no JSON ({error}): pass a file that `visattn tune` wrote") from error
        if not isinstance(found, Mapping) or "visattn_schedule" not in found:
            raise ValueError(
                f"{path} is no schedule that `visattn tune` wrote: a mapping from layers to patterns by hand, or of "
                "`visattn maps`, is for apply and generate --pattern"
            )
        return cls.of(found, str(path))

    def write(self, path: Path) -> None:
        """Write it to a file, whole or not at all: one line a stage, so that versions can be compared line by line."""
        write_json(path, self.to_dict(), indent=2)

    def to_dict(self) -> dict[str, Any]:
        """As JSON."""
        size = {"parameters": self.parameters} if self.parameters else {}
        return {
            "visattn_schedule": VERSION,
            "model": {"class": self.model, "layers": self.count} | size,
            "grid": list(self.grid),
            "scales": list(self.scales),
            "layers": {layer: dict(stages) for layer, stages in self.layers.items()},
            "settings": dict(self.settings),
            "verified": dict(self.verified),
        }

    @property
    def rules(self) -> tuple[tuple[tuple[str, ...], Staged], ...]:
        """Layers and what they are given, as rules of a `Schedule`.

        Raises:
            ValueError: If a text is no pattern or no steps.
        """
        # Equal stages share an object, and with it a group of compiled code.
        made: dict[Staged, list[str]] = {}
        for layer, stages in self.layers.items():
            made.setdefault(Staged.of(stages, self.grid, self.scales), []).append(layer)
        for staged in made:
            for pattern in staged.patterns:
                pattern.check(self.grid)
        return tuple((tuple(layers), staged) for staged, layers in made.items())


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0
