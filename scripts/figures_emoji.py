"""Tables of what patterns cost the emoji models, and of what students win back; of the results that are there."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

from scripts.results import RESULTS, likeness, result, seconds, table, under_load

DENSE, SHIPPED = "dense", "shipped"
KINDS = ("seen", "unseen")
# Distances of clips to real ones, where they are measured.
NEAR = {"frechet": "Frechet: frames", "frechet_motion": "Frechet: motion"}
# Tables by name, and the result that each is made of.
SOURCES = {
    "emoji": "generate-emoji",
    "emoji-quality": "emoji-quality",
    "emoji-students": "emoji-quality",
    "emoji-quality-512": "emoji-quality-512",
    "emoji-students-512": "emoji-quality-512",
    "animoji-quality": "animoji-quality",
}


def emoji_tables() -> dict[str, Callable[[], str]]:
    """The tables whose results have been measured; those of students need students."""
    makers = {"emoji": pictures_table, "emoji-quality": quality_table, "emoji-students": students_table}
    makers["emoji-quality-512"] = partial(quality_table, "emoji-quality-512")
    makers["emoji-students-512"] = partial(students_table, "emoji-quality-512")
    makers["animoji-quality"] = clips_table
    known = {name: make for name, make in makers.items() if (RESULTS / f"{SOURCES[name]}.json").is_file()}
    without = [name for name in known if "students" in name and not _students(result(SOURCES[name]))]
    return {name: make for name, make in known.items() if name not in without}


def pictures_table() -> str:
    """What the demo draws, and one picture of twice the side."""
    rows, names = (
        [],
        [name for name in ("generate-emoji", "generate-emoji-512") if (RESULTS / f"{name}.json").is_file()],
    )
    for name in names:
        report = result(name)
        tokens = f"{math.prod(report['attention']['sites'][0]['grid']):,}"
        rows.append([tokens, "dense", "100 %", *seconds(report, "dense"), ""])
        steps, whole = report["settings"]["dense_steps"], report["settings"]["steps"]
        pattern = f"`{report['pattern']}`, the first {steps} of {whole} steps dense"
        rows.append([tokens, pattern, f"{report['density']:.1%}", *seconds(report, "sparse"), likeness(report)])
    head = ["tokens", "attention", "density", "time per image", "of it attention", "PSNR, SSIM to dense"]
    made = result(names[0])
    where = f"On {made['device_name']}, {made['threads']} threads, {made['dtype']}, seed {made['settings']['seed']}."
    return f"{table(head, rows)}\n\n{where}{under_load(*names)}"


def quality_table(name: str = "emoji-quality") -> str:
    """Every pattern with the model's own weights, and real pictures as the judge names them."""
    found = result(name)
    rows = [
        ["real pictures", "", "", "", *(_top(found["real"][kind]) for kind in KINDS), _distances(found["real"]), ""]
    ]
    for row in _measured(found, SHIPPED):
        density = "" if row["density"] is None else f"{row['density']:.1%}"
        times = [_milliseconds(row["attention_seconds"]), _milliseconds(row["seconds"])]
        tops = [_top(row[kind]) for kind in KINDS]
        rows.append([f"`{row['pattern']}`", density, *times, *tops, _distances(row), _likeness(row)])
    head = [
        "attention",
        "density",
        "attention per image",
        "image",
        "seen: top 1",
        "unseen: top 1",
        "Frechet",
        "to dense",
    ]
    return table(head, rows) + _splits(found) + _failures(found)


def clips_table() -> str:
    """Every pattern on clips with the model's own weights, and real clips as the judge names them."""
    found = result("animoji-quality")
    rows = [["real clips", "", "", "", *_of_clips(found["real"]), ""]]
    for row in _measured(found, SHIPPED):
        density = "" if row["density"] is None else f"{row['density']:.1%}"
        times = [_milliseconds(row["attention_seconds"]), _milliseconds(row["seconds"])]
        rows.append([f"`{row['pattern']}`", density, *times, *_of_clips(row), _likeness(row)])
    head = ["attention", "density", "attention per clip", "clip", "seen: top 1", "unseen: top 1"]
    head += [
        *(title for name, title in NEAR.items() if name in found["real"]["seen"]),
        "movement",
        "flicker",
        "to dense",
    ]
    return table(head, rows) + _splits(found) + _failures(found)


