"""Tables and charts of tuned schedules against single patterns; of the results that are there."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from html import escape
from pathlib import Path
from typing import Any

from scripts.results import RESULTS, ROOT, table

WIDTH, HEIGHT, LEFT, BOTTOM, TOP, RIGHT = 720, 400, 56, 50, 36, 16
TUNED, SINGLE = "#0072b2", "#d55e00"


def tuned_tables() -> dict[str, Callable[[], str]]:
    """The tables, which say so where nothing has been measured."""
    return {"tuned": tuned_table, "tuned-timm": timm_table}


def results() -> dict[str, dict[str, Any]]:
    """What `scripts.measure.tuned` measured, by name."""
    import json

    return {path.stem: json.loads(path.read_text()) for path in sorted(RESULTS.glob("tuned-*.json"))}


def tuned_table() -> str:
    """Each bound: the tuned schedule, the best single pattern and dense attention, timed in turns."""
    rows, where = [], []
    for name, found in results().items():
        about = found["about"]
        grid, compared = "x".join(map(str, about["grid"])), 0
        for bound, row in found["bounds"].items():
            if "times" not in row:
                continue
            compared += 1
            tuned, single, dense = (
                1e3 * row["times"][kind]["attention_seconds"] for kind in ("tuned", "single", "dense")
            )
            figures, best = row["verified"], row["single"]
            parts = best["dense_stages"]
            pattern = f"`{best['pattern']}`" + (f", {parts} part{'s' * (parts > 1)} dense" if parts else "")
            rows.append(
                [
                    f"{about['model']}, {grid}",
                    f"{bound} dB",
                    f"**{tuned:.2f} ms**" if tuned < min(single, dense) else f"{tuned:.2f} ms",
                    f"{single:.2f} ms: {pattern}",
                    f"{dense:.2f} ms",
                    f"{round(1 - tuned / min(single, dense), 2) + 0.0:.0%}",
                    f"{figures['psnr_mean']:.1f}, {figures['psnr_worst']:.1f} dB" if figures["psnr_mean"] else "equal",
                    f"{row['held_in']} of {figures['samples']}",
                ]
            )
        patterns = len({each["pattern"] for each in found.get("grid", ())})
        where.append(
            f"`{name}`: {about['device']}, {about['dtype']}, {about['steps']} steps, best of {patterns} single patterns"
        )
        assert compared
    if not rows:
        return "Not measured."
    head = [
        "model, grid",
        "bound",
        "tuned",
        "best single pattern",
        "dense",
        "less than both",
        "PSNR: mean, worst",
        "held",
    ]
    return f"{table(head, rows)}\n\n{'; '.join(where)}."


def timm_table() -> str:
    """Tuned schedules of timm models, verified on pictures that were held out."""
    import json

    rows = []
    for path in sorted(RESULTS.glob("timm-tuned-*.json")):
        found = json.loads(path.read_text())
        about, figures = found["about"], found["verified"]
        patterns = [name for stages in found["layers"].values() for name in stages.values()]
        lost = (
            f"{figures['accuracy_lost']:+.2f} points of {figures['accuracy_dense']:.1%}"
            if "accuracy_lost" in figures
            else ""
        )
        seen = lost or f"{figures['snr_mean']:.1f}, {figures['snr_worst']:.1f} dB"
        tuned, dense = (1e3 * figures[f"attention_seconds{twin}"] for twin in ("", "_dense"))
        rows.append(
            [
                f"{about['model']}, {'x'.join(map(str, about['grid']))}",
                f"{about['device']}, {about['dtype']}",
                found["goal"],
                f"{sum(name != 'dense' for name in patterns)} of {len(patterns)}",
                f"{tuned:.2f} ms",
                f"{dense:.2f} ms",
                f"{1 - tuned / dense:.0%}",
                f"{seen}, {figures['samples']} pictures",
            ]
        )
    head = [
        "model, grid",
        "device",
        "goal",
        "layers with a pattern",
        "attention",
        "dense",
        "less",
        "held out: lost, or SNR mean and worst",
    ]
    return table(head, rows) if rows else "Not measured."


def draw(found: dict[str, Any], path: Path) -> None:
    """Write a chart as SVG: the PSNR that 95 % of the samples have, over the time of attention, dense = 1."""
    dense = next(row["times"]["dense"]["attention_seconds"] for row in found["bounds"].values() if "times" in row)
    tried = [
        (each["attention_seconds"], each["held"]) for row in found["bounds"].values() for each in row.get("tried", ())
    ]
    singles = [(row["attention_seconds"], _held(row["psnr"])) for row in found.get("grid", ()) if "psnr" in row]
    lines = {"tuned": (tried, TUNED), "one pattern everywhere": (singles, SINGLE)}
    points = {
        name: ([(t / dense, q) for t, q in some if q is not None and t / dense <= 1.2], color)
        for name, (some, color) in lines.items()
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(_svg(points, found["about"]), encoding="utf-8")


def _held(psnr: Sequence[float | None]) -> float | None:
    known = sorted(value for value in psnr if value is not None)
    return known[int(0.05 * len(psnr) + 1e-9)] if known else None


def _svg(points: dict[str, tuple[list[tuple[float, float]], str]], about: dict[str, Any]) -> str:
    every = [quality for some, _ in points.values() for _, quality in some]
    low, high = 5 * int(min(every) // 5), 5 * int(max(every) // 5) + 5

    def x(time: float) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * time / 1.2

    def y(quality: float) -> float:
        return HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * (quality - low) / (high - low)

    title = f"{about['model']}, {'x'.join(map(str, about['grid']))} tokens, {about['device']}"
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif" '
        f'font-size="12"><rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
        f'<text x="{LEFT}" y="20" font-size="14">{escape(title)}</text>',
        f'<text x="{LEFT}" y="{HEIGHT - 12}">time of attention, dense = 1; upward the PSNR in dB to dense that 95 % of '
        "the samples have</text>",
    ]
    for db in range(low, high + 1, 5):
        parts.append(f'<path d="M{LEFT} {y(db):.1f}H{WIDTH - RIGHT}" stroke="#ddd"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{y(db) + 4:.1f}" text-anchor="end">{db}</text>')
    for tick in range(0, 13, 2):
        parts.append(
            f'<text x="{x(tick / 10):.1f}" y="{HEIGHT - BOTTOM + 16}" text-anchor="middle">{tick / 10:g}</text>'
        )
    for i, (name, (some, color)) in enumerate(points.items()):
        parts += [f'<circle cx="{x(t):.1f}" cy="{y(q):.1f}" r="3" fill="{color}" opacity="0.6"/>' for t, q in some]
        front, best = [], -1e9
        for t, q in sorted(some):
            if q > best:
                front, best = [*front, f"{x(t):.1f},{y(q):.1f}"], q
        parts.append(f'<polyline points="{" ".join(front)}" fill="none" stroke="{color}" stroke-width="2"/>')
        parts.append(f'<text x="{LEFT + 12}" y="{TOP + 14 + 16 * i}" fill="{color}">{escape(name)}</text>')
    return "\n".join([*parts, "</svg>"]) + "\n"


def draw_all() -> None:
    """Write the chart of each result into docs/pictures."""
    for name, found in results().items():
        draw(found, ROOT / "docs" / "pictures" / f"{name}.svg")
