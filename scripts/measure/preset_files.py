"""Writes the presets: tuned schedules, and the single patterns beside them, with what was verified of them elsewhere.

    python -m scripts.measure.preset_files

It reads docs/results/schedule-*.json, the results of their searches (tuned-*.json) and those of
`scripts.measure.presets` (presets-*.json), and writes visattn/presets: for which runs `apply(pipe, "auto")` takes one
follows from that.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from scripts.measure.presets import cases, digest, held
from scripts.results import RESULTS
from visattn.presets import FOLDER
from visattn.presets.place import SHARE
from visattn.tuned import Tuned
from visattn.tuning.subject import DENSE, Outcome

TIMES = ("attention_seconds", "seconds")
# What a place says beside that.
NAMES = ("name", "known", "model", "bound", "pattern", "held_in")


def reports(folder: Path) -> list[dict[str, Any]]:
    """What was measured of schedules where they were not tuned."""
    return [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("presets-*.json"))]


def places(report: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """What a report has of each schedule or pattern, grid and number of steps, with the times of its dense twin.

    Quality is that of the first run, times are medians over the runs. `known` tells schedules apart: by what they are,
    for names of files change.
    """
    runs: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for row in report["rows"]:
        runs.setdefault((*row["grid"], row["steps"], row["name"]), []).append(row)
    for (*where, name), some in runs.items():
        twins = runs.get((*where, DENSE))
        if name == DENSE or twins is None:
            continue
        first, settings = some[0], report["settings"]
        found = {key: first[key] for key in ("name", "bound", "pattern", "grid", "steps")}
        found |= {"model": settings["model"], "device": card(report), "dtype": settings["dtype"]}
        found |= {"known": first["pattern"] or settings["schedules"][name], "held_in": held(first)}
        # Who passes a prompt passes one that no search has seen.
        others = first["psnr"][len(first["psnr"]) // 2 :]
        found |= quality(first["psnr"]) | {"others": len(others), "psnr_held": round(level(others), 2)}
        for key in TIMES:
            found[key] = statistics.median(row[key] for row in some)
            found[f"{key}_dense"] = statistics.median(row[key] for row in twins)
        yield found


def measured(found: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Places of several reports, each once: one pattern may be the best for two bounds, and be measured for both.

    Of equal ones the one with the least PSNR on other prompts counts.
    """
    kept: dict[tuple[Any, ...], dict[str, Any]] = {}
    for place in (place for report in found for place in places(report)):
        key = place["known"], place["device"], place["dtype"], *place["grid"], place["steps"]
        if key not in kept or place["psnr_held"] < kept[key]["psnr_held"]:
            kept[key] = place
    return list(kept.values())


def level(psnr: Sequence[float | None]) -> float:
    """What nearly all samples have at least: equal ones have any."""
    return Outcome(tuple(99.0 if value is None else value for value in psnr)).held(SHARE)


def quality(psnr: Sequence[float | None]) -> dict[str, Any]:
    """Samples, mean and worst as `verified` of a tuned schedule has them; of samples that differ from their twins."""
    finite = [value for value in psnr if value is not None] or [99.0]
    return {
        "samples": len(psnr),
        "psnr_mean": round(statistics.mean(finite), 2),
        "psnr_worst": round(min(finite), 2),
    }


def card(report: dict[str, Any]) -> str:
    """Where a report was measured: the first GPU if there is one."""
    devices = sorted(report["devices"], key=lambda each: each["device"].startswith("cpu"))
    return devices[0]["name"]


def sources(folder: Path) -> Iterator[tuple[str, str, Tuned]]:
    """Name, what tells it apart, and schedule of everything that could ship.

    Schedules of one search are schedule-NAME-BOUND.json, its results tuned-NAME.json.
    """
    searches: dict[str, dict[str, Tuned]] = {}
    for path in sorted(folder.glob("schedule-*-*.json")):
        search, _, bound = path.stem.removeprefix("schedule-").rpartition("-")
        searches.setdefault(search, {})[bound] = Tuned.read(path)
    for search, schedules in searches.items():
        bounds = json.loads((folder / f"tuned-{search}.json").read_text(encoding="utf-8"))["bounds"]
        for case in cases(schedules, bounds):
            if case.tuned is None:
                continue
            tuned, name = case.tuned, f"{search}-{case.name}"
            if case.pattern:
                row = bounds[f"{case.bound:g}"]
                times = {key: row["times"]["single"][key] for key in TIMES}
                times |= {f"{key}_dense": row["times"]["dense"][key] for key in TIMES}
                tuned = replace(tuned, verified=quality(row["single"]["psnr"]) | times)
            yield name, case.pattern or digest(tuned), tuned


def verified(tuned: Tuned, known: str, found: Sequence[dict[str, Any]]) -> Tuned:
    """A schedule with what was verified elsewhere.

    Args:
        tuned: The schedule.
        known: What tells it apart.
        found: The reports.
    """
    rows = [place for place in measured(found) if place["known"] == known]
    elsewhere = [{key: value for key, value in place.items() if key not in NAMES} for place in rows]
    return replace(tuned, verified=dict(tuned.verified) | {"elsewhere": elsewhere})


def made(folder: Path) -> dict[str, Tuned]:
    """The presets of a folder of results by name: what was verified anywhere on other prompts, each once."""
    found, known_ones, presets = reports(folder), set[str](), dict[str, Tuned]()
    for name, known, tuned in sources(folder):
        whole = verified(tuned, known, found)
        if whole.verified["elsewhere"] and known not in known_ones:
            known_ones.add(known)
            presets[name] = whole
    return presets


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of what was measured")
    parser.add_argument("--out", type=Path, default=FOLDER, help="folder of the presets")
    options = parser.parse_args(arguments)
    presets = made(options.results)
    for old in options.out.glob("*.json"):
        if old.stem not in presets:
            old.unlink()
    for name, tuned in presets.items():
        tuned.write(options.out / f"{name}.json")
        print(f"{name}: verified at {len(tuned.verified['elsewhere'])} places")


if __name__ == "__main__":
    main()
