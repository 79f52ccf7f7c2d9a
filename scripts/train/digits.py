"""Trains the embedded "digits" model: about an hour on two CPU cores.

    python -m scripts.train.digits --out runs/digits --minutes 60

Stop it at any time; the same command goes on from the last checkpoint. `--out` gets `checkpoint.safetensors`,
`log.jsonl`, `samples/*.png` and at the end `digits/`, the pipeline folder that the package ships.

The coarse stage sees 16 px and 32 px pictures (64 and 256 tokens), where a step costs the same but shows more
pictures; the finishing stage sees 64 px (1024 tokens) and runs every other step with neighborhood attention,
so that the weights are good for both.
"""

import argparse
import copy
import json
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, Protocol

import torch
from diffusers import DiTTransformer2DModel
from torch import nn
from torch.nn import functional as F

from scripts import cli
from scripts.train.digits_data import DigitBatches
from scripts.train.digits_training import (
    CLASSES,
    FULL_SIZE,
    NULL_LABEL_DROPOUT,
    Config,
    Progress,
    build_model,
    build_scheduler,
    export,
    export_checkpoint,
    load_checkpoint,
    save_checkpoint,
    step_generator,
    time_shift,
    update,
)
from visattn.environment import chosen_device
from visattn.pipelines.embedded.pixel_dit import PixelDiTPipeline

LOG_EVERY = 20


