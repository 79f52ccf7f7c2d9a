"""A small pack of drawn discs and squares, in which the emoji training learns something within seconds."""

import contextlib
import io

import PIL.Image
import PIL.ImageDraw
import pytest

from scripts.measure import emoji_encoder_model
from scripts.train.emoji_data import write_pack
from scripts.train.emoji_sources import SIDE, STYLES, Emoji

COLORS = ("red", "green", "blue", "orange", "purple", "black", "brown", "pink")
SHAPES = ("disc", "square", "bar")
EMOJI = [
    Emoji(f"{i:x}{j:x}", f"{i:x}{j:x}", f"{color} {shape}", (color, shape, "sign"), 0)
    for i, color in enumerate(COLORS)
    for j, shape in enumerate(SHAPES)
]


def picture(emoji, style):
    image = PIL.Image.new("RGB", (SIDE, SIDE), "white")
    draw = PIL.ImageDraw.Draw(image)
    color, shape = emoji.name.split()
    box = (16, 96, 240, 160) if shape == "bar" else (48, 48, 208, 208)
    paint = draw.ellipse if shape == "disc" else draw.rectangle
    if style == "high contrast":
        paint(box, outline="black", width=16)
    else:
        paint(box, fill=color)
    return image


def png(image):
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def drawn():
    return [(emoji, style, png(picture(emoji, style))) for style in STYLES for emoji in EMOJI]


def tiny_pack(folder):
    """Writes the pack; returns the folder."""
    write_pack(drawn(), folder)
    return folder


@contextlib.contextmanager
def narrow_encoder():
    """Encoders of pictures that are made or loaded meanwhile have few channels, for tests of what uses them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(emoji_encoder_model, "STEM", 8)
        patch.setattr(emoji_encoder_model, "STAGES", ((8, 1),))
        yield
