"""The loop of a distillation."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn
from torch.nn.utils import clip_grad_norm_

from distillation.config import Config
from distillation.noise import Noise
from distillation.pictures import Pictures
from distillation.samples import SampleSet
from distillation.state import load_checkpoint, save_checkpoint, trim_log
from distillation.student import LORA, Distiller, build_batch
from visattn.pipelines.load import load_pipeline
from visattn.pipelines.trained import Trained, save_trained

CHECKPOINT, RESULT, LOG = "checkpoint.safetensors", "student.safetensors", "log.jsonl"


class Training:
    """One run: teacher, student, optimizer, average and where it stands.

    Args:
        config: Settings, checked.

    Raises:
        ValueError: If teacher, samples and settings do not fit together.
    """

    def __init__(self, config: Config) -> None:
        self.config = config
        self.accelerator = Accelerator(cpu=config.cpu, mixed_precision=config.precision)
        torch.manual_seed(config.seed)
        if config.threads:
            torch.set_num_threads(config.threads)
        self.samples = SampleSet(config.samples)
        index = self.samples.index
        self.noise = Noise(
            index.kind, tuple(index.timesteps), index.time_scale, self.samples.constants.get("noise.alphas")
        )
        self.parts = micro_batches(config, self.accelerator.process_index, self.accelerator.num_processes)
        pipe: Any = load_pipeline(config.model, str(self.accelerator.device), "float32")
        if not hasattr(pipe, index.denoiser):
            raise ValueError(
                f"{config.model} has no {index.denoiser}, which the samples in {config.samples} were made by"
            )
        self.distiller = Distiller(getattr(pipe, index.denoiser), index.anchor, config)
        self.distiller.to(self.accelerator.device)
        self.trained = self.distiller.trained()
        self.optimizer = build_optimizer(self.trained, config)
        self.average = {name: value.detach().clone() for name, value in self.trained.items()} if config.ema else {}
        self.step = 0
        self.checkpoint = config.out / CHECKPOINT
        if config.resume and self.checkpoint.is_file():
            self.step = load_checkpoint(self.checkpoint, self.trained, self.average, self.optimizer)
        self.wrapped = self.accelerator.prepare(self.distiller)
        self.pictures = Pictures(pipe, index, config.out / "samples")

    def train_step(self) -> dict[str, float]:
        """Runs one step and returns its figures for the log."""
        config, figures = self.config, {}
        for i, part in enumerate(self.parts):
            batch = build_batch(self.samples, self.noise, config, self.step, part, self.accelerator.device)
            last = i + 1 == len(self.parts)
            with nullcontext() if last else self.accelerator.no_sync(self.wrapped):
                losses = self.wrapped(batch)
                total = sum(getattr(config, name) * value for name, value in losses.items()) / len(self.parts)
                self.accelerator.backward(total)
            for name, value in losses.items():
                figures[name] = figures.get(name, 0.0) + value.detach() / len(self.parts)
        norm = clip_grad_norm_(self.trained.values(), config.clip or math.inf)
        share = rate_share(self.step, config)
        for group in self.optimizer.param_groups:
            group["lr"] = group["peak"] * share
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self._average()
        self.step += 1
        return figures | {"gradient": norm, "lr": config.rate * share}

    @torch.no_grad()
    def _average(self) -> None:
        """Moves the averaged weights; the first averages are short, to forget the start soon."""
        if self.average:
            decay = min(self.config.ema, (1 + self.step) / (10 + self.step))
            new = [self.trained[name].detach() for name in self.average]
            torch._foreach_lerp_(list(self.average.values()), new, 1 - decay)

    @property
    def result(self) -> dict[str, torch.Tensor]:
        """The trained tensors that count: averaged, unless there is no average."""
        return self.average or {name: value.detach() for name, value in self.trained.items()}

    @contextmanager
    def averaged(self) -> Iterator[nn.Module]:
        """The student with the averaged weights, for as long as the context lasts."""
        kept = {name: value.detach().clone() for name, value in self.trained.items()}
        _fill(self.trained, self.result)
        try:
            yield self.distiller.student
        finally:
            _fill(self.trained, kept)

    def save(self) -> None:
        """Writes the checkpoint."""
        if self.accelerator.is_main_process:
            save_checkpoint(self.checkpoint, self.config, self.step, self.trained, self.average, self.optimizer)

    def export(self) -> Path:
        """Writes the result; returns its file."""
        path = self.config.out / RESULT
        if self.accelerator.is_main_process:
            save_trained(path, as_trained(self.result, self.config, self.step))
        return path


def _fill(parameters: dict[str, Any], values: dict[str, torch.Tensor]) -> None:
    with torch.no_grad():
        for name, value in values.items():
            parameters[name].copy_(value)


def micro_batches(config: Config, rank: int, processes: int) -> list[slice]:
    """The parts of a step's batch that one process runs, one after the other.

    Raises:
        ValueError: If the batch cannot be shared so.
    """
    micro = config.micro_batch or config.batch // processes
    if config.batch % processes or not micro or (config.batch // processes) % micro:
        raise ValueError(
            f"--batch {config.batch} must be a multiple of {processes} processes x --micro-batch {config.micro_batch}"
        )
    share = config.batch // processes
    return [slice(start, start + micro) for start in range(rank * share, (rank + 1) * share, micro)]


def build_optimizer(trained: dict[str, nn.Parameter], config: Config) -> torch.optim.Optimizer:
    """AdamW or Prodigy; the pattern's own parameters are a group with a rate of their own."""
    own = [value for name, value in trained.items() if name.startswith("own.")]
    others = [value for name, value in trained.items() if not name.startswith("own.")]
    rates = ((others, config.rate), (own, config.own_lr or config.rate))
    groups = [{"params": values, "lr": rate, "peak": rate} for values, rate in rates if values]
    if config.optimizer == "prodigy":
        from prodigyopt import Prodigy

        return Prodigy(groups, lr=1.0, weight_decay=config.weight_decay)
    return torch.optim.AdamW(groups, lr=config.rate, betas=(0.9, 0.99), weight_decay=config.weight_decay)


