"""A line chart as inline SVG."""

from __future__ import annotations

import html
import math
from collections.abc import Callable, Mapping, Sequence

WIDTH, HEIGHT = 760, 300
LEFT, RIGHT, TOP, BOTTOM = 64, 16, 16, 44
# Colors that stay apart for color-blind readers (Okabe and Ito).
COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
# Lines with a name in the legend; more would cover the page.
MOST_NAMES = 12


def line_chart(lines: Mapping[str, Sequence[float]], x_name: str, y_name: str) -> str:
    """Values over 1, 2, 3, ... as SVG, with a legend.

    Args:
        lines: Name and values (at least 0) of each line; at least one value in all.
        x_name: What is counted.
        y_name: What the values are.
    """
    longest = max(len(values) for values in lines.values())
    step = _nice(max((v for values in lines.values() for v in values if math.isfinite(v)), default=0.0) / 4)
    top = step * max(1, math.ceil(max((v for vs in lines.values() for v in vs if math.isfinite(v)), default=0) / step))

    def x(i: float) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * ((i - 1) / (longest - 1) if longest > 1 else 0.5)

    def y(value: float) -> float:
        return HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * value / top

    parts = [*_y_axis(step, top, y, y_name), *_x_axis(longest, x, x_name)]
    for i, values in enumerate(lines.values()):
        color = COLORS[i % len(COLORS)]
        points = [(x(n), y(v)) for n, v in enumerate(values, 1) if math.isfinite(v)]
        path = " ".join(f"{a:.1f},{b:.1f}" for a, b in points)
        parts.append(f'<polyline points="{path}" fill="none" stroke="{color}" stroke-width="2"/>')
        parts += [f'<circle cx="{a:.1f}" cy="{b:.1f}" r="2.5" fill="{color}"/>' for a, b in points]
    names = list(lines)[:MOST_NAMES]
    for i, name in enumerate(names):
        height = TOP + 12 + 18 * i
        parts.append(f'<rect x="{LEFT + 14}" y="{height - 9}" width="12" height="4" fill="{COLORS[i % len(COLORS)]}"/>')
        parts.append(_words(LEFT + 32, height - 3, name, "start"))
    label = html.escape(f"{y_name} over {x_name}")
    return (
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}" role="img" aria-label="{label}" '
        f'font-size="12" fill="currentColor">{"".join(parts)}</svg>'
    )


def _nice(step: float) -> float:
    """The next of 1, 2, 2.5, 5 times a power of ten."""
    if step <= 0:
        return 0.25
    power = 10.0 ** math.floor(math.log10(step))
    return next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= step * (1 - 1e-9))


def _y_axis(step: float, top: float, y: Callable[[float], float], name: str) -> list[str]:
    parts = []
    for i in range(round(top / step) + 1):
        height = y(i * step)
        parts.append(
            f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{height:.1f}" y2="{height:.1f}" stroke="currentColor" '
            f'stroke-opacity="{0.5 if i == 0 else 0.15}"/>'
        )
        parts.append(_words(LEFT - 8, height + 4, f"{i * step:.3g}", "end"))
    middle = (TOP + HEIGHT - BOTTOM) / 2
    turned = f'transform="rotate(-90 16 {middle:.0f})"'
    return [*parts, _words(16, middle, name, "middle", turned)]


def _x_axis(longest: int, x: Callable[[float], float], name: str) -> list[str]:
    every = max(1, math.ceil(longest / 12))
    parts = [_words(x(n), HEIGHT - BOTTOM + 18, str(n), "middle") for n in range(1, longest + 1, every)]
    return [*parts, _words((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 6, name, "middle")]


def _words(x: float, y: float, words: str, anchor: str, more: str = "") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" {more}>{html.escape(words)}</text>'
