"""The table of presets: every place where their schedules were verified, beside single patterns and dense attention."""

from __future__ import annotations

from typing import Any

from scripts.measure.preset_files import places, reports
from scripts.results import RESULTS, table
from visattn.presets import presets

HEAD = [
    "schedule",
    "grid, steps",
    "attention",
    "dense",
    "less",
    "PSNR: mean, worst",
    "held, of prompts it was tuned with",
    "of others",
]


def presets_table() -> str:
    """What `scripts.measure.presets` measured, and for which runs each preset is taken."""
    spans = [f"`{each.name}`: {each.span}" if each.span else f"`{each.name}`: none" for each in presets()]
    taken = f"Taken for: {'; '.join(spans)}."
    found = reports(RESULTS)
    rows = [_row(place) for report in found for place in places(report)]
    if not rows:
        return f"Not measured elsewhere.\n\n{taken}"
    where = dict.fromkeys(f"{place['device']}, {place['dtype']}" for report in found for place in places(report))
    return f"{table(HEAD, rows)}\n\n{'; '.join(where)}. {taken}"


def _row(place: dict[str, Any]) -> list[str]:
    ours, dense = (1e3 * place[f"attention_seconds{twin}"] for twin in ("", "_dense"))
    half = place["samples"] // 2
    known, others = place["held_in"]
    # A preset is named after the model and its bound.
    name = f"`{place['model']}-{place['bound']:g}`"
    if place["pattern"]:
        name = f"single pattern for {place['bound']:g} dB: `{place['pattern']}`"
    return [
        name,
        f"{'x'.join(map(str, place['grid']))}, {place['steps']}",
        f"{ours:.2f} ms",
        f"{dense:.2f} ms",
        f"{round(1 - ours / dense, 2) + 0.0:.0%}",
        "equal" if place["psnr_mean"] is None else f"{place['psnr_mean']:.1f}, {place['psnr_worst']:.1f} dB",
        f"{known} of {half}",
        f"{others} of {place['samples'] - half}",
    ]