def rate_share(step: int, config: Config) -> float:
    """Learning rate of a step as a share of its peak."""
    warm = min(1.0, (step + 1) / config.warmup) if config.warmup else 1.0
    if config.schedule == "constant":
        return warm
    return warm * (0.02 + 0.98 * (0.5 + 0.5 * math.cos(math.pi * step / config.steps)))


def as_trained(tensors: dict[str, torch.Tensor], config: Config, step: int) -> Trained:
    """The trained tensors in the form of their file."""
    own = {name.removeprefix("own."): value for name, value in tensors.items() if name.startswith("own.")}
    student = {n.removeprefix("student."): value for n, value in tensors.items() if n.startswith("student.")}
    first = f".lora_A.{LORA}.weight"
    lora = {
        name.removesuffix(first): (value, student[name.replace(".lora_A.", ".lora_B.")])
        for name, value in student.items()
        if name.endswith(first)
    }
    whole = {} if lora else student
    about = {
        "model": config.model,
        "pattern": config.pattern,
        "layers": config.layers,
        "dense_layers": config.dense_layers,
        "steps": step,
        "lora_scale": (config.lora_alpha or config.lora) / config.lora if config.lora else 1.0,
    }
    return Trained(whole, lora, own, about)


class Log:
    """JSON lines, and TensorBoard if asked for; silent in all processes but the first."""

    def __init__(self, config: Config, active: bool, step: int) -> None:
        self._file = self._board = None
        if not active:
            return
        trim_log(config.out / LOG, step)
        self._file = (config.out / LOG).open("a", buffering=1)
        if config.tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self._board = SummaryWriter(config.out / "tensorboard", purge_step=step)

    def write(self, step: int, figures: dict[str, Any]) -> None:
        """Adds a line."""
        if self._file is not None:
            self._file.write(json.dumps({"step": step} | figures) + "\n")
        if self._board is not None:
            for name, value in figures.items():
                if isinstance(value, float):
                    self._board.add_scalar(name, value, step)

    def close(self) -> None:
        """Closes the files."""
        for each in (self._file, self._board):
            if each is not None:
                each.close()


def run(training: Training) -> Path:
    """Trains to the end and exports; returns the file of the result."""
    from tqdm import tqdm

    config, first = training.config, training.accelerator.is_main_process
    log = Log(config, first, training.step)
    bar = tqdm(total=config.steps, initial=training.step, unit="step", disable=None if first else True)
    started, start = time.perf_counter(), training.step
    try:
        while training.step < config.steps:
            figures = training.train_step()
            step = training.step
            if step % config.log_every == 0 or step == config.steps:
                plain = {name: float(value) for name, value in figures.items()}
                bar.set_postfix({name: f"{plain[name]:.4f}" for name in plain if name != "lr"})
                speed = (time.perf_counter() - started) / (step - start)
                log.write(step, {name: round(value, 7) for name, value in plain.items()} | {"step_s": round(speed, 4)})
            bar.update()
            if first and config.sample_every and step % config.sample_every == 0:
                with training.averaged() as student:
                    training.pictures.save(student, f"{step:06d}")
            if step % config.save_every == 0 or step == config.steps:
                training.save()
    except KeyboardInterrupt:
        training.save()
        print(f"stopped after {training.step} of {config.steps} steps: the same command goes on", flush=True)
    finally:
        log.close()
        bar.close()
    return training.export()
