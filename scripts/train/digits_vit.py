"""Trains the small ViT of `digits_vit.py` on scikit-learn's digits: some six minutes on two idle CPU cores.

    python -m scripts.train.digits_vit --out out/digits-vit

Stop it at any time; the same command goes on from the last checkpoint. On cores that others use too, `--threads 1` is
faster. `--out` gets `model.safetensors` and `log.jsonl`. scripts/measure/digits_vit.py then swaps its attention.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path

import torch

from scripts import cli
from scripts.train.digits_vit_model import (
    Batches,
    Config,
    build_optimizer,
    build_vit,
    held_out_accuracy,
    learning_rate,
    load_state,
    save_state,
    train_step,
)
from visattn.environment import chosen_device

# What training leaves in its folder.
FILE = "model.safetensors"
LOG_EVERY = 20
CHECKPOINT_SECONDS = 30.0


class Training:
    """One run: the model, the optimizer and the steps that are done.

    Args:
        config: Settings.
        out: Folder of the checkpoint, from which a resumed run goes on, and of the log.
        resume: Whether to go on from a checkpoint in `out`.
        device: Where it trains.
    """

    def __init__(self, config: Config, out: Path, resume: bool = True, device: str = "cpu") -> None:
        torch.manual_seed(config.seed)
        self.config, self.out, self.done = config, out, 0
        self.model, self.batches = build_vit().to(device), Batches(config)
        self.optimizer = build_optimizer(self.model)
        self.checkpoint = out / FILE
        out.mkdir(parents=True, exist_ok=True)
        if resume and self.checkpoint.is_file():
            self.done = load_state(self.checkpoint, config, self.model, self.optimizer)

    def save(self) -> None:
        """Writes the checkpoint."""
        save_state(self.checkpoint, self.config, self.done, self.model, self.optimizer)

    def step(self) -> float:
        """Runs one step and returns its loss."""
        images, labels = self.batches.draw(self.done, self.config.size(self.done))
        self.model.train()
        lr = learning_rate(self.config.lr, self.done, self.config.steps)
        device = next(self.model.parameters()).device
        loss = train_step(self.model, self.optimizer, images.to(device), labels.to(device), lr)
        self.done += 1
        return loss


def run(training: Training, report: Callable[[str], None] = print) -> float:
    """Trains to the last step; returns the accuracy on the held-out digits."""
    saved, config = time.monotonic(), training.config
    with (training.out / "log.jsonl").open("a", buffering=1) as log:
        while training.done < config.steps:
            start = time.monotonic()
            loss = training.step()
            if training.done % LOG_EVERY == 0:
                figures = {"step": training.done, "size": config.size(training.done - 1), "loss": round(loss, 4)}
                line = json.dumps(figures | {"step_s": round(time.monotonic() - start, 3)})
                log.write(line + "\n")
                report(line)
            if time.monotonic() - saved > CHECKPOINT_SECONDS:
                training.save()
                saved = time.monotonic()
        training.save()
        accuracy = held_out_accuracy(training.model)
        log.write(json.dumps({"held_out_accuracy": accuracy}) + "\n")
    return accuracy


def make_if_missing(model: Path) -> None:
    """Trains the model of a file that is not there, which no other run may do meanwhile.

    Raises:
        ValueError: If another run does, or it has a name that the training does not give.
    """
    if model.is_file():
        return
    if model.name != FILE:
        raise ValueError(f"{model} does not exist, and training makes {FILE}: name one that is there, or {FILE}")
    with cli.only_run(model.parent):
        run(Training(Config(), model.parent), lambda line: print(line, flush=True))


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """Command line: one option for each field of `Config`, and where and how to run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for field in fields(Config):
        parser.add_argument(
            f"--{field.name.replace('_', '-')}", type=cli.like(field.name, field.default), default=field.default
        )
    parser.add_argument("--out", type=Path, default=Path("out/digits-vit"))
    parser.add_argument("--device", type=cli.device, default="cpu", help="cpu, or cuda")
    parser.add_argument("--threads", type=cli.count, default=2)
    parser.add_argument("--resume", action=argparse.BooleanOptionalAction, default=True)
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    """Entry point."""
    options = parse_arguments(arguments)
    torch.set_num_threads(options.threads)
    with cli.told("train_digits_vit"):
        chosen_device(options.device)
        config = Config(**{field.name: getattr(options, field.name) for field in fields(Config)})
        with cli.only_run(options.out):
            training = Training(config, options.out, options.resume, options.device)
            accuracy = run(training, lambda line: print(line, flush=True))
    print(f"{accuracy:.1%} of the held-out digits are read right")


if __name__ == "__main__":
    main()