class Training:
    """One run: the model, its average, the optimizer and where it stands.

    Args:
        config: Settings.
        out: Folder for all output; it holds the checkpoint that a resumed run starts from.
        device: Device of the model.
        resume: Whether to go on from a checkpoint in `out`.
    """

    def __init__(self, config: Config, out: Path, device: str = "cpu", resume: bool = True) -> None:
        torch.manual_seed(config.seed)
        self.config, self.out, self.device = config, out, torch.device(device)
        model: Any = build_model(config.layers)
        self.model: DiTTransformer2DModel = model.to(self.device)
        self.ema = copy.deepcopy(self.model).requires_grad_(False)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=config.lr, betas=(0.9, 0.99), weight_decay=0.01)
        self.batches = DigitBatches(self.device, config.augment)
        self.progress = Progress()
        self.checkpoint = out / "checkpoint.safetensors"
        out.mkdir(parents=True, exist_ok=True)
        if resume and self.checkpoint.is_file():
            self.progress = load_checkpoint(self.checkpoint, config, self.model, self.ema, self.optimizer)

    def save(self) -> None:
        """Writes the checkpoint."""
        save_checkpoint(self.checkpoint, self.config, self.progress, self.model, self.ema, self.optimizer)

    def step(self) -> dict[str, Any]:
        """Runs one step and returns its figures for the log."""
        start, config, progress = time.perf_counter(), self.config, self.progress
        size = progress.size(config)
        generator = step_generator(config.seed, progress.step)
        batch = max(1, config.batch * (FULL_SIZE // 2) ** 2 // size**2)
        images, labels = self.batches.draw(batch, size, generator)
        pattern = config.finish_pattern(progress.step) if progress.finishing else None
        with attention_of(self.model, pattern):
            loss = flow_matching_loss(self.model, images, labels, generator)
            loss.backward()
        lr = progress.lr(config)
        norm = update(self.model.parameters(), self.optimizer, lr)
        self._average()
        seconds = time.perf_counter() - start
        progress.step, progress.seconds = progress.step + 1, progress.seconds + seconds
        figures = {"size": size, "batch": batch, "pattern": pattern or "dense", "loss": loss.item()}
        return figures | {"grad_norm": norm, "lr": lr, "step_s": round(seconds, 3)}

    @torch.no_grad()
    def _average(self) -> None:
        """Moves the averaged weights; a stage starts with short averages, to forget the weights before it soon."""
        done = self.progress.step - max(self.progress.finish_step, 0)
        decay = min(self.config.ema, (1 + done) / (10 + done))
        for average, value in zip(self.ema.parameters(), self.model.parameters(), strict=True):
            average.lerp_(value, 1 - decay)

    def export(self) -> int:
        """Writes the averaged weights as a pipeline folder; returns its size in bytes."""
        return export(self.ema.cpu(), self.out / "digits")

    def picture(self) -> None:
        """Saves a row of the ten digits made by the averaged weights at the current size."""
        size = self.progress.size(self.config)
        pipeline = PixelDiTPipeline(self.ema, build_scheduler())
        pipeline.set_progress_bar_config(disable=True)
        generator = torch.Generator().manual_seed(0)
        output: Any = pipeline(
            list(range(10)), num_inference_steps=16, height=size, width=size, generator=generator, output_type="pt"
        )
        row = torch.cat(list(output.images.cpu()), dim=-1)
        folder = self.out / "samples"
        folder.mkdir(exist_ok=True)
        image = pipeline.image_processor.numpy_to_pil(row[None].permute(0, 2, 3, 1).numpy())[0]
        image.save(folder / f"{self.progress.step:06d}.png")


def flow_matching_loss(
    model: DiTTransformer2DModel, images: torch.Tensor, labels: torch.Tensor, generator: torch.Generator
) -> torch.Tensor:
    """Mean squared error of the predicted velocity (noise minus image) at a random time.

    Args:
        model: The transformer.
        images: [B, 1, H, W], values -1 to 1.
        labels: [B]; a tenth of them is replaced with the null class.
        generator: CPU generator of times, noise and dropped labels.
    """
    batch, size = len(images), images.shape[-1]
    noise = torch.randn(images.shape, generator=generator).to(images.device)
    t = torch.sigmoid(torch.randn(batch, generator=generator))
    shift = time_shift(size)
    t = (shift * t / (1 + (shift - 1) * t)).to(images.device)
    dropped = (torch.rand(batch, generator=generator) < NULL_LABEL_DROPOUT).to(images.device)
    labels = torch.where(dropped, CLASSES, labels)
    mixed = torch.lerp(images, noise, t[:, None, None, None])
    velocity = model(mixed, timestep=t * 1000, class_labels=labels).sample
    return F.mse_loss(velocity, noise - images)


def attention_of(
    model: nn.Module, pattern: str | None, backend: str = "auto", parallel: str | None = None
) -> AbstractContextManager[Any]:
    """Context in which the model runs with a pattern on a backend; None leaves its dense attention.

    With `parallel` the processes share each sample's tokens, see `visattn.apply`.

    Raises:
        RuntimeError: If visattn cannot apply the pattern.
    """
    if pattern is None:
        return nullcontext()
    try:
        from visattn import apply
    except ImportError as error:
        message = f"finishing with {pattern} needs visattn.apply ({error}): pass --finish-attention dense"
        raise RuntimeError(message) from error
    return apply(model, pattern, backend=backend, strict=True, parallel=parallel)


class Run(Protocol):
    """What `run` needs of a training: its settings, where it stands, and its steps."""

    config: Any
    progress: Any
    out: Path

    def step(self) -> dict[str, float]:
        """One step; returns what the log says of it."""
        ...

    def save(self) -> None:
        """Writes the checkpoint."""
        ...

    def picture(self) -> None:
        """Draws samples."""
        ...

    def export(self) -> int:
        """Writes the result; returns its size in bytes."""
        ...


def run(
    training: Run,
    checkpoint_minutes: float = 2.0,
    sample_every: int = 500,
    report: Callable[[str], None] = print,
) -> int:
    """Trains to the end of the schedule and exports; returns the size of the export in bytes."""
    config, progress = training.config, training.progress
    log = (training.out / "log.jsonl").open("a", buffering=1)
    log.write(json.dumps({"event": "start", "progress": asdict(progress), "config": asdict(config)}) + "\n")
    saved = time.monotonic()
    try:
        while not progress.advance(config):
            if progress.step == progress.finish_step:
                training.save()
            figures = training.step()
            if progress.step % LOG_EVERY == 0:
                line = json.dumps({"step": progress.step, "seconds": round(progress.seconds, 1)} | figures)
                log.write(line + "\n")
                report(line)
            if sample_every and progress.step % sample_every == 0:
                training.picture()
            if time.monotonic() - saved > checkpoint_minutes * 60:
                training.save()
                saved = time.monotonic()
        training.save()
        size = training.export()
        log.write(json.dumps({"event": "end", "progress": asdict(progress), "export_bytes": size}) + "\n")
    finally:
        log.close()
    return size


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """Command line: one option for each field of `Config`, and where and how to run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for field in fields(Config):
        parser.add_argument(
            f"--{field.name.replace('_', '-')}", type=cli.like(field.name, field.default), default=field.default
        )
    parser.add_argument("--out", type=Path, default=Path("runs/digits"))
    parser.add_argument("--threads", type=cli.count, default=2)
    parser.add_argument("--device", type=cli.device, default="cpu")
    parser.add_argument("--resume", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--checkpoint-minutes", type=cli.number, default=2.0)
    parser.add_argument("--export-only", action="store_true", help="export the checkpoint in --out as it stands")
    parser.add_argument("--sample-every", type=int, default=500, help="steps between sample pictures, 0 for none")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    """Entry point."""
    options = parse_arguments(arguments)
    with cli.told("train_digits"):
        if options.export_only:
            with cli.only_run(options.out):
                size = export_checkpoint(options.out / "checkpoint.safetensors", options.out / "digits")
            print(f"{size / 1e6:.2f} MB exported to {options.out / 'digits'}")
            return
        chosen_device(options.device)
        config = Config(**{field.name: getattr(options, field.name) for field in fields(Config)})
        torch.set_num_threads(options.threads)
        with cli.only_run(options.out):
            training = Training(config, options.out, options.device, options.resume)
            size = run(training, options.checkpoint_minutes, options.sample_every, lambda line: print(line, flush=True))
    print(f"{training.progress.step} steps, {training.progress.seconds / 60:.1f} min, {size / 1e6:.2f} MB exported")


if __name__ == "__main__":
    main()
