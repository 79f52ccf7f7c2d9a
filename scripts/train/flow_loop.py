"""The loop of a flow-matching training: steps on one or several devices, the average, checkpoints, log, commands."""

from __future__ import annotations

import argparse
import copy
import json
import math
import os
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import PIL.Image
import torch
import torch.distributed as dist

from scripts import cli
from scripts.train.checkpoints import load_exported, load_parts, save_parts, set_weights, weights_of
from scripts.train.emoji_captions import TRAIN
from scripts.train.emoji_data import Pack
from scripts.train.emoji_optimizer import Guard, build_optimizers
from scripts.train.flow import Batch, FlowConfig, Progress, about, check_same
from visattn.environment import chosen_device
from visattn.files import write_json, written_whole

STATE, AVERAGE = "state", "average"
SAVE_EVERY = 150.0
LOG_EVERY = 50
MOST_PARTS = 16


class FlowTraining(ABC):
    """One run: the model, its average, the optimizers and where it stands.

    Args:
        config: Settings.
        pack: The data, on the device of the training.
        resume: Folder with a checkpoint to go on from, or an exported pipeline to start anew from.
    """

    cudnn_from: int | None = None  # side in pixels from which cuDNN computes the attention on a GPU

    def __init__(self, config: FlowConfig, pack: Pack, resume: Path | None = None) -> None:
        self.config, self.pack, self.device = config, pack, pack.pixels.device
        self.weights = pack.weights(TRAIN).to(self.device)
        self.model: Any = config.model().to(self.device)
        self.progress = Progress()
        if resume is not None and (resume / "model_index.json").is_file():
            set_weights(self.model, load_exported(resume))
        elif resume is not None:
            weights, saved = load_parts(resume / STATE)
            self.progress = check_same(config, saved)
            set_weights(self.model, weights)
        self.average: Any = copy.deepcopy(self.model).requires_grad_(False).eval()
        self.ranks = dist.get_world_size() if dist.is_initialized() else 1
        self.rank = dist.get_rank() if dist.is_initialized() else 0
        self.parts = 1
        self.restart()

    def restart(self) -> None:
        """What a checkpoint does not hold starts anew; weights are rounded as it holds them."""
        for value in weights_of(self.model).values():
            value.copy_(value.half())
        set_weights(self.average, weights_of(self.model))
        self.optimizers = build_optimizers(self.model, self.config.lr, self.config.weight_decay)
        self.trained = [each for each in self.model.parameters() if each.requires_grad]
        self.guard = Guard(self.trained)
        self.progress.restart = self.progress.step

    def step(self) -> torch.Tensor:
        """Runs one step; returns the loss on the device."""
        config, progress = self.config, self.progress
        stage = config.stage_of_step(progress.done(config), progress.step)
        batch = self.draw(stage, (config.seed * 1_000_003 + progress.step) * 64 + self.rank)
        attend_by(self.device, self.cudnn_from is not None and config.sides[stage] >= self.cudnn_from)
        loss = self._gradients(batch)
        self._reduce()
        self.guard()
        rate = config.rate(progress.done(config), progress.step - progress.restart)
        torch.nn.utils.clip_grad_norm_(self.trained, 1.0, foreach=True)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rate * group["share"]
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        progress.step += 1
        progress.pictures += len(batch) * self.ranks
        self._move_average()
        return loss

    def _gradients(self, batch: Batch) -> torch.Tensor:
        """Mean loss of the batch and its gradients, in more parts where memory does not suffice."""
        while True:
            try:
                total = torch.zeros((), device=self.device)
                for i in range(self.parts):
                    part = batch.part(i, self.parts)
                    with autocast(self.device):
                        loss = self.loss_of(self.model, part).sum() / len(batch)
                    loss.backward()
                    total += loss.detach()
                return total
            except torch.cuda.OutOfMemoryError:
                if self.parts >= min(MOST_PARTS, len(batch)):
                    raise
            self.parts *= 2
            for parameter in self.trained:
                parameter.grad = None
            torch.cuda.empty_cache()

    def _reduce(self) -> None:
        """Averages the gradients over all devices."""
        if self.ranks == 1:
            return
        gradients = [parameter.grad for parameter in self.trained if parameter.grad is not None]
        flat = torch.cat([gradient.flatten() for gradient in gradients])
        dist.all_reduce(flat, op=dist.ReduceOp.AVG)
        for gradient, value in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
            gradient.copy_(value.view_as(gradient))

    @torch.no_grad()
    def _move_average(self) -> None:
        since = self.progress.step - self.progress.restart
        decay = min(self.config.ema, (1 + since) / (10 + since))
        torch._foreach_lerp_(list(self.average.parameters()), list(self.model.parameters()), 1 - decay)

    def save(self, out: Path) -> None:
        """Writes the checkpoint and the averaged weights."""
        save_parts(out / STATE, weights_of(self.model), about(self.config, self.progress))
        save_parts(out / AVERAGE, weights_of(self.average), about(self.config, self.progress))

    @abstractmethod
    def draw(self, stage: int, seed: int) -> Batch:
        """A batch of a stage from what is trained on, which depends on the seed alone."""

    @abstractmethod
    def loss_of(self, model: Any, batch: Batch) -> torch.Tensor:
        """Losses [B] of a batch."""

    @abstractmethod
    def losses(self) -> dict[str, float]:
        """Losses of the averaged weights on samples of each split."""

    @abstractmethod
    def samples(self, steps: int = 24, guidance: float = 3.0) -> PIL.Image.Image:
        """A sheet of samples of the averaged weights."""


