"""Draws the pictures of docs/style.md with the embedded emoji model, from prompts and fixed seeds.

python -m scripts.style_pictures [--size 64] [--steps 16]
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from scripts import cli
from scripts.results import ROOT
from visattn import apply
from visattn.canvas import Picture, column, row
from visattn.files import written_whole
from visattn.pipelines.control import style_transfer
from visattn.pipelines.load import load_pipeline

# Prompts of content and style.
PAIRS = (
    ("smiling cat, flat", "bus, gradient"),
    ("red heart, 3d", "green apple, 3d"),
    ("penguin, 3d", "red apple, 3d"),
    ("rocket, 3d", "banana, 3d"),
)
GAMMAS = (0.75, 0.3)
PATTERN = "na(window=8x8)"
SHOWN = 96


def strip(pipe: Any, prompts: tuple[str, str], options: argparse.Namespace) -> Picture:
    """Content, style, and the results."""
    size = {"height": options.size, "width": options.size}

    def noise(seed: int) -> torch.Generator:
        return torch.Generator().manual_seed(seed)

    given = [
        pipe(prompt, generator=noise(seed), num_inference_steps=options.steps, **size).images[0]
        for seed, prompt in enumerate(prompts)
    ]
    found = list(given)
    words = {"prompt": prompts[0], "style_prompt": prompts[1], "steps": options.steps, "noise": "drawn"}
    for gamma in GAMMAS:
        found.append(style_transfer(pipe, *given, gamma=gamma, generator=noise(0), **words, **size).image)
    with apply(pipe, PATTERN, always=True) as handle:
        found.append(style_transfer(pipe, *given, handle=handle, generator=noise(0), **words, **size).image)
    return row([each.resize((SHOWN, SHOWN), Image.Resampling.LANCZOS) for each in found], gap=4)


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "pictures" / "style.png")
    parser.add_argument("--size", type=cli.count, default=64, help="side in pixels")
    parser.add_argument("--steps", type=cli.count, default=16)
    parser.add_argument("--device", type=cli.device, default="cpu")
    options = parser.parse_args(arguments)
    pipe: Any = load_pipeline("emoji", options.device)
    pipe.set_progress_bar_config(disable=True)
    made = column([strip(pipe, pair, options) for pair in PAIRS], gap=4, margin=8)
    with written_whole(options.out) as path:
        made.quantize(256).save(path, format="png", optimize=True)


if __name__ == "__main__":
    main()