def _of_clips(row: dict[str, Any]) -> list[str]:
    """What the judge says, and how much values change and flicker from frame to frame, in 255ths."""
    found = [_top(row[kind]) for kind in KINDS]
    near = [name for name in NEAR if name in row["seen"]]
    found += [", ".join(f"{row[kind][name]:.3f}" for kind in KINDS) for name in near]
    return found + [", ".join(f"{row[kind][name] * 255:.1f}" for kind in KINDS) for name in ("movement", "flicker")]


def students_table(name: str = "emoji-quality") -> str:
    """Every student before and after distillation, and how much of the gap to the dense model it won back."""
    found = result(name)
    plain = {row["pattern"]: row for row in _measured(found, SHIPPED)}
    dense, rows = plain[DENSE], []
    for row in _students(found):
        before = plain[row["pattern"]]
        cells = [f"`{row['pattern']}`"]
        for kind in KINDS:
            first, last, whole = (each[kind]["top1"] for each in (before, row, dense))
            cells.append(f"{first:.0%} to {last:.0%}{_recovered(first, last, whole)}")
        first, last, whole = (sum(each[kind]["frechet"] for kind in KINDS) / 2 for each in (before, row, dense))
        cells.append(f"{first:.3f} to {last:.3f}{_recovered(first, last, whole)}")
        cells.append(f"{before['psnr']:.1f} to {row['psnr']:.1f} dB")
        rows.append(cells)
    tops = [f"{dense[kind]['top1']:.0%}" for kind in KINDS]
    distance = f"{sum(dense[kind]['frechet'] for kind in KINDS) / 2:.3f}"
    rows.insert(0, ["dense (teacher)", *tops, distance, ""])
    return table(["attention", "seen: top 1", "unseen: top 1", "Frechet, mean", "PSNR to the teacher"], rows)


def _measured(found: dict[str, Any], weights: str) -> list[dict[str, Any]]:
    return [row for row in found["rows"].values() if row["weights"] == weights and "error" not in row]


def _students(found: dict[str, Any]) -> list[dict[str, Any]]:
    """Rows of students whose pattern, and dense attention, were measured without training too."""
    plain = {row["pattern"] for row in _measured(found, SHIPPED)}
    rows = [row for row in found["rows"].values() if row["weights"] != SHIPPED and "error" not in row]
    return [row for row in rows if {row["pattern"], DENSE} <= plain]


def _top(kind: dict[str, Any]) -> str:
    low, high = kind["top1_interval"]
    return f"{kind['top1']:.0%} ({low:.0%} to {high:.0%})"


def _distances(row: dict[str, Any]) -> str:
    return ", ".join(f"{row[kind]['frechet']:.3f}" for kind in KINDS)


def _milliseconds(seconds: float | None) -> str:
    """A time in a cell; nothing where others used the device too."""
    if seconds is None:
        return ""
    return f"{seconds * 1000:.0f} ms" if seconds < 1 else f"{seconds:.2f} s"


def _likeness(row: dict[str, Any]) -> str:
    if "psnr" not in row:
        return ""
    lpips = "" if row["lpips"] is None else f", LPIPS {row['lpips']:.3f}"
    return f"{row['psnr']:.1f} dB, {row['ssim']:.3f}{lpips}"


def _recovered(before: float, after: float, whole: float) -> str:
    """Share of a gap that was closed, in words; nothing where there was none."""
    return f" ({(after - before) / (whole - before):.0%} of the gap)" if abs(whole - before) > 0.005 else ""


def _splits(found: dict[str, Any]) -> str:
    """What of the unseen captions the dense model draws right, told apart; nothing where that was not measured."""
    dense = next((row for row in _measured(found, SHIPPED) if row["pattern"] == DENSE), {})
    parts = dense.get("unseen", {}).get("splits", {})
    names = {"new pair": "emoji that training saw in other styles only", "new emoji": "emoji that it never saw"}
    known = {name: parts[split] for split, name in names.items() if split in parts}
    shares = [f"{_top(part)} of {part['pictures']} {name}" for name, part in known.items()]
    return f"\n\nUnseen captions, dense: {' and '.join(shares)}." if shares else ""


def _failures(found: dict[str, Any]) -> str:
    lines = [f"`{row['pattern']}` did not run: {row['error']}." for row in found["rows"].values() if "error" in row]
    return "".join(f"\n\n{line}" for line in lines)
