"""Captions of the animated emoji, and which of them training never sees."""

from __future__ import annotations

import random

from scripts.train import emoji_captions
from scripts.train.emoji_captions import VARIANTS
from scripts.train.emoji_sources import Emoji

MOVING, STILL = "moving", "still"
STYLE = "3d"  # all of them are drawn in it
# Words of names that end like a verb and are none.
NOUNS = frozenset(["ring", "king", "wing", "string", "sling", "ping", "earring"])


def split_of(emoji: Emoji) -> str:
    """TRAIN, NEW_PAIR (training sees pictures in other styles, but neither clip nor picture in this) or NEW_EMOJI.

    The same are new to the emoji model, with whose text encoder training starts.
    """
    return emoji_captions.split_of(emoji, STYLE)


def caption(emoji: Emoji) -> str:
    """The caption that measurements use."""
    return emoji_captions.caption(emoji, STYLE)


def captions(emoji: Emoji, kind: str, count: int = VARIANTS) -> list[str]:
    """Captions to train on: a third are `caption`, a sixth the name alone, the rest other ways; the same in every run.

    Args:
        emoji: What is shown.
        kind: MOVING or STILL.
        count: Of the captions.
    """
    chance = random.Random(f"{emoji.code} {kind}")
    plain, name = caption(emoji), emoji.name
    found = [plain] * (count // 3) + [name] * (count // 6)
    words = ("animated", "moving") if kind == MOVING else (STILL,)
    named = emoji_captions.captions(emoji, STYLE, 4 * count)[2 * count :]
    deeds = motions(name) if kind == MOVING else []
    while len(found) < count:
        word = chance.choice(words)
        others = [f"{name}, {word}", f"{word} {name}", f"{name}, {STYLE}, {word}", chance.choice(named)]
        for deed in deeds:
            doer = " ".join(each for each in name.split() if each != deed)
            others += [f"{doer}, {deed}", f"{deed} {doer}, {STYLE}" if doer else deed]
        found.append(chance.choice(others))
    return found


def motions(name: str) -> list[str]:
    """Words of a name that say what moves: "juggling" of "man juggling"."""
    return [word for word in name.split() if word.endswith("ing") and len(word) > 4 and word not in NOUNS]
