"""A line chart of time against tokens on logarithmic axes. Pillow only."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from PIL import Image, ImageDraw

from visattn.canvas import GAP, WHITE, Color, Picture, Swatch, column, legend, row, text

WIDTH, HEIGHT = 640, 420
LEFT, BOTTOM, TOP, RIGHT = 74, 34, 10, 14
GRID: Color = (225, 227, 230)
# Okabe and Ito's colours, which people with any colour vision can tell apart; dense first, in grey.
COLORS: tuple[Color, ...] = (
    (110, 110, 110),
    (213, 94, 0),
    (0, 114, 178),
    (0, 158, 115),
    (204, 121, 167),
    (230, 159, 0),
    (86, 180, 233),
    (150, 120, 60),
)


class Point(NamedTuple):
    """A measurement: tokens, median seconds, and their spread."""

    tokens: int
    seconds: float
    low: float
    high: float


class _Axis:
    """Positions on a logarithmic axis whose ends are whole powers of `base` around the values."""

    def __init__(self, values: Sequence[float], start: int, stop: int, base: int) -> None:
        logs = [math.log(value, base) for value in values]
        self.base, self.start, self.stop = base, start, stop
        self.low, self.high = math.floor(min(logs) + 1e-9), math.ceil(max(logs) - 1e-9)
        if self.low == self.high:
            self.low, self.high = self.low - 1, self.high + 1

    def at(self, value: float) -> float:
        share = (math.log(value, self.base) - self.low) / (self.high - self.low)
        return self.start + share * (self.stop - self.start)

    def ticks(self) -> list[float]:
        return [float(self.base) ** i for i in range(self.low, self.high + 1)]


def chart(title: str, series: Mapping[str, Sequence[Point]]) -> Picture:
    """Time against tokens, one line per backend, with whiskers for the spread.

    Args:
        title: What was measured.
        series: Points by backend, at least one in all.

    Raises:
        ValueError: If there is no point.
    """
    points = [point for line in series.values() for point in line]
    if not points:
        raise ValueError(f"nothing was measured on {title}, so there is nothing to plot")
    x = _Axis([p.tokens for p in points], LEFT, WIDTH - RIGHT, 2)
    y = _Axis([s for p in points for s in (p.low, p.high)], HEIGHT - BOTTOM, TOP, 10)
    image = _frame(x, y)
    # Lines are drawn three times too large and shrunk, which smooths them.
    large = image.resize((3 * WIDTH, 3 * HEIGHT), Image.Resampling.NEAREST)
    pen = ImageDraw.Draw(large)
    for color, line in zip(_colors(series), series.values(), strict=True):
        _draw_line(pen, x, y, sorted(line), color)
    drawn = large.resize((WIDTH, HEIGHT), Image.Resampling.LANCZOS)
    _label(drawn, x, y)
    swatches = [Swatch(color, name) for color, name in zip(_colors(series), series, strict=True)]
    return column([text(title, size=17), row([drawn, legend(swatches)], gap=2 * GAP)], margin=2 * GAP)


def _colors(series: Mapping[str, Sequence[Point]]) -> list[Color]:
    return [COLORS[i % len(COLORS)] for i in range(len(series))]


def _frame(x: _Axis, y: _Axis) -> Picture:
    image = Image.new("RGB", (WIDTH, HEIGHT), WHITE)
    pen = ImageDraw.Draw(image)
    for tick in x.ticks():
        pen.line([(x.at(tick), y.start), (x.at(tick), y.stop)], fill=GRID)
    for tick in y.ticks():
        pen.line([(x.start, y.at(tick)), (x.stop, y.at(tick))], fill=GRID)
    return image


def _draw_line(pen: ImageDraw.ImageDraw, x: _Axis, y: _Axis, line: Sequence[Point], color: Color) -> None:
    places = [(3 * x.at(p.tokens), 3 * y.at(p.seconds)) for p in line]
    if len(places) > 1:
        pen.line(places, fill=color, width=6, joint="curve")
    for (across, down), point in zip(places, line, strict=True):
        pen.ellipse((across - 10, down - 10, across + 10, down + 10), fill=color)
        pen.line([(across, 3 * y.at(point.low)), (across, 3 * y.at(point.high))], fill=color, width=4)


def _label(image: Picture, x: _Axis, y: _Axis) -> None:
    for tick in x.ticks():
        label = text(f"{tick:.0f}", size=12)
        image.paste(label, (round(x.at(tick) - label.width / 2), HEIGHT - BOTTOM + 4))
    for tick in y.ticks():
        label = text(duration(tick), size=12)
        image.paste(label, (LEFT - label.width - 6, round(y.at(tick) - label.height / 2)))
    name = text("tokens (time of one call upward)", size=12)
    image.paste(name, ((WIDTH - name.width) // 2, HEIGHT - name.height))


def duration(seconds: float) -> str:
    """Seconds in a readable unit."""
    for factor, unit in ((1, "s"), (1e3, "ms"), (1e6, "us")):
        if seconds * factor >= 0.9995:
            return f"{seconds * factor:.3g} {unit}"
    return f"{seconds * 1e9:.3g} ns"
