"""The measured results in docs/results, and tables of them in Markdown."""

from __future__ import annotations

import json
from typing import Any

from scripts.pages import ROOT

RESULTS = ROOT / "docs" / "results"


def result(name: str) -> dict[str, Any]:
    """A measured result."""
    return json.loads((RESULTS / f"{name}.json").read_text())


def table(head: list[str], rows: list[list[str]]) -> str:
    """Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def seconds(report: dict[str, Any], kind: str) -> list[str]:
    """Time of one run and of its attention, and how many times faster than its dense twin's that is."""
    whole, attention = (report["times"][kind][key] for key in ("seconds", "attention_seconds"))
    twin = report["times"]["dense"]["attention_seconds"]
    return [f"{whole:.2f} s", f"{attention:.2f} s" + f": {twin / attention:.1f}x faster" * (kind != "dense")]


def likeness(report: dict[str, Any]) -> str:
    """PSNR and SSIM of a comparison, means over its images."""
    return f"{report['mean']['psnr']:.1f} dB, {report['mean']['ssim']:.3f}"


def under_load(*names: str) -> str:
    """A remark on results whose machine was busy, empty if none was."""
    busy = ", ".join(f"`{name}`" for name in names if result(name)["busy"])
    ratios = "ratios are of twins that took\nturns, times of different rows do not compare."
    return f"\n\nOther programs ran during {busy}: {ratios}" if busy else ""
