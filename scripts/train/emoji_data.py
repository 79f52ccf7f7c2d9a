"""Fetches the emoji pictures and packs them small, and reads such a pack.

    python -m scripts.train.emoji_data --sources out/emoji-sources --out out/emoji-data

The pack is `pictures.safetensors` (WebP files end to end, every caption's tokens) and `tokenizer/`; it holds what
training and measuring need, about 23 MB, for a machine without network. Needs npm, and resvg-py from PyPI for drawing.

Captions are in the tokens of the emoji model that ships, which its judge (scripts.measure) was trained with.
--new-tokenizer trains another one on the captions: no two such trainings number all pieces alike, so model and judge
have to be trained with it.
"""

from __future__ import annotations

import argparse
import io
import json
import shutil
import zlib
from collections import defaultdict
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import PIL.Image
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import PreTrainedTokenizerFast

from scripts import cli
from scripts.train.emoji_captions import (
    TOKENS,
    TRAIN,
    caption,
    captions,
    encode,
    shipped_tokenizer,
    split_of,
    train_tokenizer,
)
from scripts.train.emoji_sources import SIDE, STYLES, Emoji, draw_all, fetch
from visattn.files import written_whole

FILE, TOKENIZER = "pictures.safetensors", "tokenizer"
QUALITY = 72
Decode = Callable[[bytes], np.ndarray]


@dataclass(frozen=True)
class Picture:
    """What is known about a packed picture.

    Attributes:
        code: The emoji's code points.
        base: Those of the emoji without a skin tone.
        style: One of STYLES; of a clip whether it moves.
        split: One of SPLITS.
        caption: Its plain caption.
        weight: How often training draws it: the tones of an emoji together as often as the emoji itself.
    """

    code: str
    base: str
    style: str
    split: str
    caption: str
    weight: float


@dataclass(frozen=True, eq=False)
class Pack:
    """A pack in memory, on one device.

    Attributes:
        pictures: One entry for each picture.
        pixels: [N, 3, SIDE, SIDE] uint8; of clips [N, frames, 3, height, width]; [N, 0] where captions alone were read.
        tokens: [N, variants, TOKENS] ids of the captions to train on, int64.
        plain: [N, TOKENS] ids of the plain captions, int64.
        null: [TOKENS] ids of the empty caption, int64.
        tokenizer: Of the captions.
    """

    pictures: tuple[Picture, ...]
    pixels: torch.Tensor
    tokens: torch.Tensor
    plain: torch.Tensor
    null: torch.Tensor
    tokenizer: PreTrainedTokenizerFast

    def of(self, *splits: str) -> torch.Tensor:
        """Indices of the pictures in these splits, on the CPU."""
        return torch.tensor([i for i, each in enumerate(self.pictures) if each.split in splits], dtype=torch.long)

    def weights(self, *splits: str) -> torch.Tensor:
        """[N] float32 on the CPU: the pictures' weights, 0 outside these splits."""
        return torch.tensor([each.weight if each.split in splits else 0.0 for each in self.pictures])

    def to(self, device: str | torch.device) -> Pack:
        """The pack on another device."""
        names = ("pixels", "tokens", "plain", "null")
        return replace(self, **{name: getattr(self, name).to(device).contiguous() for name in names})


def pack(sources: Path, out: Path, limit: int | None = None, new_tokenizer: bool = False) -> int:
    """Draws and packs every picture; returns their number.

    Args:
        sources: Folder with the packages.
        out: Folder of the pack, replaced whole.
        limit: At most so many pictures of each style, for tests.
        new_tokenizer: As for `write_pack`.
    """
    drawn: list[tuple[Emoji, str, bytes]] = []
    count: dict[str, int] = defaultdict(int)
    for emoji, style, picture in draw_all(sources):
        if limit is None or count[style] < limit:
            count[style] += 1
            drawn.append((emoji, style, encode_picture(picture, style)))
    return write_pack(drawn, out, new_tokenizer)


def write_pack(drawn: list[tuple[Emoji, str, bytes]], out: Path, new_tokenizer: bool = False) -> int:
    """Writes a pack of encoded pictures; returns their number.

    Args:
        drawn: Emoji, style and file of each picture.
        out: The folder.
        new_tokenizer: Whether to train a tokenizer on the captions instead of taking the one that ships.
    """
    tones: dict[tuple[str, str], int] = defaultdict(int)
    for emoji, style, _ in drawn:
        tones[emoji.base, style] += bool(emoji.tone)
    pictures = [
        Picture(
            emoji.code,
            emoji.base,
            style,
            split_of(emoji, style),
            caption(emoji, style),
            1.0 / tones[emoji.base, style] if emoji.tone else 1.0,
        )
        for emoji, style, _ in drawn
    ]
    texts = [captions(emoji, style) for emoji, style, _ in drawn]
    tokenizer = train_tokenizer(text for each in texts for text in each) if new_tokenizer else shipped_tokenizer()
    out.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(out / TOKENIZER, ignore_errors=True)
    tokenizer.save_pretrained(out / TOKENIZER)
    save_pictures(out / FILE, pictures, [data for _, _, data in drawn], tokens_of(tokenizer, pictures, texts))
    return len(pictures)


