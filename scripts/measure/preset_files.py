"""Writes the presets: tuned schedules with what `scripts.measure.presets` verified of them elsewhere.

    python -m scripts.measure.preset_files

It reads docs/results/schedule-*.json and docs/results/presets-*.json and writes visattn/presets, from which follows for
which grids and numbers of steps `apply(pipe, "auto")` takes them.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from scripts.measure.presets import SCHEDULES, digest, held
from scripts.results import RESULTS
from visattn.presets import FOLDER
from visattn.tuned import Tuned
from visattn.tuning.subject import DENSE

# What a preset says of itself beside its places.
NAMES = ("name", "model", "bound", "pattern", "held_in")
TIMES = ("attention_seconds", "seconds")


def reports(folder: Path) -> list[dict[str, Any]]:
    """What was measured of schedules where they were not tuned."""
    return [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("presets-*.json"))]


def places(report: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """What a report has of each schedule or pattern, grid and number of steps, with the times of its dense twin.

    Quality is that of the first run, times are medians over the runs.
    """
    runs: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for row in report["rows"]:
        runs.setdefault((*row["grid"], row["steps"], row["name"]), []).append(row)
    for (*where, name), some in runs.items():
        twins = runs.get((*where, DENSE))
        if name == DENSE or twins is None:
            continue
        first = some[0]
        finite = [value for value in first["psnr"] if value is not None]
        found = {key: first[key] for key in ("name", "bound", "pattern", "grid", "steps")}
        found |= {"model": report["settings"]["model"], "device": card(report)}
        found |= {"dtype": report["settings"]["dtype"], "samples": len(first["psnr"])}
        found |= {"held_in": held(first), "psnr_mean": None, "psnr_worst": None}
        if finite:
            found |= {"psnr_mean": round(statistics.mean(finite), 2), "psnr_worst": round(min(finite), 2)}
        for key in TIMES:
            found[key] = statistics.median(row[key] for row in some)
            found[f"{key}_dense"] = statistics.median(row[key] for row in twins)
        yield found


def card(report: dict[str, Any]) -> str:
    """Where a report was measured: the first GPU if there is one."""
    devices = sorted(report["devices"], key=lambda each: each["device"].startswith("cpu"))
    return devices[0]["name"]


def preset(path: Path, found: Sequence[dict[str, Any]]) -> Tuned:
    """A schedule with what was verified elsewhere.

    Args:
        path: The file of `visattn tune`.
        found: What was measured.

    Raises:
        ValueError: If that was of another schedule of this name.
    """
    tuned, elsewhere = Tuned.read(path), []
    for report in found:
        known = report["settings"]["schedules"].get(path.stem)
        if known is None:
            continue
        if known != digest(tuned):
            raise ValueError(f"{path} is not the schedule of this name that was measured: measure it anew")
        for place in places(report):
            if place["name"] != path.stem:
                continue
            share = tuned.settings["goal"]["share"]
            own = {"held": sum(place["held_in"]) >= share * place["samples"]}
            own |= {name: value for name, value in place.items() if name not in NAMES}
            elsewhere.append(own)
    return replace(tuned, verified=dict(tuned.verified) | ({"elsewhere": elsewhere} if elsewhere else {}))


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of what was measured")
    parser.add_argument("--out", type=Path, default=FOLDER, help="folder of the presets")
    options = parser.parse_args(arguments)
    found = reports(options.results)
    for path in SCHEDULES:
        made = preset(path, found)
        file = options.out / f"{made.settings['subject']['model']}-{made.settings['goal']['psnr']:g}.json"
        made.write(file)
        print(f"{file}: verified at {1 + len(made.verified.get('elsewhere', ()))} places")


if __name__ == "__main__":
    main()
