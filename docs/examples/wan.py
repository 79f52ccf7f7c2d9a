"""A video of Wan 2.1 with radial attention: the first steps and the first layer stay dense, as its paper proposes.

    python docs/examples/wan.py --prompt "a cat walks on the grass" --frames 81 --out out/wan.mp4

Needs `pip install 'visattn[diffusers]'` and a GPU that holds the model in bfloat16. What a
pattern gains on so many frames, `visattn simulate "radial(decay=0.2)" --grid 21x30x52` tells before anything runs.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import diffusers
import torch

import visattn
from visattn.pipelines.report.video_files import write_mp4


def options(arguments: list[str] | None) -> argparse.Namespace:
    """What the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="Wan-AI/Wan2.1-T2V-1.3B-Diffusers", help="hub id or folder")
    parser.add_argument("--prompt", default="a cat walks on the grass")
    parser.add_argument("--pattern", default="radial(decay=0.2)", help="or a window: na(window=11x15x15)")
    parser.add_argument("--dense-steps", type=float, default=0.25, help="share of the steps that stay dense")
    parser.add_argument("--dense-layers", type=int, default=1, help="so many of the first layers stay dense")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--frames", type=int, default=81, help="4 n + 1")
    parser.add_argument("--height", type=int, default=480)
    parser.add_argument("--width", type=int, default=832)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("out/wan.mp4"))
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    """Generate the video and say what ran."""
    chosen = options(arguments)
    pipe: Any = diffusers.WanPipeline.from_pretrained(chosen.model, torch_dtype=torch.bfloat16)
    if torch.cuda.is_available():
        pipe.enable_model_cpu_offload()
    # strict: an error instead of a quietly dense video, should the pattern not fit the model.
    with visattn.apply(
        pipe, chosen.pattern, dense_steps=chosen.dense_steps, dense_layers=chosen.dense_layers, strict=True
    ) as handle:
        video = pipe(
            chosen.prompt,
            height=chosen.height,
            width=chosen.width,
            num_frames=chosen.frames,
            num_inference_steps=chosen.steps,
            generator=torch.Generator().manual_seed(chosen.seed),
            output_type="np",
        ).frames[0]
        print(handle.report())
    chosen.out.parent.mkdir(parents=True, exist_ok=True)
    write_mp4(chosen.out, video, fps=16)
    print(f"{len(video)} frames in {chosen.out}")


if __name__ == "__main__":
    main()
