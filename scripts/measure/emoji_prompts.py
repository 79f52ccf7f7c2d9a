"""Which captions the emoji models are measured on: some that training knows, and some that it never saw."""

from __future__ import annotations

import random

from scripts.train.emoji_captions import NEW_EMOJI, NEW_PAIR, TRAIN
from scripts.train.emoji_data import Pack

CAPTIONS = 100
SEEN, UNSEEN = "seen", "unseen"
KINDS = {SEEN: (TRAIN,), UNSEEN: (NEW_PAIR, NEW_EMOJI)}


def choose(pack: Pack, count: int = CAPTIONS, seed: int = 0) -> dict[str, list[int]]:
    """Indices of pictures whose captions are measured, the same for every model.

    Emoji without a skin tone, each at most once in a kind, in any style; fewer where the pack has not as many.

    Args:
        pack: The real pictures.
        count: Captions of each kind.
        seed: Of the choice.

    Returns:
        By SEEN (training had this emoji in this style) and UNSEEN (it did not).
    """
    if count < 2:
        raise ValueError(f"{count} captions: at least 2 are needed to tell one from another")
    found = {}
    for kind, splits in KINDS.items():
        order = [i for i in pack.of(*splits).tolist() if pack.pictures[i].code == pack.pictures[i].base]
        random.Random(seed).shuffle(order)
        bases: dict[str, int] = {}
        names: set[str] = set()
        for i in order:
            caption = pack.pictures[i].caption
            if pack.pictures[i].base not in bases and caption not in names:
                bases[pack.pictures[i].base] = i
                names.add(caption)
        found[kind] = list(bases.values())[:count]
    return found
