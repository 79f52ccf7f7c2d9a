"""FLUX.1 at high resolution: dense and neighborhood attention from the same noise, timed and side by side.

    python docs/examples/flux.py --prompt "a lighthouse at dusk" --height 2048 --width 2048

Needs `pip install 'visattn[diffusers]'`, access to the model, and a GPU that holds its transformer in bfloat16.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import diffusers
import torch
from PIL import Image

import visattn


def options(arguments: list[str] | None) -> argparse.Namespace:
    """What the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="black-forest-labs/FLUX.1-dev", help="hub id or folder")
    parser.add_argument("--prompt", default="a lighthouse at dusk")
    parser.add_argument("--pattern", default="na(window=48x48, stride=16x16)", help="attention within the image")
    parser.add_argument("--dense-steps", type=int, default=4, help="first steps, which lay out the image, stay dense")
    parser.add_argument("--steps", type=int, default=28)
    parser.add_argument("--height", type=int, default=2048)
    parser.add_argument("--width", type=int, default=2048)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("out/flux"))
    return parser.parse_args(arguments)


def draw(pipe: Any, chosen: argparse.Namespace) -> tuple[Image.Image, float]:
    """One image from the seed's noise, and the seconds that it took."""
    start = time.perf_counter()
    image = pipe(
        chosen.prompt,
        height=chosen.height,
        width=chosen.width,
        num_inference_steps=chosen.steps,
        generator=torch.Generator().manual_seed(chosen.seed),
    ).images[0]
    return image, time.perf_counter() - start  # an image on the CPU has waited for the GPU


def main(arguments: list[str] | None = None) -> None:
    """Draw twice and say what it took."""
    chosen = options(arguments)
    pipe: Any = diffusers.FluxPipeline.from_pretrained(chosen.model, torch_dtype=torch.bfloat16)
    if torch.cuda.is_available():
        pipe.enable_model_cpu_offload()
    # High resolutions differ most where the first steps differ: those stay dense.
    with visattn.apply(pipe, chosen.pattern, dense_steps=chosen.dense_steps) as handle:
        draw(pipe, chosen)  # compiles and tunes the kernels
        sparse, sparse_seconds = draw(pipe, chosen)
        print(handle.report())
    dense, dense_seconds = draw(pipe, chosen)

    chosen.out.mkdir(parents=True, exist_ok=True)
    both = Image.new("RGB", (2 * dense.width, dense.height))
    both.paste(dense, (0, 0))
    both.paste(sparse, (dense.width, 0))
    both.save(chosen.out / "dense-and-sparse.png")
    print(f"dense {dense_seconds:.1f} s, {chosen.pattern} {sparse_seconds:.1f} s; both in {chosen.out}")


if __name__ == "__main__":
    main()
