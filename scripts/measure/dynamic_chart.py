"""A line chart of attention caught against density, as SVG: text and lines alone, sharp at any size."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path

from visattn.chart import COLORS

WIDTH, HEIGHT, LEFT, BOTTOM, TOP, RIGHT = 900, 480, 60, 60, 40, 250
# Densities that have a line; the axis is logarithmic.
TICKS = (0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 1.0)


def draw_chart(path: Path, title: str, lines: Mapping[str, Sequence[tuple[float, float]]]) -> None:
    """Write a chart of lines of (density, mass)."""
    lowest = math.floor(10 * min(mass for points in lines.values() for _, mass in points)) / 10
    thinnest = min(TICKS[0], *(density for points in lines.values() for density, _ in points))

    def across(density: float) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * (1 - math.log(density) / math.log(thinnest))

    def down(mass: float) -> float:
        return TOP + (HEIGHT - TOP - BOTTOM) * (1 - mass) / (1 - lowest)

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif" '
        f'font-size="12"><rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
        f'<text x="{LEFT}" y="20" font-size="15">{escape(title)}</text>',
        f'<text x="{LEFT}" y="{HEIGHT - 15}">density: listed share of the pairs of grid tokens; '
        "upward the share of the exact attention on what is listed</text>",
    ]
    for tick in TICKS:
        x = across(tick)
        parts.append(f'<path d="M{x:.1f} {TOP}V{HEIGHT - BOTTOM}" stroke="#ddd"/>')
        parts.append(f'<text x="{x:.1f}" y="{HEIGHT - BOTTOM + 16}" text-anchor="middle">{tick:.0%}</text>')
    for step in range(round(10 * lowest), 11):
        y = down(step / 10)
        parts.append(f'<path d="M{LEFT} {y:.1f}H{WIDTH - RIGHT}" stroke="#ddd"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{step / 10:.0%}</text>')
    for i, (name, points) in enumerate(lines.items()):
        # Colours come round: dashes tell apart who shares one.
        red, green, blue = COLORS[i % len(COLORS)]
        style = f'stroke="rgb({red},{green},{blue})" stroke-dasharray="{"none" if i < len(COLORS) else "6 3"}"'
        places = " ".join(f"{across(d):.1f},{down(m):.1f}" for d, m in sorted(points))
        parts.append(f'<polyline points="{places}" fill="none" stroke-width="2" {style}/>')
        y, x = TOP + 18 * i + 8, WIDTH - RIGHT + 16
        parts.append(
            f'<path d="M{x} {y}h28" stroke-width="2" {style}/><text x="{x + 36}" y="{y + 4}">{escape(name)}</text>'
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join([*parts, "</svg>"]) + "\n", encoding="utf-8")
