"""Trains the embedded "animoji" model: text to video with Wan's architecture, about 10 minutes on a data-centre GPU.

    python -m scripts.train.emoji_data                      # fetch and pack pictures and clips, once
    python -m scripts.train.animoji_data
    python -m scripts.train.animoji --out out/animoji --seconds 520 --device cuda
    python -m scripts.train.animoji --out out/animoji-2 --resume out/animoji --seconds 520 --device cuda
    python -m scripts.train.animoji --out out/animoji-2 --export-only   # writes out/animoji-2/animoji
    python -m scripts.train.animoji --out out/animoji-2 --animate-only  # samples.png as an animation, samples.webp

`--budget` is the training time of all commands together, which the schedule follows; `--seconds` is the time of this
command from its start. The text encoder starts as the emoji model's that ships. `--out` gets what `scripts.train.emoji`
writes; every row of `samples.png` is a clip.
"""

from __future__ import annotations

import argparse
import time
from functools import partial
from pathlib import Path
from typing import Any

import PIL.Image
import torch

from scripts import cli
from scripts.train import flow_loop
from scripts.train.animoji_captions import MOVING
from scripts.train.animoji_data import SIDE, load_pack
from scripts.train.animoji_model import FPS, build_pipeline, export
from scripts.train.animoji_pictures import clip_weights, stage_weights, with_pictures
from scripts.train.animoji_training import Config, draw, loss_of
from scripts.train.emoji_captions import NEW_EMOJI, TRAIN, shipped_tokenizer
from scripts.train.emoji_data import Pack
from scripts.train.emoji_data import load_pack as load_pictures
from scripts.train.flow import EVEN, Batch
from scripts.train.flow_loop import FlowTraining, add_options, autocast, averaged, settings, sheet_of
from visattn.canvas import column, row
from visattn.pipelines.report.video_files import write_webp

EXPORT = "animoji"
SAMPLES = {TRAIN: 8, NEW_EMOJI: 8}
FREE_PROMPTS = (
    "clapping hands",
    "waving hand, 3d",
    "a purple cat, animated",
    "dancing robot, 3d",
    "a rocket, moving",
    "beating heart, 3d",
    "red apple, still",
    "snowman juggling, 3d",
)
EACH = 8
MEASURED = 64


