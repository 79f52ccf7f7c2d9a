"""Where the animated emoji come from, and which frames of each are taken.

Four npm packages that LobeHub publishes under the MIT licence, beside the names of `emoji_sources`. Frames are composed
on white. About half of the files are one picture: emoji that nobody has animated.
"""

from __future__ import annotations

import io
import tarfile
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

import PIL.Image

from scripts.train.emoji_sources import Emoji, archive_name, on_white, plain_code, wanted_emoji

PACKAGES = {
    "@lobehub/fluent-emoji-anim-1@1.0.0": "ff89b7d6f02e644438694279a7170e5393d592e2726b9e464715192fbfb380b9"
    "71657a73cc4f233eaa43ca1648084de7e3b9d2fd8f4ce7fbcb762ce2f36d3540",
    "@lobehub/fluent-emoji-anim-2@1.0.0": "4bacb37f44595eb41b5ddc425ae1c0f410282dd0519367e55fe9dee133c6107f"
    "ea029c22b0200a1e80001a3292953637395799f5beedfcd11b9a98dac2741824",
    "@lobehub/fluent-emoji-anim-3@1.0.0": "53345250332375f76df6f111e5b8631e43ea81cdc41207c6b58b3a9ddbe2cce4"
    "ef40ec58439ee8c36453916483671c16df45f8118062d9e5934bb0970c3a05b2",
    "@lobehub/fluent-emoji-anim-4@1.0.0": "208925e73b527751ebcef203b7fb86b05a02d563835d1758ab9b913ab9e4caa8"
    "bd0db4e811c2759e563ce8f9e85177854bd9c10a71df898937a2e48419384598",
}
FRAMES = 16
TONES = (0, 1, 3, 5)


def read_clips(names: Path, folder: Path) -> Iterator[tuple[Emoji, list[PIL.Image.Image]]]:
    """Every emoji that is taken, and its frames at 256x256 pixels: FRAMES of one that moves, or one.

    Args:
        names: Folder with the packages of `emoji_sources`.
        folder: Folder with the packages of this module.
    """
    wanted = wanted_emoji(names)
    for package in PACKAGES:
        with tarfile.open(folder / archive_name(package)) as archive:
            for member in archive:
                emoji = wanted.get(plain_code(Path(member.name).stem)) if member.name.endswith(".webp") else None
                if emoji is not None and emoji.tone in TONES:
                    file: Any = archive.extractfile(member)
                    yield emoji, frames_of(PIL.Image.open(io.BytesIO(file.read())))


def frames_of(picture: PIL.Image.Image) -> list[PIL.Image.Image]:
    """FRAMES pictures on white that a moving picture shows at equal distances of one loop, or its only one."""
    count = getattr(picture, "n_frames", 1)
    if count == 1:
        return [on_white(picture)]
    shown, durations = [], []
    for i in range(count):
        picture.seek(i)
        shown.append(picture.copy())  # which also decodes, and a duration is known only then
        durations.append(picture.info["duration"])
    return [on_white(shown[i]) for i in picked(durations)]


def picked(durations: Sequence[float], count: int = FRAMES) -> list[int]:
    """The frames that are shown at `count` equally distant times of a loop, from its start."""
    ends = list(accumulate(durations))
    if ends[-1] <= 0:
        return [i * len(durations) // count for i in range(count)]
    return [min(bisect_right(ends, ends[-1] * i / count), len(ends) - 1) for i in range(count)]
