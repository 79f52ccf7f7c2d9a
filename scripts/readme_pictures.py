"""Draws the README's pictures of the embedded models anew, from prompts and fixed seeds.

    python -m scripts.readme_pictures --device cuda     # without it on the CPU, slowly
    python -m scripts.readme_pictures --kinds clips     # one of them
    python -m scripts.readme_pictures --steps 2 --size 32 --out out/pictures

`emoji-patterns.png` has a row for each pattern, in every step and without any training for it; `animoji.webp` has clips
with dense attention, and below them those of a window in the later half of the steps. All rows start from the same
noise.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from scripts import cli
from scripts.results import ROOT
from visattn import apply
from visattn.canvas import Picture, column, row, text
from visattn.files import written_whole
from visattn.pipelines.load import load_pipeline
from visattn.pipelines.report.video_files import write_webp

FPS = 8
SHOWN = 112  # side of a picture on the sheet


@dataclass(frozen=True)
class Sheet:
    """What is drawn: a column for each prompt, a row for each pattern.

    Attributes:
        model: Name of the embedded model.
        file: Name of the picture.
        prompts: Of the columns.
        rows: Pattern and the share of first steps that stay dense.
    """

    model: str
    file: str
    prompts: tuple[str, ...]
    rows: tuple[tuple[str, float], ...]


SHEETS = {
    "pictures": Sheet(
        "emoji",
        "emoji-patterns.png",
        (
            "red apple, 3d",
            "bus, gradient",
            "smiling cat, flat",
            "post office, gradient",
            "rocket, 3d",
            "penguin, 3d",
            "snowman, flat",
            "guitar, high contrast",
        ),
        (
            ("dense", 0.0),
            ("topk(keep=0.15, rest=mean)", 0.0),
            ("routing(regions=8x8, topk=8)", 0.0),
            ("clear(radius=8, pool=4)", 0.0),
            ("na(window=16x16, stride=8x8)", 0.0),
        ),
    ),
    "clips": Sheet(
        "animoji",
        "animoji.webp",
        (
            "clapping hands",
            "waving hand, 3d",
            "beating heart, 3d",
            "man lifting weights, 3d",
            "woman biking, 3d",
            "grinning face, 3d",
            "snowman, 3d",
            "bus, 3d",
        ),
        (("dense", 0.0), ("na(window=8x8x8, stride=4x4x4)", 0.5)),
    ),
}


def draw(sheet: Sheet, options: argparse.Namespace) -> list[list[list[Picture]]]:
    """Frames (of a picture one) of each prompt, for each row; the noise of a column is that of its number."""
    pipe: Any = load_pipeline(sheet.model, options.device)
    pipe.set_progress_bar_config(disable=True)
    found = []
    for pattern, dense in sheet.rows:
        with apply(pipe, pattern, dense_steps=dense, always=True):
            made = [_one(pipe, prompt, seed, options) for seed, prompt in enumerate(sheet.prompts)]
        found.append(made)
        print(f"{sheet.model}: {pattern}", flush=True)
    return found


def _one(pipe: Any, prompt: str, seed: int, options: argparse.Namespace) -> list[Picture]:
    sizes = {} if options.size is None else {"height": options.size, "width": options.size}
    generator = torch.Generator().manual_seed(seed)
    output = pipe(prompt, num_inference_steps=options.steps, generator=generator, output_type="pil", **sizes)[0][0]
    return [output] if isinstance(output, Image.Image) else list(output)


def name_of(pattern: str, dense: float) -> str:
    """What stands above a row."""
    return pattern + (f", the first {dense:.0%} of the steps dense" if dense else "")


def lay(sheet: Sheet, made: list[list[list[Picture]]]) -> list[Picture]:
    """The frames of the whole picture."""
    frames = []
    for i in range(len(made[0][0])):
        parts = []
        for (pattern, dense), drawn in zip(sheet.rows, made, strict=True):
            small = [clip[i].convert("RGB").resize((SHOWN, SHOWN), Image.Resampling.LANCZOS) for clip in drawn]
            parts += [text(name_of(pattern, dense), size=13), row(small, gap=4)]
        frames.append(column(parts, gap=4, margin=8))
    return frames


def make(sheet: Sheet, options: argparse.Namespace) -> Path:
    """Draws and writes one of the pictures; returns its file."""
    frames = lay(sheet, draw(sheet, options))
    options.out.mkdir(parents=True, exist_ok=True)
    file = options.out / sheet.file
    with written_whole(file) as temporary:
        if len(frames) > 1:
            write_webp(temporary, frames, FPS)
        else:
            # 256 colours are enough for emoji, at a third of the size.
            frames[0].quantize(256).save(temporary, optimize=True)
    return file


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kinds", nargs="+", choices=list(SHEETS), default=list(SHEETS))
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "pictures")
    parser.add_argument("--steps", type=cli.count, default=24)
    parser.add_argument("--size", type=cli.count, help="side in pixels; the model's own")
    parser.add_argument("--device", type=cli.device, default="cpu")
    options = parser.parse_args(arguments)
    with cli.told("readme_pictures"):
        for kind in options.kinds:
            file = make(SHEETS[kind], options)
            print(f"{file}: {file.stat().st_size / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
