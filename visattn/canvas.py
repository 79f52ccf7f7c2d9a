"""Small pictures put together to larger ones: text, rows, columns, legends. Pillow only."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

from PIL import Image, ImageDraw, ImageFont

Color = tuple[int, int, int]
Picture = Image.Image

BLACK: Color = (32, 33, 36)
WHITE: Color = (255, 255, 255)
GAP = 12


class Swatch(NamedTuple):
    """One entry of a legend."""

    color: tuple[int, ...]
    name: str


@lru_cache(maxsize=16)
def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    # Pillow's own font: the same picture on every machine.
    return ImageFont.load_default(size)


def text(words: str, *, size: int = 15, color: Color = BLACK, background: Color = WHITE) -> Picture:
    """Text as a picture that is just large enough; line breaks are kept."""
    lines = words.split("\n")
    font, step = _font(size), round(1.3 * size)
    image = Image.new(
        "RGB", (max(1, *(round(font.getlength(line)) + 2 for line in lines)), step * len(lines)), background
    )
    pen = ImageDraw.Draw(image)
    for i, line in enumerate(lines):
        pen.text((0, i * step), line, font=font, fill=color)
    return image


def column(pictures: Sequence[Picture], *, gap: int = GAP, margin: int = 0) -> Picture:
    """Pictures below each other, left-aligned."""
    width = max(p.width for p in pictures)
    height = sum(p.height for p in pictures) + gap * (len(pictures) - 1)
    image = Image.new("RGB", (width + 2 * margin, height + 2 * margin), WHITE)
    y = margin
    for picture in pictures:
        image.paste(picture, (margin, y))
        y += picture.height + gap
    return image


def row(pictures: Sequence[Picture], *, gap: int = GAP, wrap: int | None = None) -> Picture:
    """Pictures beside each other, top-aligned, in several rows where they are wider than `wrap`."""
    if wrap is not None:
        fit = max(1, (wrap + gap) // (max(p.width for p in pictures) + gap))
        return column([row(pictures[i : i + fit], gap=gap) for i in range(0, len(pictures), fit)], gap=gap)
    width = sum(p.width for p in pictures) + gap * (len(pictures) - 1)
    image = Image.new("RGB", (width, max(p.height for p in pictures)), WHITE)
    x = 0
    for picture in pictures:
        image.paste(picture, (x, 0))
        x += picture.width + gap
    return image


def legend(swatches: Sequence[Swatch]) -> Picture:
    """Coloured squares with names, below each other."""
    return column([row([Image.new("RGB", (16, 16), s.color), text(s.name, size=13)], gap=8) for s in swatches], gap=6)
