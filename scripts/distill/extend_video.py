"""Teaches the moving-digits model longer videos: LoRA on its self-attention, under a sparse pattern.

    python -m scripts.distill.extend_video --frames 32 --pattern "radial(decay=0.5)" --minutes 1 --device cuda

After Li et al., "Radial Attention: O(n log n) Sparse Attention with Energy Decay for Long Video Generation" (2025),
section 4.3: only low-rank updates of the query, key, value and output projections learn, and training is as sparse as
generation. `--out` gets `checkpoint.safetensors`, `log.jsonl`, `samples/*.png` and at the end `lora/`, for
`train_moving_digits.load_lora`. Stop it at any time: the same command goes on.

Several processes (`torchrun --nproc-per-node 2 -m scripts.distill.extend_video ...`, or `accelerate launch`) share the
videos of each step, or with `--parallel halo` the tokens of each video. A run may go on with another number of them.
"""

import argparse
import copy
import math
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import nn

from scripts import cli
from scripts.train import digits_training
from scripts.train.digits import attention_of, run
from scripts.train.digits_training import load_checkpoint, save_checkpoint, step_generator, update
from scripts.train.moving_digits import LORA_FILE, flow_matching_loss, load_pipeline, save_sheet
from scripts.train.moving_digits_data import MovingDigits
from scripts.train.moving_digits_training import build_pipeline
from scripts.train.processes import agreed, joined, mean_gradients, mean_of, share_of
from visattn import Layout, parse
from visattn.parallel.processes import Place
from visattn.patterns import Dense

TARGETS = r"blocks\.\d+\.attn1\.(to_q|to_k|to_v|to_out\.0)"
WARM_UP = 50


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """Settings of one run; the checks run before any work.

    Attributes:
        frames: Length of the videos, longer than the model's own.
        pattern: Attention of training, "dense" for the stock one.
        rank: Rank of the updates.
        steps: Most steps.
        minutes: Wall-clock budget; the schedule follows whichever of steps and time is further. 0: steps only.
        batch: Videos in a step.
        model: Pipeline folder or name of an embedded model.
    """

    frames: int = 32
    pattern: str = "radial(decay=0.5)"
    rank: int = 32
    steps: int = 1000
    minutes: float = 0.0
    batch: int = 8
    lr: float = 1e-3
    ema: float = 0.99
    augment: float = 0.6
    seed: int = 0
    model: str = "moving-digits"

    def __post_init__(self) -> None:
        for name in ("frames", "rank", "steps", "batch"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}: pass 1 or more")
        for name in ("minutes", "augment"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} is {getattr(self, name)}: pass 0 or more")
        if self.lr <= 0:
            raise ValueError(f"lr is {self.lr}: pass a number above 0")
        if not 0 <= self.ema < 1:
            raise ValueError(f"ema is {self.ema}: pass a number from 0 to below 1")
        parse(self.pattern)


class Progress(digits_training.Progress):
    """Where a run stands; it has one stage."""

    def done(self, config: Config) -> float:
        """Part of the run that is done, 1 and above: over."""
        return max(self.step / config.steps, self.seconds / (config.minutes * 60) if config.minutes else 0.0)

    def advance(self, config: Any) -> bool:
        """Whether the run is over."""
        return self.done(config) >= 1

    def lr(self, config: Any) -> float:
        """Learning rate: warm-up, then a cosine down to 2 %."""
        cosine = 0.5 + 0.5 * math.cos(math.pi * min(self.done(config), 1.0))
        return config.lr * min(1.0, (self.step + 1) / WARM_UP) * (0.02 + 0.98 * cosine)


