"""A schedule as pictures in one HTML page: time against quality of all that was tried, and layers x stages."""

from __future__ import annotations

import html
import math
from collections.abc import Sequence

from visattn.staged import with_precision
from visattn.tuned import Tuned
from visattn.tuning.density import density
from visattn.tuning.found import Found
from visattn.tuning.verified import in_words

WIDTH, HEIGHT, LEFT, BOTTOM, TOP, RIGHT = 720, 360, 60, 46, 16, 20
STYLE = (
    "body{font:15px/1.5 system-ui,sans-serif;max-width:900px;margin:2em auto;padding:0 1em}"
    "table{border-collapse:collapse}td,th{padding:.2em .6em;border:1px solid #ccc;text-align:left}"
    "@media(prefers-color-scheme:dark){body{background:#161616;color:#ddd}td,th{border-color:#444}}"
)


def page(tuned: Tuned, found: Found) -> str:
    """The page."""
    figures = in_words(tuned.verified)
    rows = "".join(f"<tr><th>{html.escape(name)}</th><td>{html.escape(value)}</td></tr>" for name, value in figures)
    title = f"{tuned.model}, grid {'x'.join(map(str, tuned.grid))}"
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{html.escape(title)}</title>'
        f"<style>{STYLE}</style>"
        f"<h1>{html.escape(title)}</h1><h2>Time against quality</h2>{pareto(found)}"
        f"<h2>Layers and steps</h2>{board(tuned)}<h2>Verified on samples held out</h2><table>{rows}</table></html>\n"
    )


def pareto(found: Found) -> str:
    """Every schedule that was measured: predicted time of attention, and the PSNR that the samples have."""
    points = [
        (1 / each["speedup"], each["held"], f"{each['held']:.1f} dB, {each['speedup']:.2f} times faster")
        for each in found.tried
        if each["held"] is not None and each["speedup"]
    ]
    if not points:
        return "<p>Nothing but dense attention was measured.</p>"
    lowest, highest = min(p[1] for p in points), max(p[1] for p in points)
    low, high = 5 * math.floor(lowest / 5), 5 * math.floor(highest / 5) + 5

    def x(value: float) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * min(value, 1.05) / 1.05

    def y(value: float) -> float:
        return HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * (value - low) / (high - low)

    marks = range(low, high + 1, 5)
    parts = [_line(x(0), y(db), x(1.05), y(db)) + _text(LEFT - 6, y(db) + 4, f"{db}", "end") for db in marks]
    parts += [_text(x(i / 4), HEIGHT - BOTTOM + 18, f"{i / 4:g}", "middle") for i in range(5)]
    best = _front([(a, b) for a, b, _ in points])
    path = " ".join(f"{x(a):.1f},{y(b):.1f}" for a, b in best)
    parts.append(f'<polyline points="{path}" fill="none" stroke="#0072b2" stroke-width="2"/>')
    parts += [
        f'<circle cx="{x(a):.1f}" cy="{y(b):.1f}" r="4" fill="#d55e00"><title>{html.escape(name)}</title></circle>'
        for a, b, name in points
    ]
    parts.append(_text((LEFT + WIDTH) / 2, HEIGHT - 8, "time of attention, dense = 1", "middle"))
    parts.append(_text(LEFT, 12, "dB", "end"))
    return _svg(parts, HEIGHT, "PSNR over the time of attention")


def board(tuned: Tuned) -> str:
    """Layers x steps, the darker the denser."""
    side, left = 26, 46
    rows = list(tuned.layers.items())
    wide = WIDTH - left - RIGHT
    parts = []
    for i, (layer, stages) in enumerate(rows):
        parts.append(_text(left - 6, i * side + 18, layer, "end"))
        for steps, text in stages.items():
            first, _, end = steps.partition("-")
            a, b = float(first), float(end or 1)
            share = density(with_precision(text)[0], tuned.grid)
            color = "#bbb" if share is None else f"hsl(205 70% {92 - 62 * math.sqrt(share):.0f}%)"
            name = f"layer {layer}, steps {steps}: {text}" + ("" if share is None else f", density {share:.3f}")
            parts.append(
                f'<rect x="{left + a * wide:.1f}" y="{i * side + 2}" width="{(b - a) * wide - 2:.1f}" '
                f'height="{side - 4}" fill="{color}"><title>{html.escape(name)}</title></rect>'
            )
    height = len(rows) * side + 26
    parts += [_text(left + wide * i / 4, height - 6, f"{i / 4:g}", "middle") for i in range(5)]
    return _svg(parts, height, "density by layer and share of the run")


def _front(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Those that nothing beats in both, from fast to good."""
    best: list[tuple[float, float]] = []
    for point in sorted(points):
        if not best or point[1] > best[-1][1]:
            best.append(point)
    return best


def _line(x1: float, y1: float, x2: float, y2: float) -> str:
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" stroke="currentColor" opacity="0.15"/>'


def _text(x: float, y: float, text: str, anchor: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{html.escape(text)}</text>'


def _svg(parts: Sequence[str], height: float, label: str) -> str:
    return (
        f'<svg viewBox="0 0 {WIDTH} {height}" width="100%" role="img" aria-label="{html.escape(label)}" font-size="12" '
        f'fill="currentColor">{"".join(parts)}</svg>'
    )