def attend_by(device: torch.device, cudnn: bool = False) -> None:
    """Lets flash attention, or cuDNN's, compute dense attention on a GPU from here on."""
    if device.type == "cuda":
        torch.backends.cuda.enable_cudnn_sdp(cudnn)
        torch.backends.cuda.enable_flash_sdp(not cudnn)


def autocast(device: torch.device) -> AbstractContextManager[Any]:
    """bfloat16 on a GPU, float32 on a CPU."""
    return torch.autocast("cuda", torch.bfloat16) if device.type == "cuda" else nullcontext()


def run(
    training: FlowTraining,
    out: Path,
    seconds: float,
    started: float,
    report: Callable[[str], None] = print,
    sample_steps: int = 24,
) -> list[dict[str, Any]]:
    """Trains until the budget or this command's seconds are used; writes everything; returns the log.

    Args:
        training: The run.
        out: Folder for all output.
        seconds: Of this command, counted from `started`.
        started: Of `time.monotonic`.
        report: Gets a line for each entry of the log.
        sample_steps: Denoising steps of the sample sheet.
    """
    config, progress, log = training.config, training.progress, []
    started, saved = _agreed(started, training), _agreed(time.monotonic(), training)
    before = saved
    losses: list[torch.Tensor] = []
    while True:
        now = _agreed(time.monotonic(), training)
        progress.seconds += now - before
        before = now
        if progress.done(config) >= 1 or now - started >= seconds:
            break
        losses.append(training.step())
        if len(losses) == LOG_EVERY:
            log.append(_entry(training, losses))
            losses = []
            if training.rank == 0:
                report(json.dumps(log[-1]))
        if training.rank == 0 and now - saved > SAVE_EVERY:
            training.save(out)
            saved = now
    if losses:
        log.append(_entry(training, losses))
    if training.rank == 0:
        training.save(out)
        log.append({"event": "end"} | asdict(progress) | {"losses": training.losses(), "parts": training.parts})
        report(json.dumps(log[-1]))
        write_json(out / "log.json", {"config": asdict(config), "log": log})
        with written_whole(out / "samples.png") as path:
            training.samples(sample_steps).save(path)
    return log


def _agreed(now: float, training: FlowTraining) -> float:
    """The first device's time on every device, so that all end a stage and the run in the same step."""
    if training.ranks == 1:
        return now
    value = torch.tensor([now], dtype=torch.float64)
    dist.broadcast(value, 0)
    return value.item()


def _entry(training: FlowTraining, losses: list[torch.Tensor]) -> dict[str, Any]:
    config, progress = training.config, training.progress
    done, loss = progress.done(config), torch.stack(losses).mean().item()
    if not math.isfinite(loss):
        raise ValueError(f"the loss is {loss} after {progress.step} steps: go on from a checkpoint with a smaller --lr")
    return {
        "step": progress.step,
        "seconds": round(progress.seconds, 1),
        "pictures": progress.pictures,
        **config.size(config.stage(done)),
        "loss": round(loss, 5),
        "lr": config.rate(done, progress.step - progress.restart),
        "dropped": training.guard.dropped.item(),
    }


def add_options(parser: argparse.ArgumentParser, config: type[FlowConfig], data: Path, out: Path) -> None:
    """One option for each field of the settings, and where and how to run."""
    for field in fields(config):
        default: Any = field.default
        several: dict[str, Any] = {"nargs": "+"} if isinstance(default, tuple) else {}
        kind = cli.like(field.name, default[0] if several else default)
        parser.add_argument(f"--{field.name.replace('_', '-')}", type=kind, default=default, **several)
    parser.add_argument("--data", type=Path, default=data, help="folder of the pack")
    parser.add_argument("--out", type=Path, default=out)
    parser.add_argument(
        "--resume", type=Path, help="folder with a checkpoint to go on from, or a pipeline to start from"
    )
    parser.add_argument("--seconds", type=cli.number, default=math.inf, help="of this command, from its start")
    parser.add_argument("--device", type=cli.device, default="cpu")
    parser.add_argument("--threads", type=cli.count, default=2)
    parser.add_argument("--export-only", action="store_true", help="make a pipeline of the averaged weights in --out")


def settings(options: argparse.Namespace, config: type[Any]) -> Any:
    """The settings of the command line.

    Raises:
        ValueError: If they do not go together.
    """
    values: dict[str, Any] = {field.name: getattr(options, field.name) for field in fields(config)}
    return config(**{name: tuple(value) if isinstance(value, list) else value for name, value in values.items()})


def train(
    options: argparse.Namespace, started: float, make: Callable[[torch.device], FlowTraining]
) -> list[dict[str, Any]]:
    """Sets the device up and trains; returns the log.

    Args:
        options: Of the command line.
        started: Of `time.monotonic`.
        make: Reads the data and makes the run on a device.

    Raises:
        ValueError: If options, data and checkpoint do not go together.
    """
    torch.set_num_threads(options.threads)
    device = torch.device(chosen_device(options.device))
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")
    if "RANK" in os.environ:
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    try:
        with cli.only_run(options.out):
            return run(make(device), options.out, options.seconds, started, lambda line: print(line, flush=True))
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def averaged(out: Path, config: type[FlowConfig]) -> Any:
    """The model with the averaged weights of a run."""
    weights, saved = load_parts(out / AVERAGE)
    model = config(**{name: saved["config"][name] for name in config.shape()}).model()
    set_weights(model, weights)
    return model


def sheet_of(rows: Sequence[torch.Tensor]) -> PIL.Image.Image:
    """Rows of pictures [3, H, W], values 0 to 1, below each other."""
    sheet = torch.cat([*rows], dim=-2)
    return PIL.Image.fromarray((sheet * 255).round().byte().permute(1, 2, 0).numpy())