def tokens_of(
    tokenizer: PreTrainedTokenizerFast, pictures: Sequence[Picture], texts: Sequence[Sequence[str]]
) -> tuple[np.ndarray, np.ndarray]:
    """Token ids of the captions to train on [N, variants, TOKENS] and of the plain ones [N, TOKENS], int16."""
    tokens = np.array([encode(tokenizer, each) for each in texts], np.int16)
    return tokens, np.array(encode(tokenizer, [each.caption for each in pictures]), np.int16)


def save_pictures(
    path: Path, pictures: Sequence[Picture], encoded: Sequence[bytes], tokens: tuple[np.ndarray, np.ndarray]
) -> None:
    """Writes pictures, their encoded files and what `tokens_of` gives of them."""
    files = [np.frombuffer(data, np.uint8) for data in encoded]
    tensors = {
        "files": torch.from_numpy(np.concatenate(files)),
        "ends": torch.tensor(np.cumsum([len(file) for file in files])),
        "tokens": _packed(tokens[0].tobytes()),
        "plain": _packed(tokens[1].tobytes()),
        "pictures": _packed(json.dumps([asdict(each) for each in pictures]).encode()),
    }
    with written_whole(path) as temporary:
        save_file(tensors, temporary)


def load_pictures(path: Path, tokenizer: PreTrainedTokenizerFast, decode: Decode | None, threads: int) -> Pack:
    """Reads what `save_pictures` wrote; `decode` makes the pixels of one file, uint8, or None none. All on the CPU."""
    with safe_open(path, framework="pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    pictures = tuple(Picture(**each) for each in json.loads(_unpacked(tensors["pictures"])))
    tokens, plain = (torch.frombuffer(_unpacked(tensors[name]), dtype=torch.int16) for name in ("tokens", "plain"))
    files, ends = tensors["files"].numpy(), tensors["ends"].tolist()
    starts = [0, *ends[:-1]]
    pixels = torch.empty(len(pictures), 0, dtype=torch.uint8)
    if decode is not None:
        with ThreadPoolExecutor(threads) as pool:
            bounds = zip(starts, ends, strict=True)
            decoded = list(pool.map(lambda ends: decode(files[ends[0] : ends[1]].tobytes()), bounds))
        pixels = torch.from_numpy(np.stack(decoded))
    return Pack(
        pictures,
        pixels,
        tokens.reshape(len(pictures), -1, TOKENS).long(),
        plain.reshape(len(pictures), TOKENS).long(),
        torch.tensor(encode(tokenizer, [""])[0]),
        tokenizer,
    )


def _packed(data: bytes) -> torch.Tensor:
    return torch.frombuffer(bytearray(zlib.compress(data, 9)), dtype=torch.uint8)


def _unpacked(tensor: torch.Tensor) -> bytearray:
    return bytearray(zlib.decompress(tensor.numpy().tobytes()))


def encode_picture(picture: PIL.Image.Image, style: str) -> bytes:
    """WebP; lossless for black on white, where that is smaller."""
    file = io.BytesIO()
    options = {"lossless": True} if style == STYLES[-1] else {"quality": QUALITY}
    picture.save(file, "WEBP", method=4, **options)
    return file.getvalue()


def load_pack(folder: Path, device: str | torch.device = "cpu", side: int = SIDE, threads: int = 8) -> Pack:
    """Reads a pack; `side` gives smaller pictures (averages of whole squares), 0 captions alone, in no time.

    Raises:
        ValueError: If there is no pack, or the side does not divide SIDE.
    """
    if side and SIDE % side:
        raise ValueError(f"side {side} does not divide {SIDE}: pass 256, 128, 64, 32 or 0")
    path = folder / FILE
    if not path.is_file():
        raise ValueError(f"{path} does not exist: run python -m scripts.train.emoji_data --out {folder}")
    decode = (lambda data: _decode(data, side)) if side else None
    pack = load_pictures(path, load_tokenizer(folder), decode, threads)
    return pack.to(device)


def load_tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    """The tokenizer of a pack."""
    return PreTrainedTokenizerFast.from_pretrained(folder / TOKENIZER, local_files_only=True)


def _decode(data: bytes, side: int) -> np.ndarray:
    """[3, side, side] of one file."""
    picture = PIL.Image.open(io.BytesIO(data)).convert("RGB")
    return np.asarray(picture if side == SIDE else picture.reduce(SIDE // side)).transpose(2, 0, 1)


def main(arguments: list[str] | None = None) -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sources", type=Path, default=Path("out/emoji-sources"))
    parser.add_argument("--out", type=Path, default=Path("out/emoji-data"))
    parser.add_argument("--new-tokenizer", action="store_true", help="train one instead of taking the emoji model's")
    options = parser.parse_args(arguments)
    with cli.told("emoji_data"):
        fetch(options.sources)
    count = pack(options.sources, options.out, new_tokenizer=options.new_tokenizer)
    pictures = load_pack(options.out, side=0).pictures
    held = sum(each.split != TRAIN for each in pictures)
    print(f"{count} pictures, {held} of them held out, {(options.out / FILE).stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
