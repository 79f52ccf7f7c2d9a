"""A small pack of drawn discs and squares that move or do not, for the animoji training."""

from dataclasses import replace

import PIL.Image
import PIL.ImageDraw

from scripts.train.animoji_captions import split_of
from scripts.train.animoji_data import encode_clip, write_pack
from scripts.train.animoji_sources import FRAMES
from scripts.train.emoji_captions import NEW_EMOJI
from scripts.train.emoji_sources import SIDE, Emoji
from tests.support import tiny_emoji

NEW = next(code for code in map(str, range(1000)) if split_of(Emoji(code, code, "", (), 0)) == NEW_EMOJI)
EMOJI = [*tiny_emoji.EMOJI[:8], replace(tiny_emoji.EMOJI[8], name="yellow disc", code=NEW, base=NEW)]


def frames(emoji):
    """A bar stands still, another shape moves from left to right."""
    color, shape = emoji.name.split()
    found = []
    for i in range(1 if shape == "bar" else FRAMES):
        image = PIL.Image.new("RGB", (SIDE, SIDE), "white")
        draw = PIL.ImageDraw.Draw(image)
        left = 16 + 8 * i
        paint = draw.ellipse if shape == "disc" else draw.rectangle
        paint((left, 80, left + 80, 160), fill=color)
        found.append(image)
    return found


def tiny_pack(folder):
    """Writes the pack; returns the folder."""
    write_pack([(emoji, encode_clip(frames(emoji))) for emoji in EMOJI], folder)
    return folder
