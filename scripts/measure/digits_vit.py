"""Measures what a pattern costs the small ViT of `digits_vit.py`, before and after one short fine-tuning.

    python -m scripts.measure.digits_vit --model out/digits-vit/model.safetensors --out docs/results/digits-vit.json

Trains the model first if the checkpoint is not there. A row is written as soon as it is measured; the same command
goes on with the rows that are missing.
"""

from __future__ import annotations

import argparse
import copy
import hashlib
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from timm.models import VisionTransformer

from scripts import cli
from scripts.continued import earlier
from scripts.train.digits_vit import make_if_missing
from scripts.train.digits_vit_model import (
    PATCH,
    SIZE,
    Batches,
    Config,
    build_optimizer,
    held_out_accuracy,
    learning_rate,
    load_vit,
    split,
    train_step,
)
from visattn import apply
from visattn.environment import cpu_name
from visattn.files import write_json

PATTERNS = (
    "dense",
    "na(window=3x3)",
    "na(window=5x5)",
    "na(window=7x7)",
    "na(window=9x9)",
    "na(window=15x15)",
    "clear(radius=4)",
    "agent(agents=4x4)",
)


def pattern_of(model: VisionTransformer, pattern: str) -> Any:
    """Context in which the model runs with the pattern; "dense" is its own attention."""
    return nullcontext() if pattern == "dense" else apply(model, pattern, strict=True)


def fine_tune(model: VisionTransformer, config: Config, steps: int) -> None:
    """Trains a model, as it is swapped now, for some steps on batches that its own training did not draw."""
    batches, optimizer = Batches(config), build_optimizer(model)
    model.train()
    for step in range(steps):
        images, labels = batches.draw(config.steps + step, SIZE)
        train_step(model, optimizer, images, labels, learning_rate(config.lr, step, steps, warmup=5))
    model.eval()


def measure(trained: VisionTransformer, pattern: str, config: Config, steps: int) -> dict[str, Any]:
    """Accuracy on the held-out digits with a pattern, as trained dense and after fine-tuning with the pattern."""
    model = copy.deepcopy(trained)
    with pattern_of(model, pattern) as handle:
        before = held_out_accuracy(model)
        density = 1.0 if handle is None else handle.report().density
        fine_tune(model, config, steps)
        after = held_out_accuracy(model)
    return {"pattern": pattern, "density": density, "as_trained": before, "fine_tuned": after}


def fingerprint(model: VisionTransformer) -> str:
    """Tells weights apart: the first digits of their SHA-256."""
    digest = hashlib.sha256()
    for value in model.state_dict().values():
        digest.update(value.numpy().tobytes())
    return digest.hexdigest()[:16]


def settings_of(model: VisionTransformer, config: Config, steps: int) -> dict[str, Any]:
    """What a row depends on besides its pattern."""
    return {
        "tokens": (SIZE // PATCH) ** 2,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "held_out": len(split(seen=False)[1]),
        "seen": len(split(seen=True)[1]),
        "weights": fingerprint(model),
        "fine_tuning": asdict(config) | {"steps": steps},
        "torch": torch.__version__,
    }


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=Path("out/digits-vit/model.safetensors"))
    parser.add_argument("--patterns", nargs="+", default=PATTERNS)
    parser.add_argument(
        "--steps", type=cli.count, default=38, help="of fine-tuning; 38 draw as many digits as there are"
    )
    parser.add_argument("--lr", type=cli.number, default=3e-4, help="highest learning rate of fine-tuning")
    parser.add_argument("--seed", type=cli.seed, default=0)
    parser.add_argument("--threads", type=cli.count, default=2)
    parser.add_argument("--out", type=cli.file_to_write, help="file for the rows as JSON")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    """Entry point."""
    options = parse_arguments(arguments)
    torch.set_num_threads(options.threads)
    with cli.told("measure_digits_vit"), cli.only_writer(options.out):
        config = Config(lr=options.lr, seed=options.seed)
        make_if_missing(options.model)
        model = load_vit(options.model)
        report: dict[str, Any] = {"settings": settings_of(model, config, options.steps), "device": cpu_name()}
        known = earlier(options.out, report)
        done = {row["pattern"]: row for row in known["rows"]} if known else {}
        for pattern in options.patterns:
            if pattern not in done:
                done[pattern] = measure(model, pattern, config, options.steps)
            row = done[pattern]
            print(f"{pattern:<20} {row['as_trained']:7.2%} {row['fine_tuned']:7.2%}", flush=True)
            if options.out:
                rows = [done[each] for each in dict.fromkeys([*options.patterns, *done]) if each in done]
                write_json(options.out, report | {"rows": rows}, indent=2)


if __name__ == "__main__":
    main()
