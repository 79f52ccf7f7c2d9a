"""Result files that several runs add to: all rows of one are of one device, the same versions and the same settings."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

DEVICE = "device"
# No file may leave open with which of these its rows were measured.
NEEDED = (DEVICE, "torch")
# Settings that reports have beside the record of that name, and their rows depend on.
SETTINGS = ("ranks", "heads", "dim", "head_dim", "dtype", "model", "threads", "suite", "steps", "torch")
# No figure of these scripts depends on the versions of these.
UNCOUNTED = ("python", "visattn", "numpy", "peft", "transformers", "matplotlib", "scikit-image")


def earlier(out: Path | None, report: Mapping[str, Any], on: str = "") -> dict[str, Any] | None:
    """What an earlier run wrote in a file that rows of this run are added to, None if there is none.

    Its folder is there afterwards: nobody measures for minutes what cannot be written. Packages that only one of both
    runs had are no difference: a row says with which peers it was measured.

    Args:
        out: JSON file, or None.
        report: Of this run: what `basis` reads.
        on: Device that this run measures on, as torch names it; "" if the report has no list of devices.

    Raises:
        ValueError: If its rows are of another device, other versions or other settings.
    """
    if out is None:
        return None
    out.parent.mkdir(parents=True, exist_ok=True)
    if not out.exists():
        return None
    known = json.loads(out.read_text(encoding="utf-8"))
    check_same(known, report, out, on)
    return known


def check_same(known: Mapping[str, Any], report: Mapping[str, Any], out: Path, on: str = "") -> None:
    """Refuse to add rows of this run to a file of others; as in `earlier`.

    Raises:
        ValueError: If its rows are of another device, other versions or other settings.
    """
    then, now = basis(known, on), json.loads(json.dumps(basis(report, on)))
    strict = {*NEEDED, *known.get("settings", {}), *report.get("settings", {})}
    for name in {**now, **then}:
        if name not in strict and not (name in then and name in now):
            continue
        if then.get(name) != now.get(name):
            have = f"has rows of {name} {then[name]!r}, not {now.get(name)!r}" if name in then else f"tells no {name}"
            raise ValueError(f"{out} {have}: pass another --out, or move it")


def basis(report: Mapping[str, Any], on: str = "") -> dict[str, Any]:
    """What the rows of a report depend on, by name: its device, versions and settings.

    Args:
        report: With "versions" of packages (and "gpu"), "devices" as `visattn.environment.devices` lists them, a record
            "settings", or some of `SETTINGS` beside them.
        on: As in `earlier`.
    """
    found = {name: report[name] for name in (*SETTINGS, DEVICE) if name in report}
    found |= {name: value for name, value in report.get("versions", {}).items() if value and name not in UNCOUNTED}
    found |= report.get("settings", {})
    if "gpu" in found:
        found[DEVICE] = found.pop("gpu")
    kind = on.partition(":")[0]
    names = {each["name"] for each in report.get("devices", []) if kind and each["device"].startswith(kind)}
    # Settings may say the kind alone.
    if names and found.get(DEVICE, kind) in (kind, on):
        found[DEVICE] = ", ".join(sorted(names))
    return found
