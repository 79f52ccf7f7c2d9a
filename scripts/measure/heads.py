"""Which heads of the embedded emoji model to perturb: searches them by what pictures are to have more of.

    python -m scripts.measure.heads --out out/heads.jsonl --objective caption --device cuda [--seconds 300]
    python -m scripts.measure.heads --out out/heads.jsonl --objective palette --examples out/style/*.png
    python -m scripts.measure.heads --out out/heads.jsonl --data out/emoji-data --device cuda [--seconds 120]

`caption` is the cosine of pictures and their prompts by the judge (scripts.measure.emoji_encoder), `sharpness` the mean
square of the Laplacian, `palette` how near colours are to those of the examples. Stop it at any time: the same command
goes on, from the scores in --out. The heads go into a file beside it that ends in .json, as `visattn.guide` takes them.

With --data (the pack of scripts.train.emoji_data) the search is on captions that training knew, and what it found is
measured on --held-out others, which neither training nor the search had: beside no guidance, the middle layers that
`guide` takes by itself, and as many heads that were drawn.
"""

from __future__ import annotations

import argparse
import math
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from scripts import cli
from scripts.measure.emoji_encoder_model import ENCODER, SIDE, DualEncoder, load_encoder
from scripts.measure.emoji_prompts import SEEN, UNSEEN, choose
from scripts.measure.guidance import PROMPTS, Variant, cosines, draw, judged
from scripts.train.emoji_data import load_pack
from visattn import apply
from visattn.environment import devices, versions
from visattn.files import write_json
from visattn.pipelines.guidance.search import FoundHeads, Objective, all_heads, by_layer, find_heads, palette, sharpness
from visattn.pipelines.guidance.trials import Head
from visattn.pipelines.load import load_pipeline

# Options that the file of the heads repeats.
KEPT = (
    "scale",
    "strength",
    "perturb",
    "objective",
    "pattern",
    "guidance",
    "prompts",
    "seeds",
    "size",
    "steps",
)


