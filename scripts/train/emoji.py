"""Trains the embedded "emoji" model: text to image with FLUX.1's architecture, about 25 minutes on a data-centre GPU.

    python -m scripts.train.emoji_data                      # fetches and packs the pictures, once
    python -m scripts.train.emoji --out out/emoji --budget 1300 --seconds 540 --device cuda
    python -m scripts.train.emoji --out out/emoji-2 --resume out/emoji --budget 1300 --seconds 540 --device cuda
    python -m scripts.train.emoji --out out/emoji-3 --resume pipelines/embedded/weights/emoji --device cuda ...
    python -m scripts.train.emoji --out out/emoji-2 --export-only   # writes out/emoji-2/emoji, the pipeline folder

`--budget` is the training time of all commands together, which the schedule follows; `--seconds` is the time of this
command from its start. `--out` gets `state-*.safetensors` (float16 weights to go on from), `average-*.safetensors` (the
averaged weights that ship), `samples.png` and `log.json`. Optimizers start anew, with a warm-up, where a run goes on:
their memory is some tens of steps, and without it a checkpoint is small enough to travel.

Several GPUs: `torchrun --standalone --nproc-per-node 2 -m scripts.train.emoji ...`; each has a batch of its own.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import PIL.Image
import torch
import torch._inductor.config

from scripts import cli
from scripts.train import flow_loop
from scripts.train.emoji_captions import NEW_EMOJI, NEW_PAIR, TRAIN
from scripts.train.emoji_data import Pack, load_pack, load_tokenizer
from scripts.train.emoji_model import build_pipeline, export
from scripts.train.emoji_training import Config, draw, loss_of, losses_by_split
from scripts.train.flow import Batch
from scripts.train.flow_loop import FlowTraining, add_options, autocast, averaged, settings, sheet_of

EXPORT = "emoji"
CUDNN_FROM = 128
SAMPLES = {TRAIN: 24, NEW_PAIR: 12, NEW_EMOJI: 12}
FREE_PROMPTS = (
    "a red apple, 3d",
    "a blue apple, 3d",
    "a green heart, flat",
    "a cat astronaut, 3d",
    "rocket, high contrast",
    "a slice of pizza, 3d",
    "smiling cat, gradient",
    "a purple dog, 3d",
)
COLUMNS = 8


class Training(FlowTraining):
    """One run of the emoji model.

    Args:
        config: Settings.
        pack: The data, on the device of the training.
        resume: Folder with a checkpoint to go on from, or an exported pipeline to start anew from.
        compiled: Whether to compile the blocks.
        cudnn: Whether cuDNN computes the attention of large pictures on a GPU.
    """

    config: Config

    def __init__(
        self, config: Config, pack: Pack, resume: Path | None = None, compiled: bool = False, cudnn: bool = False
    ) -> None:
        super().__init__(config, pack, resume)
        # At 64 pixels ([928, 3, 288, 64], bfloat16) cuDNN's backward is an illegal memory access with torch 2.11.
        self.cudnn_from = CUDNN_FROM if cudnn else None
        if compiled:
            compile_blocks(self.model.transformer)

    def draw(self, stage: int, seed: int) -> Batch:
        """See `FlowTraining.draw`."""
        config = self.config
        return draw(self.pack, self.weights, config.sides[stage], config.batch(stage), config, seed)

    def loss_of(self, model: Any, batch: Batch) -> torch.Tensor:
        """See `FlowTraining.loss_of`."""
        return loss_of(model, batch)

    def losses(self) -> dict[str, float]:
        """Losses of the averaged weights on pictures of each split."""
        stage = self.config.stage(self.progress.done(self.config))
        with autocast(self.device):
            return losses_by_split(self.average, self.pack, stage, self.config)

    def samples(self, steps: int = 24, guidance: float = 3.0) -> PIL.Image.Image:
        """A sheet of samples of the averaged weights: seen pictures, new pairs, new emoji, free prompts."""
        side = self.config.sides[self.config.stage(self.progress.done(self.config))]
        pipeline = build_pipeline(self.average, self.pack.tokenizer)
        rows = []
        prompts = sample_prompts(self.pack)
        for start in range(0, len(prompts), COLUMNS):
            generator = torch.Generator().manual_seed(start)
            with autocast(self.device):
                made: Any = pipeline(
                    prompts[start : start + COLUMNS],
                    num_inference_steps=steps,
                    guidance_scale=guidance,
                    height=side,
                    width=side,
                    generator=generator,
                    output_type="pt",
                )
            pictures = made.images.float().cpu()
            rows.append(torch.cat([*pictures, *[torch.ones_like(pictures[0])] * (COLUMNS - len(pictures))], dim=-1))
        return sheet_of(rows)


def compile_blocks(transformer: Any) -> None:
    """Compiles the blocks, each kind once for each size, and leaves attention and its choice of a kernel out.

    Not the default: on an H200 with torch 2.11 the compiled backward pass writes where it must not (docs/emoji.md).
    """
    from diffusers.models.transformers import transformer_flux

    torch._dynamo.config.recompile_limit = 32
    reductions: Any = torch._inductor.config.triton
    if hasattr(reductions, "mix_order_reduction"):
        reductions.mix_order_reduction = False
    module: Any = transformer_flux
    module.dispatch_attention_fn = torch._dynamo.disable(module.dispatch_attention_fn)
    transformer.compile_repeated_blocks(dynamic=False)


def sample_prompts(pack: Pack) -> list[str]:
    """Prompts of the sample sheet, evenly over each split of the pack; the same for every run."""
    found = []
    for split, count in SAMPLES.items():
        of = [pack.pictures[i].caption for i in pack.of(split).tolist() if pack.pictures[i].weight == 1]
        stride = max(1, len(of) // count)
        found += of[stride // 2 :: stride][:count]
    return [*found, *FREE_PROMPTS]


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser, Config, Path("out/emoji-data"), Path("out/emoji"))
    parser.add_argument("--data-side", type=cli.count, default=256, help="side of the pictures in memory, in pixels")
    parser.add_argument("--compile", action="store_true", help="compile the blocks: faster, wrong with torch 2.11")
    parser.add_argument("--cudnn", action="store_true", help="attention by cuDNN: two thirds of flash attention's time")
    return parser.parse_args(arguments)


def train(options: argparse.Namespace, started: float) -> list[dict[str, Any]]:
    """Sets everything up and trains; returns the log.

    Raises:
        ValueError: If options, data and checkpoint do not go together.
    """
    config: Config = settings(options, Config)
    if max(config.sides) > options.data_side:
        raise ValueError(f"sides {config.sides} need pictures of that side: pass --data-side {max(config.sides)}")

    def make(device: torch.device) -> Training:
        pack = load_pack(options.data, device, options.data_side)
        return Training(config, pack, options.resume, options.compile, options.cudnn)

    return flow_loop.train(options, started, make)


def main(arguments: list[str] | None = None) -> None:
    """Entry point."""
    started = time.monotonic()
    options = parse_arguments(arguments)
    with cli.told("emoji"):
        if options.export_only:
            model = averaged(options.out, Config)
            size = export(model.state_dict(), model, load_tokenizer(options.data), options.out / EXPORT)
            print(f"{size / 1e6:.2f} MB exported to {options.out / EXPORT}")
        else:
            train(options, started)


if __name__ == "__main__":
    main()
