"""What trained students draw beside their teacher and their untrained patterns, and how their losses fell."""

from __future__ import annotations

import math
from collections.abc import Mapping
from html import escape
from pathlib import Path
from typing import Any

from PIL import Image

from scripts.measure.draftsman import DENSE, Student
from scripts.measure.emoji import strip_path
from visattn.canvas import column
from visattn.chart import COLORS

WIDTH, HEIGHT, LEFT, BOTTOM, TOP, RIGHT = 900, 420, 70, 60, 40, 180
SHEET_WIDTH = 1200


def draw_sheet(folder: Path, figures: Mapping[str, Any], size: int) -> list[Path]:
    """A sheet for each method: dense, then untrained and trained by sparsity, of the strips that are in the folder.

    Args:
        folder: Where the measurement put its strips.
        figures: Of `scripts.measure.trained`.
        size: Side in pixels.

    Returns:
        The sheets: FOLDER/METHOD.png.
    """
    made, trained = [], [(name, each) for name, each in figures["trained"].items() if "error" not in each]
    for method in dict.fromkeys(each["method"] for _, each in trained):
        own = sorted((each["sparsity"], name, each["pattern"]) for name, each in trained if each["method"] == method)
        students = [Student(DENSE)]
        for _, name, pattern in own:
            students += [Student(pattern), Student(pattern, Path(name) / "student.safetensors")]
        strips = [path for path in (strip_path(folder, student, size) for student in students) if path.is_file()]
        if len(strips) < 2:
            continue
        sheet = column([Image.open(path) for path in strips], gap=10, margin=8)
        if sheet.width > SHEET_WIDTH:
            sheet = sheet.resize(
                (SHEET_WIDTH, round(sheet.height * SHEET_WIDTH / sheet.width)), Image.Resampling.LANCZOS
            )
        made.append(folder / f"{method}.png")
        # A third of the bytes, and pages show it small.
        sheet.quantize(256, dither=Image.Dither.NONE).save(made[-1], optimize=True)
    return made


def draw_curves(path: Path, trained: Mapping[str, Any]) -> None:
    """A chart, as SVG, of each student's distance to its teacher's output over the share of its steps."""
    lines = {name: each["curve"] for name, each in trained.items() if len(each.get("curve", ())) > 1}
    values = [value for points in lines.values() for _, value in points if value and value > 0]
    if not values:
        return
    low, high = math.floor(math.log10(min(values)) * 5) / 5, math.ceil(math.log10(max(values)) * 5) / 5
    high = max(high, low + 0.2)
    title = "Distance of the student's output to the teacher's, while it trains"
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif" '
        f'font-size="12"><rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
        f'<text x="{LEFT}" y="20" font-size="15">{escape(title)}</text>',
        f'<text x="{LEFT}" y="{HEIGHT - 15}">steps; those of all students are in the table</text>',
    ]
    last = max(points[-1][0] for points in lines.values())

    def place(step: float, value: float) -> tuple[float, float]:
        x = LEFT + (WIDTH - LEFT - RIGHT) * step / last
        share = (math.log10(max(value, 10**low)) - low) / (high - low)
        return x, TOP + (HEIGHT - TOP - BOTTOM) * (1 - share)

    for tick in range(6):
        value = 10 ** (low + (high - low) * tick / 5)
        _, y = place(0, value)
        parts.append(f'<path d="M{LEFT} {y:.1f}H{WIDTH - RIGHT}" stroke="#ddd"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{value:.2g}</text>')
        x, _ = place(last * tick / 5, value)
        parts.append(f'<text x="{x:.1f}" y="{HEIGHT - BOTTOM + 18}" text-anchor="middle">{last * tick // 5}</text>')
    for i, (name, points) in enumerate(lines.items()):
        red, green, blue = COLORS[i % len(COLORS)]
        # Colours come round: dashes tell apart who shares one.
        dashes = "none" if i < len(COLORS) else "6 3" if i < 2 * len(COLORS) else "2 2"
        style = f'stroke="rgb({red},{green},{blue})" stroke-dasharray="{dashes}"'
        places = " ".join(f"{x:.1f},{y:.1f}" for x, y in (place(*point) for point in points))
        parts.append(f'<polyline points="{places}" fill="none" stroke-width="1.5" {style}/>')
        y, x = TOP + 16 * i + 8, WIDTH - RIGHT + 12
        parts.append(f'<path d="M{x} {y}h24" stroke-width="2" {style}/><text x="{x + 30}" y="{y + 4}">{name}</text>')
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join([*parts, "</svg>"]) + "\n", encoding="utf-8")
