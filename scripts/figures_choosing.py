"""The tables of docs/choosing.md, from the larger ones: what patterns do to the embedded models, and their speed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from scripts.results import result, table
from visattn import Layout, parse
from visattn.plans import density_of


class Line(NamedTuple):
    """A row of the table: a row of a result, by its pattern and its dense steps."""

    kind: str
    name: str
    pattern: str
    dense_steps: int = 0


LINES = (
    Line("pictures", "emoji-dynamic", "dense"),
    Line("pictures", "emoji-dynamic", "topk(keep=0.2,rest=slope,block=8x8,key_block=2x4)", 6),
    Line("pictures", "emoji-quality", "broadcast"),
    Line("pictures", "emoji-dynamic", "topk(keep=0.2,rest=mean)", 6),
    Line("pictures", "emoji-dynamic", "na(window=29x29)", 6),
    Line("pictures", "emoji-dynamic", "topk(keep=0.2,rest=mean)"),
    Line("pictures", "emoji-dynamic", "na(window=29x29)"),
    Line("clips", "animoji-dynamic", "dense"),
    Line("clips", "animoji-quality", "broadcast"),
    Line("clips", "animoji-quality", "radial(decay=0.5)"),
    Line("clips", "animoji-dynamic", "topk(keep=0.2,rest=slope,block=4x4x4,key_block=2x2x2)"),
    Line("clips", "animoji-dynamic", "topk(keep=0.2,rest=slope)"),
    Line("clips", "animoji-dynamic", "topk(keep=0.2,rest=mean)"),
    Line("clips", "animoji-dynamic", "na(window=3x16x16)"),
    Line("clips", "animoji-dynamic", "na(window=9x9x10)"),
)

# A result, and a pattern whose calls on SPEED_GRID it has; the text says what the pattern is for.
SPEED_GRID = (256, 256)
SPEEDS = (
    ("h200-hybrid", "sla(keep=0.05, block=8x16, key_block=8x8)", ", for trained models"),
    ("h200", "na(window=80x80,stride=16x16)", ""),
    ("h200-dynamic", "topk(keep=0.1, block=8x16, key_block=8x8)", ""),
    ("h200", "na(window=80x80)", ""),
    ("h200-dynamic", "topk(keep=0.1, block=8x16, key_block=8x8, rest=mean)", ""),
    ("h200-dynamic", "topk(keep=0.1)", ""),
    ("h200-dynamic", "topk(keep=0.1, rest=slope)", ""),
    ("h200-dynamic", "topk(keep=0.1, block=8x8, key_block=4x4, rest=slope)", ""),
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


def speed_table() -> str:
    """How many times faster than cuDNN's dense attention some patterns are on a large grid, fastest first."""
    layout, rows = Layout(SPEED_GRID), []
    for name, pattern, what in SPEEDS:
        case = next(case for case in result(name)["cases"].values() if _measured(case, pattern, str(layout)))
        # Of a pattern with two branches, the share that the softmax branch lists.
        lists = getattr(parse(pattern), "front", parse(pattern))
        rows.append((_times_faster(case), f"`{pattern}`{what}", f"{density_of(lists, layout):.0%}"))
    rows.sort(key=lambda row: -row[0])
    return table(["pattern", "pairs", "times faster"], [[name, pairs, f"{times:.1f}"] for times, name, pairs in rows])


def _measured(case: dict[str, Any], pattern: str, layout: str) -> bool:
    return (case["pattern"], case["layout"]) == (pattern, layout) and "error" not in case.get("ours", {})


def _times_faster(case: dict[str, Any]) -> float:
    """A forward call against cuDNN's, in each of the forms that results have."""
    if "ms" in case:
        return case["ms"]["cudnn"] / case["ms"]["ours"]
    own = case["ours"] if "ours" in case else case["triton"]
    return case["cudnn"]["forward_ms"] / own["forward_ms"]


def choosing_tables() -> dict[str, Callable[[], str]]:
    """The tables by name."""
    return {"choosing": choosing_table, "choosing-speed": speed_table}
