"""The table of docs/choosing.md: what some patterns do to the embedded models, from the larger tables."""

from __future__ import annotations

from typing import Any, NamedTuple

from scripts.results import result, table


class Line(NamedTuple):
    """A row of the table: a row of a result, by its pattern and its dense steps."""

    kind: str
    name: str
    pattern: str
    dense_steps: int = 0


LINES = (
    Line("pictures", "emoji-dynamic", "dense"),
    Line("pictures", "emoji-quality", "broadcast"),
    Line("pictures", "emoji-dynamic", "topk(keep=0.2,rest=mean)", 6),
    Line("pictures", "emoji-dynamic", "na(window=29x29)", 6),
    Line("pictures", "emoji-dynamic", "topk(keep=0.2,rest=mean)"),
    Line("pictures", "emoji-dynamic", "na(window=29x29)"),
    Line("clips", "animoji-dynamic", "dense"),
    Line("clips", "animoji-quality", "broadcast"),
    Line("clips", "animoji-quality", "radial(decay=0.5)"),
    Line("clips", "animoji-dynamic", "topk(keep=0.2,rest=slope)"),
    Line("clips", "animoji-dynamic", "topk(keep=0.2,rest=mean)"),
    Line("clips", "animoji-dynamic", "na(window=3x16x16)"),
    Line("clips", "animoji-dynamic", "na(window=9x9x10)"),
)


def choosing_table() -> str:
    """Some patterns on pictures and clips, best first; those that a result lacks are left out."""
    cells = []
    for line in LINES:
        found = result(line.name)
        row = next((row for row in found["rows"].values() if _is(line, row)), None)
        if row is None:
            continue
        share = line.dense_steps / found["settings"]["steps"]
        name = f"`{line.pattern}`" + f", the first {share:.0%} of the steps dense" * (share > 0)
        right = ", ".join(f"{row[kind]['top1']:.0%}" for kind in ("seen", "unseen"))
        psnr = f"{row['psnr']:.1f} dB" if "psnr" in row else ""
        cells.append([line.kind, name, f"{row['density']:.0%}", psnr, right])
    return table(["", "attention", "pairs", "PSNR to dense", "named right: seen, unseen"], cells)


def _is(line: Line, row: dict[str, Any]) -> bool:
    return (row["pattern"], row.get("dense_steps", 0)) == (line.pattern, line.dense_steps) and "error" not in row
