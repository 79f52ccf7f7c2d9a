"""The table of presets: every place where they were verified, and what `auto` takes for a bound."""

from __future__ import annotations

from typing import Any

from scripts.measure.preset_files import measured, reports, sources
from scripts.results import RESULTS, table
from visattn.presets import presets, taken

HEAD = [
    "preset",
    "grid, steps",
    "attention",
    "dense",
    "less",
    "PSNR: 95 % of others, mean, worst",
    "held: own",
    "others",
]
BOUNDS = (25.0, 30.0, 35.0)


def presets_table() -> str:
    """What `scripts.measure.presets` measured, and which preset each bound takes where."""
    names = dict[str, str]()
    for name, known, _ in sources(RESULTS):
        names.setdefault(known, name)
    every = measured(reports(RESULTS))
    # What belongs to no schedule that is there ships as none.
    rows = [_row(names[place["known"]], place) for place in every if place["known"] in names]
    where = dict.fromkeys(f"{place['device']}, {place['dtype']}" for place in every)
    return f"{table(HEAD, rows)}\n\n{'; '.join(where)}.\n\n{_taken()}" if rows else f"Not measured.\n\n{_taken()}"


def _taken() -> str:
    """A line for each bound."""
    lines = []
    for bound in BOUNDS:
        good = [f"`{each.preset.name}` on {each.span}" for each in taken(presets(), bound)]
        lines.append(f"- `auto(psnr={bound:g})`: {', else '.join(good) or 'none'}")
    return "\n".join(lines)


def _row(name: str, place: dict[str, Any]) -> list[str]:
    ours, dense = (1e3 * place[f"attention_seconds{twin}"] for twin in ("", "_dense"))
    half = place["samples"] // 2
    known, others = place["held_in"]
    return [
        f"`{name}`" + (f": `{place['pattern']}`" if place["pattern"] else ""),
        f"{'x'.join(map(str, place['grid']))}, {place['steps']}",
        f"{ours:.2f} ms",
        f"{dense:.2f} ms",
        f"{round(1 - ours / dense, 2) + 0.0:.0%}",
        f"**{place['psnr_held']:.1f}**, {place['psnr_mean']:.1f}, {place['psnr_worst']:.1f} dB",
        f"{known} of {half}",
        f"{others} of {place['samples'] - half}",
    ]
