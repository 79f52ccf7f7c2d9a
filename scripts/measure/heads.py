"""Which heads of the embedded emoji model to perturb: searches them by what pictures are to have more of.

    python -m scripts.measure.heads --out out/heads.jsonl --objective caption --device cuda [--seconds 300]
    python -m scripts.measure.heads --out out/heads.jsonl --objective palette --examples out/style/*.png

`caption` is the cosine of pictures and their prompts by the judge (scripts.measure.emoji_encoder), `sharpness` the mean
square of the Laplacian, `palette` how near colours are to those of the examples. Stop it at any time: the same command
goes on, from the scores in --out. The heads go into a file beside it that ends in .json, as `visattn.guide` takes them.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from scripts.measure.emoji_encoder_model import ENCODER, load_encoder
from scripts.measure.guidance import PROMPTS
from visattn import apply
from visattn.files import written_whole
from visattn.pipelines.embedded.prompts import tokenize
from visattn.pipelines.guidance.search import Objective, find_heads, palette, sharpness
from visattn.pipelines.load import load_pipeline


def caption_objective(pipe: Any, device: str) -> Objective:
    """How near pictures are to their prompts, by the judge."""
    encoder = load_encoder(ENCODER, device)[0]

    def caption(pictures: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
        ids = tokenize(pipe.tokenizer, prompts).to(device)
        said = torch.nn.functional.normalize(encoder.caption(ids).float(), dim=1).double().cpu()
        return (encoder.features(pictures) * said).sum(1)

    return caption


def read_pictures(paths: Sequence[Path], side: int) -> torch.Tensor:
    """Pictures [N, 3, side, side], values 0 to 1."""
    found = [np.asarray(Image.open(path).convert("RGB").resize((side, side))) / 255.0 for path in paths]
    return torch.from_numpy(np.stack(found)).permute(0, 3, 1, 2).float()


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--out", type=Path, required=True, help="file of all scores, JSON lines")
    add("--objective", choices=["caption", "sharpness", "palette"], default="caption")
    add("--examples", nargs="*", type=Path, default=[], help="pictures whose colours `palette` asks for")
    add("--pattern", default="dense", help="attention of all predictions")
    add("--perturb", default="identity")
    add("--scale", type=float, default=3.0)
    add("--strength", type=float, default=1.0)
    add("--guidance", type=float, default=1.0, help="classifier-free guidance; 1 for none")
    add("--prompts", type=int, default=8, help="how many")
    add("--seeds", type=int, nargs="+", default=[1, 4, 16], help="of each stage of a round")
    add("--add", type=int, default=1, help="heads that a round adds at most")
    add("--most", type=int, default=8, help="heads in all")
    add("--size", type=int, default=256, help="side in pixels")
    add("--steps", type=int, default=12)
    add("--seconds", type=float, default=math.inf, help="draw nothing more after so long")
    add("--device", default="cpu")
    add("--model", default="emoji", help="embedded model, or folder of a pipeline of its kind")
    options = parser.parse_args(arguments)
    pipe: Any = load_pipeline(options.model, options.device)
    pipe.set_progress_bar_config(disable=True)
    size = {"height": options.size, "width": options.size, "num_inference_steps": options.steps}
    try:
        if options.objective == "palette" and not options.examples:
            raise ValueError("--objective palette needs --examples: pictures with the colours that are wanted")
        objective: Objective = {
            "caption": lambda: caption_objective(pipe, options.device),
            "sharpness": lambda: sharpness,
            "palette": lambda: palette(read_pictures(options.examples, options.size)),
        }[options.objective]()
        with apply(pipe, options.pattern, always=True) as handle:
            found = find_heads(
                pipe,
                PROMPTS[: options.prompts],
                objective,
                options.out,
                scale=options.scale,
                strength=options.strength,
                perturb=options.perturb,
                seeds=options.seeds,
                add=options.add,
                most=options.most,
                seconds=options.seconds,
                handle=handle,
                guidance_scale=options.guidance,
                **size,
            )
    except ValueError as error:
        raise SystemExit(f"measure_heads: {error}") from error
    kept = {
        name: getattr(options, name) for name in ("scale", "strength", "perturb", "objective", "pattern", "guidance")
    }
    with written_whole(options.out.with_suffix(".json")) as path:
        path.write_text(json.dumps({**found._asdict(), **kept}, indent=1) + "\n")
    for each in found.rounds:
        print(f"added {each['added']}: {each['gain']:+.4f} +- {each['error']:.4f}")
    print(f"{found.heads or 'no head helps'}{'' if found.finished else '; stopped early: the same command goes on'}")


if __name__ == "__main__":
    main()
