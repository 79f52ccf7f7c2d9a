"""Fetches the animated emoji and packs them small, and reads such a pack.

    python -m scripts.train.animoji_data --sources out/emoji-sources --out out/animoji-data

The pack is `clips.safetensors`: for each clip its 16 frames of 64x64 pixels as one WebP sheet of 4x4 frames, or the one
frame of an emoji that does not move, and every caption's tokens. The tokenizer is that of the emoji model, whose text
encoder reads the captions. Needs npm, and 730 MB for the packages.
"""

from __future__ import annotations

import argparse
import io
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import PIL.Image
import torch

from scripts import cli
from scripts.train.animoji_captions import MOVING, STILL, STYLE, caption, captions, split_of
from scripts.train.animoji_sources import FRAMES, PACKAGES, read_clips
from scripts.train.emoji_captions import TRAIN, shipped_tokenizer, split_of_base
from scripts.train.emoji_data import Pack, Picture, load_pictures, save_pictures, tokens_of
from scripts.train.emoji_sources import Emoji, fetch

FILE = "clips.safetensors"
SIDE = 64
QUALITY = 70
COLUMNS = 4
STILL_WEIGHT = 0.4  # what does not move teaches looks and captions, but no motion


def pack(names: Path, sources: Path, out: Path) -> int:
    """Decodes and packs every clip; returns their number.

    Args:
        names: Folder with the packages of `emoji_sources`.
        sources: Folder with the packages of `animoji_sources`.
        out: Folder of the pack.
    """
    clips = [(emoji, encode_clip(frames)) for emoji, frames in read_clips(names, sources)]
    return write_pack(clips, out)


def write_pack(clips: Sequence[tuple[Emoji, tuple[str, bytes]]], out: Path) -> int:
    """Writes a pack of encoded clips; returns their number."""
    tones: dict[str, int] = defaultdict(int)
    for emoji, _ in clips:
        tones[emoji.base] += bool(emoji.tone)
    pictures = [
        Picture(
            emoji.code,
            emoji.base,
            kind,
            split_of(emoji),
            caption(emoji),
            (STILL_WEIGHT if kind == STILL else 1.0) / (tones[emoji.base] if emoji.tone else 1),
        )
        for emoji, (kind, _) in clips
    ]
    texts = [captions(emoji, kind) for emoji, (kind, _) in clips]
    out.mkdir(parents=True, exist_ok=True)
    tokens = tokens_of(shipped_tokenizer(), pictures, texts)
    save_pictures(out / FILE, pictures, [data for _, (_, data) in clips], tokens)
    return len(pictures)


def encode_clip(frames: Sequence[PIL.Image.Image]) -> tuple[str, bytes]:
    """Whether a clip moves, and its frames as WebP: one, or a sheet of COLUMNS in a row."""
    small = [frame.reduce(frame.width // SIDE) for frame in frames]
    if all(frame.tobytes() == small[0].tobytes() for frame in small):
        small = small[:1]
    columns = min(COLUMNS, len(small))
    sheet = PIL.Image.new("RGB", (SIDE * columns, SIDE * (len(small) // columns)))
    for i, frame in enumerate(small):
        sheet.paste(frame, (SIDE * (i % columns), SIDE * (i // columns)))
    file = io.BytesIO()
    sheet.save(file, "WEBP", quality=QUALITY, method=6)
    return STILL if len(small) == 1 else MOVING, file.getvalue()


def decode_clip(data: bytes) -> np.ndarray:
    """[FRAMES, 3, SIDE, SIDE] uint8 of what `encode_clip` made; one frame is repeated."""
    sheet = np.asarray(PIL.Image.open(io.BytesIO(data)).convert("RGB"))
    rows, columns = (side // SIDE for side in sheet.shape[:2])
    frames = sheet.reshape(rows, SIDE, columns, SIDE, 3).transpose(0, 2, 4, 1, 3).reshape(-1, 3, SIDE, SIDE)
    return np.broadcast_to(frames, (FRAMES, *frames.shape[1:])) if len(frames) == 1 else frames


def load_pack(folder: Path, device: str | torch.device = "cpu", threads: int = 8, clips: bool = True) -> Pack:
    """Reads a pack: `pixels` is [N, FRAMES, 3, SIDE, SIDE] uint8, `style` is MOVING or STILL; captions alone if asked.

    Raises:
        ValueError: If there is no pack.
    """
    path = folder / FILE
    if not path.is_file():
        raise ValueError(f"{path} does not exist: run python -m scripts.train.animoji_data --out {folder}")
    found = load_pictures(path, shipped_tokenizer(), decode_clip if clips else None, threads)
    # Of the names, not of the file: what is held out does not depend on when it was packed.
    pictures = tuple(replace(each, split=split_of_base(each.base, STYLE)) for each in found.pictures)
    return replace(found, pictures=pictures).to(device)


def main(arguments: list[str] | None = None) -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--sources", type=Path, default=Path("out/emoji-sources"), help="packages of names and pictures"
    )
    parser.add_argument("--clips", type=Path, default=Path("out/animoji-sources"), help="packages of animations")
    parser.add_argument("--out", type=Path, default=Path("out/animoji-data"))
    options = parser.parse_args(arguments)
    with cli.told("animoji_data"):
        fetch(options.sources)
        fetch(options.clips, PACKAGES)
    count = pack(options.sources, options.clips, options.out)
    pictures = load_pack(options.out).pictures
    moving, held = (
        sum(found) for found in zip(*((p.style == MOVING, p.split != TRAIN) for p in pictures), strict=True)
    )
    size = (options.out / FILE).stat().st_size / 1e6
    print(f"{count} clips, {moving} that move, {held} held out, {size:.1f} MB")


if __name__ == "__main__":
    main()