def caption_objective(pipe: Any, encoder: DualEncoder | None) -> Objective:
    """How near pictures are to their prompts, by the judge."""
    assert encoder is not None

    def caption(pictures: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
        return cosines(pictures, prompts, pipe, encoder)

    return caption


def held_out(
    pipe: Any,
    found: FoundHeads,
    candidates: Sequence[Head],
    prompts: Sequence[str],
    encoder: DualEncoder,
    options: argparse.Namespace,
) -> dict[str, Any]:
    """What guidance by the found heads does to prompts that the search did not have, and what others do to them.

    Returns:
        Figures of `judged` by the kind of guidance, with the mean difference to pictures of the same prompt and noise
        without guidance (`gain`) and its standard error (`gain_error`).
    """
    plain = Variant(options.guidance, 0.0, options.perturb, options.pattern, strength=options.strength)
    guided = plain._replace(scale=options.scale)
    rows = {"no perturbation": plain, "the middle layers": guided}
    count = sum(len(heads) for heads in found.heads.values())
    if count:
        some = f"{count} head{'s' * (count > 1)}"
        rows[f"{some}, drawn"] = guided._replace(heads=by_layer(random.Random(0).sample(list(candidates), count)))
        rows[f"{some}, found"] = guided._replace(heads=found.heads)
    report: dict[str, Any] = {}
    before: torch.Tensor | None = None
    for name, variant in rows.items():
        pictures = draw(pipe, variant, prompts, options)
        own = cosines(pictures, prompts, pipe, encoder)
        before = own if before is None else before
        error = (own - before).std() / len(own) ** 0.5
        report[name] = judged(pictures, prompts, pipe, encoder) | {"heads": variant.heads}
        report[name] |= {"gain": float((own - before).mean()), "gain_error": float(error)}
        print(f"{name}: {report[name]['top1']:.0%} named, {report[name]['gain']:+.4f} +- {error:.4f}", flush=True)
    return report


def read_pictures(paths: Sequence[Path], side: int) -> torch.Tensor:
    """Pictures [N, 3, side, side], values 0 to 1."""
    found = [np.asarray(Image.open(path).convert("RGB").resize((side, side))) / 255.0 for path in paths]
    return torch.from_numpy(np.stack(found)).permute(0, 3, 1, 2).float()


def options_of(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--out", type=cli.file_to_write, required=True, help="file of all scores, JSON lines")
    add("--objective", choices=["caption", "sharpness", "palette"], default="caption")
    add("--examples", nargs="*", type=Path, default=[], help="pictures whose colours `palette` asks for")
    add("--pattern", default="dense", help="attention of all predictions")
    add("--perturb", default="identity")
    add("--scale", type=cli.number, default=3.0)
    add("--strength", type=cli.number, default=1.0)
    add("--guidance", type=cli.number, default=1.0, help="classifier-free guidance; 1 for none")
    add("--prompts", type=cli.count, default=8, help="how many")
    add("--seeds", type=cli.count, nargs="+", default=[1, 4, 16], help="of each stage of a round")
    add("--add", type=int, default=1, help="heads that a round adds at most")
    add("--most", type=int, default=8, help="heads in all")
    add("--size", type=cli.count, default=256, help="side in pixels")
    add("--steps", type=cli.count, default=12)
    add("--seconds", type=cli.number, default=math.inf, help="search no more after so long")
    add("--device", type=cli.device, default="cpu")
    add("--model", default="emoji", help="embedded model, or folder of a pipeline of its kind")
    add("--data", type=Path, help="folder of the pack, for captions that training knew and others")
    add("--held-out", type=cli.count, default=200, help="captions of --data that the heads are measured on")
    add("--batch", type=cli.count, default=50, help="held-out pictures at once")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point."""
    options = options_of(arguments)
    size = {"height": options.size, "width": options.size, "num_inference_steps": options.steps}
    with cli.told("measure_heads"):
        if options.objective == "palette" and not options.examples:
            raise ValueError("--objective palette needs --examples: pictures with the colours that are wanted")
        pipe: Any = load_pipeline(options.model, options.device)
        pipe.set_progress_bar_config(disable=True)
        encoder = load_encoder(ENCODER, options.device)[0] if options.objective == "caption" or options.data else None
        known, unseen = captions_of(options.data, options.prompts, options.held_out)
        objective: Objective = {
            "caption": lambda: caption_objective(pipe, encoder),
            "sharpness": lambda: sharpness,
            "palette": lambda: palette(read_pictures(options.examples, options.size)),
        }[options.objective]()
        with apply(pipe, options.pattern, always=True) as handle:
            candidates = all_heads(pipe, handle, None)
            found = find_heads(
                pipe,
                known,
                objective,
                options.out,
                scale=options.scale,
                strength=options.strength,
                perturb=options.perturb,
                candidates=candidates,
                seeds=options.seeds,
                add=options.add,
                most=options.most,
                seconds=options.seconds,
                handle=handle,
                guidance_scale=options.guidance,
                **size,
            )
    for each in found.rounds:
        print(f"added {each['added']}: {each['gain']:+.4f} +- {each['error']:.4f}")
    none = "no head helps" if found.finished else "no round is done"
    print(f"{found.heads or none}{'' if found.finished else '; stopped early: the same command goes on'}")
    report = {**found._asdict(), **{name: getattr(options, name) for name in KEPT}, "candidates": len(candidates)}
    report |= {"versions": versions(), "devices": devices()}
    _write(report, options.out)
    if encoder is not None and unseen:
        report["held_out"] = held_out(pipe, found, candidates, unseen, encoder, options)
        _write(report, options.out)


def captions_of(data: Path | None, known: int, unseen: int) -> tuple[list[str], list[str]]:
    """Captions to search on, and held-out ones; without a pack those of `PROMPTS`, and none."""
    if data is None:
        return list(PROMPTS[:known]), []
    pack = load_pack(data, "cpu", SIDE)
    chosen = choose(pack, max(known, unseen))
    seen, others = ([pack.pictures[i].caption for i in chosen[kind]] for kind in (SEEN, UNSEEN))
    return seen[:known], others[:unseen]


def _write(report: dict[str, Any], out: Path) -> None:
    """Write the heads, beside the scores."""
    write_json(out.with_suffix(".json"), report)


if __name__ == "__main__":
    main()