class Training(FlowTraining):
    """One run of the animoji model."""

    config: Config

    def __init__(self, config: Config, pack: Pack, resume: Path | None = None) -> None:
        super().__init__(config, pack, resume)
        self.drawn = [stage_weights(pack, frames).to(self.device) for frames in config.lengths]
        fuse_norms(self.model.transformer)

    def draw(self, stage: int, seed: int) -> Batch:
        """See `FlowTraining.draw`."""
        return draw(self.pack, self.drawn[stage], stage, self.config.batch(stage), self.config, seed)

    def loss_of(self, model: Any, batch: Batch) -> torch.Tensor:
        """See `FlowTraining.loss_of`."""
        return loss_of(model, batch)

    @torch.no_grad()
    def losses(self) -> dict[str, float]:
        """Mean losses of the averaged weights on fixed clips, noise and levels of each split."""
        found, stage = {}, self.config.stage(self.progress.done(self.config))
        for split in dict.fromkeys(each.split for each in self.pack.pictures):
            weights = clip_weights(self.pack, split).to(self.device)
            batch = draw(self.pack, weights, stage, MEASURED, self.config, 12345)
            parts = -(-MEASURED // EVEN)
            with autocast(self.device):
                losses = torch.cat([loss_of(self.average, batch.part(i, parts)) for i in range(parts)])
            found[split] = losses.mean().item()
        return found

    def samples(self, steps: int = 24, guidance: float = 3.0) -> PIL.Image.Image:
        """Clips of the averaged weights, a row each: seen captions, new emoji, free prompts."""
        stage = self.config.stage(self.progress.done(self.config))
        pipeline = build_pipeline(self.average, self.pack.tokenizer)
        prompts, rows = sample_prompts(self.pack), []
        for start in range(0, len(prompts), EACH):
            with autocast(self.device):
                made: Any = pipeline(
                    prompts[start : start + EACH],
                    num_inference_steps=steps,
                    guidance_scale=guidance,
                    num_frames=self.config.lengths[stage],
                    generator=torch.Generator().manual_seed(start),
                    output_type="pt",
                )
            rows += [torch.cat([*clip.float().cpu()], dim=-1) for clip in made.frames]
        return sheet_of(rows)


def animate(sheet: Path, out: Path) -> None:
    """Writes the clips of a sheet of samples beside each other, EACH in a row, as an animated WebP of twice their side.

    Raises:
        ValueError: If there is no such sheet.
    """
    if not sheet.is_file():
        raise ValueError(f"{sheet} does not exist: it is written at the end of a training")
    whole = PIL.Image.open(sheet).convert("RGB")
    corners = [(x, y) for x in range(0, whole.width, SIDE) for y in range(0, whole.height, SIDE)]
    cells = [whole.crop((x, y, x + SIDE, y + SIDE)) for x, y in corners]
    clips = whole.height // SIDE
    frames = []
    for pictures in (cells[i : i + clips] for i in range(0, len(cells), clips)):
        some = column([row(pictures[i : i + EACH], gap=0) for i in range(0, len(pictures), EACH)], gap=0)
        frames.append(some.resize((2 * some.width, 2 * some.height), PIL.Image.Resampling.LANCZOS))
    write_webp(out, frames, FPS)


def fuse_norms(transformer: torch.nn.Module) -> None:
    """Lets the norms of queries and keys run as one kernel each under autocast.

    Their weights are float32 and what they get is bfloat16, for which torch has no fused kernel: it is widened.
    """
    for module in transformer.modules():
        if isinstance(module, torch.nn.RMSNorm):
            module.forward = partial(_norm, module)


def _norm(module: Any, x: torch.Tensor) -> torch.Tensor:
    wide = torch.nn.functional.rms_norm(x.float(), module.normalized_shape, module.weight, module.eps)
    return wide.to(x.dtype)


def sample_prompts(pack: Pack) -> list[str]:
    """Prompts of the sample sheet, evenly over the clips of each split that move; the same for every run."""
    found = []
    for split, count in SAMPLES.items():
        pictures = [pack.pictures[i] for i in pack.of(split).tolist()]
        of = [each.caption for each in pictures if each.style == MOVING and each.weight == 1]
        stride = max(1, len(of) // count)
        found += of[stride // 2 :: stride][:count]
    return [*found, *FREE_PROMPTS]


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser, Config, Path("out/animoji-data"), Path("out/animoji"))
    parser.add_argument(
        "--pictures", type=Path, default=Path("out/emoji-data"), help="folder of the emoji model's pack"
    )
    parser.add_argument("--animate-only", action="store_true", help="make samples.webp of samples.png in --out")
    return parser.parse_args(arguments)


def train(options: argparse.Namespace, started: float) -> list[dict[str, Any]]:
    """Sets everything up and trains; returns the log.

    Raises:
        ValueError: If options, data and checkpoint do not go together.
    """
    config: Config = settings(options, Config)

    def make(device: torch.device) -> Training:
        pictures = load_pictures(options.pictures, side=SIDE, threads=options.threads)
        pack = with_pictures(load_pack(options.data, threads=options.threads), pictures)
        return Training(config, pack.to(device), options.resume)

    return flow_loop.train(options, started, make)


def main(arguments: list[str] | None = None) -> None:
    """Entry point."""
    started = time.monotonic()
    options = parse_arguments(arguments)
    with cli.told("animoji"):
        if options.animate_only:
            animate(options.out / "samples.png", options.out / "samples.webp")
        elif options.export_only:
            size = export(averaged(options.out, Config), shipped_tokenizer(), options.out / EXPORT)
            print(f"{size / 1e6:.2f} MB exported to {options.out / EXPORT}")
        else:
            train(options, started)


if __name__ == "__main__":
    main()
