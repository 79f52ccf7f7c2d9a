"""Teaches the emoji model a style that needs no word: LoRA (peft) on its transformer, from the pictures of one style.

    python -m scripts.train.emoji_lora --data out/emoji-data --style "high contrast" --out out/emoji-lora --device cuda

It learns "red apple" where the model itself wants "red apple, high contrast". --out gets the adapter as diffusers loads
it, before or after `visattn.apply`, whatever the pattern:

    pipe.transformer.load_lora_adapter("out/emoji-lora", prefix=None)

Only pictures of the training split are learned from. The folder is written when training ends. Several processes
(`torchrun --nproc-per-node 2 -m scripts.train.emoji_lora ...`, or `accelerate launch`) share the pictures of each step.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig

from scripts import cli
from scripts.train.emoji_captions import NEW_EMOJI, NEW_PAIR, TRAIN, encode
from scripts.train.emoji_data import Pack, load_pack
from scripts.train.emoji_sources import SIDE, STYLES
from scripts.train.emoji_training import Config, draw, loss_of
from scripts.train.flow_loop import attend_by, autocast
from scripts.train.processes import agreed, joined, mean_gradients, mean_of, share_of
from visattn.files import output_folder, write_json
from visattn.parallel.processes import Place
from visattn.pipelines.embedded.pixel_flux import PixelFluxPipeline
from visattn.pipelines.load import load_pipeline

FILE = "pytorch_lora_weights.safetensors"
# Queries, keys, values and outputs of the picture's tokens, and what single blocks read and write.
TARGETS = ["to_q", "to_k", "to_v", "to_out.0", "proj_mlp", "proj_out", "net.0.proj", "net.2"]
LOG_EVERY = 20
MEASURED = 64


class Training:
    """LoRA on a pipeline's transformer, and the pictures that it learns from.

    Args:
        pipeline: The model in float32; its own weights stay as they are.
        pack: The real pictures, on the pipeline's device.
        options: Of the command line.
        place: This process among others; None if it is alone.
    """

    def __init__(self, pipeline: Any, pack: Pack, options: argparse.Namespace, place: Place | None = None) -> None:
        self.place = place or Place(0, 1, str(pack.pixels.device))
        share_of(options.batch, self.place)
        self.options, self.device = options, pack.pixels.device
        self.pack = without_style(pack, options.style)
        pipeline.transformer.requires_grad_(False)
        pipeline.text_encoder.requires_grad_(False)
        self.model, self.pipeline = _Parts(pipeline), pipeline
        torch.manual_seed(options.seed)
        # The last layer of the transformer is named like one of a single block, and no part of a style.
        targets = [name for name, module in pipeline.transformer.named_modules() if _wanted(name, module)]
        pipeline.transformer.add_adapter(LoraConfig(r=options.rank, lora_alpha=options.rank, target_modules=targets))
        self.trained = [each for each in pipeline.transformer.parameters() if each.requires_grad]
        self.optimizer = torch.optim.AdamW(self.trained, lr=options.lr, weight_decay=0.0)
        self.config = Config(dropped=0.1, seed=options.seed)
        self.weights = self._weights(TRAIN)
        self.done = 0

    def _weights(self, *splits: str) -> torch.Tensor:
        styles = torch.tensor([each.style == self.options.style for each in self.pack.pictures])
        return (self.pack.weights(*splits) * styles).to(self.device)

    def step(self) -> torch.Tensor:
        """Runs one step; returns the loss on the device."""
        options = self.options
        seed = options.seed * 1_000_003 + self.done
        batch = draw(self.pack, self.weights, options.side, options.batch, self.config, seed)
        with autocast(self.device):
            loss = loss_of(self.model, batch.part(self.place.rank, self.place.world)).mean()  # type: ignore[arg-type]
        loss.backward()
        mean_gradients(self.trained, self.place)
        torch.nn.utils.clip_grad_norm_(self.trained, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.done += 1
        return mean_of(loss.detach(), self.place)

    @torch.no_grad()
    def loss(self) -> float:
        """Mean loss on fixed held-out pictures of the style, under captions that do not name it."""
        config = replace(self.config, dropped=0.0)
        weights = self._weights(NEW_PAIR, NEW_EMOJI)
        count = min(MEASURED, 4 * self.options.batch)
        batch = draw(self.pack, weights, self.options.side, count, config, 12345)
        parts = -(-count // self.options.batch)
        with autocast(self.device):
            losses = [loss_of(self.model, batch.part(i, parts)) for i in range(parts)]  # type: ignore[arg-type]
        return torch.cat(losses).mean().item()

    def run(self, report: Callable[[str], None] = print) -> dict[str, Any]:
        """Trains until the seconds or steps are used; returns the figures."""
        options, start = self.options, time.monotonic()
        # torch's own choice, cuDNN, ended in an illegal memory access in its backward pass (torch 2.11 on an H200).
        attend_by(self.device)
        before = self.loss()
        while self.done < options.steps and agreed(time.monotonic() - start, self.place) < options.seconds:
            loss = self.step()
            if self.done % LOG_EVERY == 0 and self.place.first:
                report(json.dumps({"step": self.done, "loss": round(loss.item(), 5)}))
        seconds = round(time.monotonic() - start, 1)
        return {"style": options.style, "steps": self.done, "seconds": seconds, "before": before, "after": self.loss()}


class _Parts(torch.nn.Module):
    """Transformer and text encoder of a pipeline, as the loss of the emoji training takes them."""

    def __init__(self, pipeline: PixelFluxPipeline) -> None:
        super().__init__()
        self.transformer, self.text_encoder = pipeline.transformer, pipeline.text_encoder


def _wanted(name: str, module: torch.nn.Module) -> bool:
    inside = "transformer_blocks." in name and isinstance(module, torch.nn.Linear)
    return inside and any(name.endswith(f".{target}") for target in TARGETS) and "_context" not in name


def without_style(pack: Pack, style: str) -> Pack:
    """The pack with captions that do not name the style.

    Raises:
        ValueError: If the style does not exist, or the pack has no picture of it to learn from or to measure with.
    """
    if style not in STYLES:
        raise ValueError(f"style {style!r} does not exist: pass one of {', '.join(STYLES)}")
    for splits in ((TRAIN,), (NEW_PAIR, NEW_EMOJI)):
        if not any(each.style == style and each.split in splits for each in pack.pictures):
            raise ValueError(f"the pack has no {style!r} picture of {' or '.join(splits)}: pass another --style")
    names = [each.caption.removesuffix(f", {each.style}") for each in pack.pictures]
    ids = torch.tensor(encode(pack.tokenizer, names), device=pack.pixels.device)
    return replace(pack, tokens=ids[:, None], plain=ids)


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--style", default=STYLES[-1], help=f"one of {', '.join(STYLES)}")
    parser.add_argument("--data", type=Path, default=Path("out/emoji-data"), help="folder of the pack")
    parser.add_argument("--out", type=Path, default=Path("out/emoji-lora"))
    parser.add_argument("--force", action="store_true", help="overwrite what is in --out")
    parser.add_argument("--model", default="emoji", help="the embedded model, or a folder of one of its kind")
    parser.add_argument("--rank", type=cli.count, default=8)
    parser.add_argument("--steps", type=cli.count, default=1000, help="at most")
    parser.add_argument("--seconds", type=cli.number, default=120.0, help="at most")
    parser.add_argument("--batch", type=cli.count, default=16)
    parser.add_argument("--side", type=cli.count, default=SIDE, help="of the pictures, in pixels")
    parser.add_argument("--lr", type=cli.number, default=1e-3)
    parser.add_argument("--seed", type=cli.seed, default=0)
    parser.add_argument("--device", type=cli.device, default="cpu")
    parser.add_argument("--threads", type=cli.count, default=2)
    return parser.parse_args(arguments)


def train(options: argparse.Namespace) -> dict[str, Any]:
    """Trains and writes the adapter; returns the figures."""
    for name in ("lr", "seconds"):
        if getattr(options, name) <= 0:
            raise ValueError(f"--{name} {getattr(options, name)} must be above 0")
    torch.set_num_threads(options.threads)
    with joined(options.device) as place:
        if not place.first:
            return _training(options, place).run()
        with output_folder(options.out, options.force) as folder:
            training = _training(options, place)
            figures = training.run(lambda line: print(line, flush=True))
            training.pipeline.transformer.save_lora_adapter(folder, weight_name=FILE, safe_serialization=True)
            write_json(folder / "figures.json", figures)
        return figures | {"bytes": (options.out / FILE).stat().st_size}


def _training(options: argparse.Namespace, place: Place) -> Training:
    pack = load_pack(options.data, place.device, max(options.side, 32))
    return Training(load_pipeline(options.model, place.device, "float32"), pack, options, place)


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point."""
    options = parse_arguments(arguments)
    with cli.told("emoji_lora"):
        figures = train(options)
        if "bytes" in figures:
            print(json.dumps(figures))


if __name__ == "__main__":
    main()