class Extension:
    """One run: a frozen model, its updates, their average, the optimizer and where it stands.

    Args:
        config: Settings.
        out: Folder for all output; it holds the checkpoint that a resumed run starts from.
        device: Device of the model.
        resume: Whether to go on from a checkpoint in `out`.
        backend: Backend of the pattern.
        place: This process among others; None if it is alone.
        parallel: How they share each video's tokens, None if they share the videos.

    Raises:
        ValueError: If the model or the pattern does not fit, or the checkpoint is from another run.
    """

    def __init__(
        self,
        config: Config,
        out: Path,
        device: str = "cpu",
        resume: bool = True,
        backend: str = "auto",
        place: Place | None = None,
        parallel: str | None = None,
    ) -> None:
        self.place, self.parallel = place or Place(0, 1, device), parallel
        self.share = slice(None) if parallel else share_of(config.batch, self.place)
        self.config, self.out, self.device, self.backend = config, out, torch.device(device), backend
        pipeline: Any = load_pipeline(config.model)
        self.size, own = pipeline.config.sample_size, pipeline.config.num_frames
        if config.frames <= own:
            raise ValueError(f"frames is {config.frames}, but {config.model} makes {own} already: pass more")
        self.model: Any = pipeline.transformer.to(self.device).requires_grad_(False)
        _check_pattern(config, self.model, self.size)
        torch.manual_seed(config.seed)
        self.updates = add_updates(self.model, config.rank)
        self.ema = copy.deepcopy(self.updates).requires_grad_(False)
        self.optimizer = torch.optim.AdamW(self.updates.parameters(), lr=config.lr, betas=(0.9, 0.99), weight_decay=0.0)
        self.batches = MovingDigits(self.device, config.augment)
        self.progress = Progress()
        self.checkpoint = out / "checkpoint.safetensors"
        out.mkdir(parents=True, exist_ok=True)
        if resume and self.checkpoint.is_file():
            done = load_checkpoint(self.checkpoint, config, self.updates, self.ema, self.optimizer)  # type: ignore[arg-type]
            self.progress = Progress(**asdict(done))

    def save(self) -> None:
        """Writes the checkpoint."""
        save_checkpoint(self.checkpoint, self.config, self.progress, self.updates, self.ema, self.optimizer)  # type: ignore[arg-type]

    def step(self) -> dict[str, Any]:
        """Runs one step and returns its figures for the log."""
        start, config, progress = time.perf_counter(), self.config, self.progress
        generator = step_generator(config.seed, progress.step)
        videos, labels = self.batches.draw(config.batch, config.frames, self.size, generator)
        pattern = None if config.pattern == "dense" and not self.parallel else config.pattern
        with attention_of(self.model, pattern, self.backend, self.parallel):
            loss = flow_matching_loss(self.model, videos, labels, generator, self.share)
            loss.backward()
        mean_gradients(self.updates.parameters(), self.place)
        lr = progress.lr(config)
        norm = update(self.updates.parameters(), self.optimizer, lr)
        self._average()
        seconds = agreed(time.perf_counter() - start, self.place)
        progress.step, progress.seconds = progress.step + 1, progress.seconds + seconds
        return {
            "loss": mean_of(loss.detach(), self.place).item(),
            "grad_norm": norm,
            "lr": lr,
            "step_s": round(seconds, 3),
        }

    @torch.no_grad()
    def _average(self) -> None:
        """Moves the averaged updates; the average starts short."""
        decay = min(self.config.ema, (1 + self.progress.step) / (10 + self.progress.step))
        torch._foreach_lerp_(list(self.ema.parameters()), list(self.updates.parameters()), 1 - decay)

    def export(self) -> int:
        """Writes the averaged updates as a LoRA folder; returns its size in bytes."""
        folder, temporary = self.out / "lora", self.out / "lora.tmp"
        shutil.rmtree(temporary, ignore_errors=True)
        self._with_average(lambda: self.model.save_lora_adapter(temporary, weight_name=LORA_FILE))
        shutil.rmtree(folder, ignore_errors=True)
        temporary.rename(folder)
        return sum(file.stat().st_size for file in folder.iterdir())

    def picture(self) -> None:
        """Saves a sheet made by the averaged updates: a row of frames for each of the ten digits."""
        pipeline = build_pipeline(self.model)

        def draw() -> Any:
            with attention_of(self.model, None if self.config.pattern == "dense" else self.config.pattern):
                return save_sheet(pipeline, self.config.frames, self.size, self.out, self.progress.step)

        self._with_average(draw)

    @torch.no_grad()
    def _with_average(self, action: Callable[[], Any]) -> None:
        """Runs something while the model holds the averaged updates."""
        own = [p.clone() for p in self.updates.parameters()]
        torch._foreach_copy_(list(self.updates.parameters()), list(self.ema.parameters()))
        action()
        torch._foreach_copy_(list(self.updates.parameters()), own)


def add_updates(model: Any, rank: int) -> nn.ParameterDict:
    """Adds low-rank updates to a model's self-attention that change nothing yet; returns their parameters."""
    from peft import LoraConfig

    model.add_adapter(LoraConfig(r=rank, lora_alpha=rank, target_modules=TARGETS))
    return nn.ParameterDict({n.replace(".", "_"): p for n, p in model.named_parameters() if p.requires_grad})


def _check_pattern(config: Config, model: Any, size: int) -> None:
    pattern = parse(config.pattern)
    frames, height, width = model.config.patch_size
    grid = (config.frames // frames, size // height, size // width)
    Layout(grid)
    if not isinstance(pattern, Dense):
        pattern.check(grid)


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """Command line: one option for each field of `Config`, and where and how to run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for field in fields(Config):
        parser.add_argument(f"--{field.name}", type=cli.like(field.name, field.default), default=field.default)
    parser.add_argument("--out", type=Path, default=Path("runs/extend-video"))
    parser.add_argument("--threads", type=cli.count, default=2)
    parser.add_argument("--device", type=cli.device, default="cpu")
    parser.add_argument("--backend", default="auto", help="backend of the pattern")
    parser.add_argument("--parallel", choices=("halo", "ulysses"), help="how processes share the tokens of each video")
    parser.add_argument("--resume", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--checkpoint-minutes", type=cli.number, default=2.0)
    parser.add_argument("--sample-every", type=int, default=0, help="steps between sample pictures, 0 for none")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    """Entry point."""
    options = parse_arguments(arguments)
    with cli.told("extend_video"):
        config = Config(**{field.name: getattr(options, field.name) for field in fields(Config)})
        torch.set_num_threads(options.threads)
        with cli.only_run(options.out), joined(options.device) as place:
            given = options.out, place.device, options.resume, options.backend, place, options.parallel
            _extend(Extension(config, *given), options)


def _extend(extension: Extension, options: argparse.Namespace) -> None:
    """Run to the end; the first process alone writes."""
    if not extension.place.first:
        while not extension.progress.advance(extension.config):
            extension.step()
        return
    size = run(extension, options.checkpoint_minutes, options.sample_every, lambda line: print(line, flush=True))  # type: ignore[arg-type]
    name = torch.cuda.get_device_name() if extension.device.type == "cuda" else f"CPU, {options.threads} threads"
    done = extension.progress
    print(f"{done.step} steps, {done.seconds:.0f} s of steps on {name}, LoRA of {size / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
