"""The tables of a page of maps as pictures."""

from __future__ import annotations

from PIL import Image, ImageDraw

from visattn.canvas import WHITE, Picture, column, text
from visattn.maps import heat
from visattn.maps.overview import Overview
from visattn.maps.svg import shades, shortened

CELL, NAMES, TOP = 32, 280, 26
# Lines are drawn so many times too large and shrunk, which smooths them.
FINE = 4


def head_table(overview: Overview) -> Picture:
    """Layers x heads: colour locality, size importance, opacity 1 - entropy."""
    most = max(site.heads for site in overview.sites)
    size = most * CELL, len(overview.sites) * CELL
    large = Image.new("RGB", (FINE * size[0], FINE * size[1]), WHITE)
    pen = ImageDraw.Draw(large)
    for i, site in enumerate(overview.sites):
        for head, (local, wide, opaque) in enumerate(shades(site, overview)):
            x, y, r = (head + 0.5) * CELL * FINE, (i + 0.5) * CELL * FINE, wide * 14 * FINE
            full = heat.color(local)
            red, green, blue = (round(255 + opaque * (value - 255)) for value in full)
            pen.ellipse((x - r, y - r, x + r, y + r), fill=(red, green, blue), outline=full, width=FINE)
    drawn = large.resize(size, Image.Resampling.LANCZOS)
    image = Image.new("RGB", (NAMES + size[0], TOP + size[1]), WHITE)
    image.paste(drawn, (NAMES, TOP))
    for head in range(most):
        image.paste(text(str(head), size=12), (NAMES + head * CELL + CELL // 2 - 4, 6))
    _names(image, overview)
    note = text("colour: near (yellow) to far (dark), size: importance, opacity: 1 - entropy", size=13)
    return column([text("every head", size=16), image, note], margin=12)


def caught_table(overview: Overview) -> Picture:
    """Modules x patterns: a square a head, dark where little of its attention is caught."""
    square, most = 12, max(site.heads for site in overview.sites)
    wide, names = most * square + 18, list(overview.patterns)
    key = column(
        [text(f"{'abcdefghijklmnopqrstuvwxyz'[i % 26]}: {name}", size=13) for i, name in enumerate(names)], gap=4
    )
    image = Image.new("RGB", (NAMES + wide * len(names), TOP + len(overview.sites) * CELL), WHITE)
    pen = ImageDraw.Draw(image)
    for column_of, name in enumerate(names):
        left = NAMES + column_of * wide
        image.paste(text("abcdefghijklmnopqrstuvwxyz"[column_of % 26], size=13), (left, 6))
        for i, site in enumerate(overview.sites):
            for head, value in enumerate(site.caught.get(name, ())):
                x, y = left + head * square, TOP + i * CELL + 10
                pen.rectangle((x, y, x + square - 2, y + square - 2), fill=heat.color(float(value)))
    _names(image, overview)
    return column(
        [text("what each pattern catches, a square a head: dark 0, yellow 1", size=16), image, key], margin=12
    )


def _names(image: Picture, overview: Overview) -> None:
    for i, site in enumerate(overview.sites):
        name = text(f"{i}  {shortened(site.site)}", size=13)
        image.paste(name, (max(0, NAMES - 10 - name.width), TOP + i * CELL + (CELL - name.height) // 2))
