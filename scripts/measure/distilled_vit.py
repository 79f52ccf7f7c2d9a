"""Distills the ViT that reads digits into sparse and linear students, and counts what each reads before and after.

    python -m scripts.train.digits_vit --out out/digits-vit
    python -m scripts.measure.distilled_vit --checkpoint out/digits-vit/model.safetensors --out runs/distill-vit
    python -m scripts.measure.distilled_vit --checkpoint out/digits-vit/model.safetensors --out runs/distill-heads \
        --patterns "na(window=-1)" --heads "query_heads=0.5; query_heads=0.5, by=norm; kv_heads=0.5"

Students learn from pictures of 1200 digits without their labels (scripts.distill.classifier); 597 others are read. Stop
it at any time: the same command goes on. `agreement` is the share of digits that student and teacher read alike.
"""

from __future__ import annotations

import json
import time
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from scripts import cli
from scripts.distill.loop import RESULT, prepared, train
from scripts.distill.settings import option, parse
from scripts.distill.vit import VitTraining
from scripts.distill.vit_config import DIGITS, VitConfig
from scripts.train.digits_data import upscale
from scripts.train.digits_vit_model import SIZE, load_vit, split
from visattn import apply, convert_heads
from visattn.files import write_json
from visattn.trained import Trained, load_own, load_trained, trained_weights

PATTERNS = "na(window=3x3); na(window=5x5); clear(radius=4); linear(feature=hedgehog); mala; agent(agents=4x4)"


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What to run."""

    checkpoint: Path = field(metadata={"help": "the teacher, from scripts/train/digits_vit.py"})
    out: Path = field(metadata={"help": "folder for the students"})
    result: Path | None = option(None, "file for the figures as JSON; OUT/figures.json")
    patterns: str = option(PATTERNS, "attention of the students, with semicolons between them")
    steps: int = option(300, "optimizer steps of each")
    batch: int = option(32, "digits of a step")
    lr: float = option(5e-4, "learning rate")
    heads: str = option(
        "", "heads of the students, with semicolons between them: query_heads, kv_heads, by, allocation; '': as many"
    )
    cpu: bool = option(False, "stay on the CPU")
    threads: int = option(0, "threads of torch on the CPU; 0: its own choice")

    def students(self) -> list[VitConfig]:
        """Settings of each student's training: every pattern with all heads that are asked for."""
        heads = [heads_of(text) for text in self.heads.split(";")]
        return [self.student(pattern.strip(), own) for pattern in self.patterns.split(";") for own in heads]

    def student(self, pattern: str, heads: dict[str, Any]) -> VitConfig:
        """Settings of one of them; attention rows are matched where they are positive everywhere."""
        words = [pattern, *(f"{name}={value}" for name, value in heads.items())]
        name = "".join(c if c.isalnum() else "-" for c in " ".join(words)).strip("-")
        return VitConfig(
            model=DIGITS,
            data=DIGITS,
            checkpoint=self.checkpoint,
            pattern=pattern,
            out=self.out / name,
            steps=self.steps,
            batch=self.batch,
            lr=self.lr,
            ema=0.98,
            augment=1.5,
            maps=0.1 if pattern.startswith("linear") and not heads else 0.0,
            **heads,
            cpu=self.cpu,
            threads=self.threads,
        )


def heads_of(text: str) -> dict[str, Any]:
    """Settings of `VitConfig` from text like "query_heads=0.5, by=norm".

    Raises:
        ValueError: If it is written otherwise.
    """
    names = {"query_heads": "query_heads", "kv_heads": "kv_heads", "by": "heads_by", "allocation": "allocation"}
    found: dict[str, Any] = {}
    for part in filter(None, map(str.strip, text.split(","))):
        name, _, value = (word.strip() for word in part.partition("="))
        try:
            if not value:
                raise ValueError
            found[names[name]] = float(value) if name.endswith("heads") else value
        except (KeyError, ValueError):
            known = "query_heads=, kv_heads=, by= or allocation="
            raise ValueError(f"--heads {text!r}: {part!r} must be {known} and a value, with commas between") from None
    return found


@torch.no_grad()
def read(model: nn.Module, batch: int = 199) -> torch.Tensor:
    """What a model reads in the held-out digits [597]."""
    device = next(model.parameters()).device
    images, _ = split(seen=False)
    return torch.cat([model(upscale(some, SIZE).to(device)).argmax(1).cpu() for some in images.split(batch)])


def read_swapped(model: nn.Module, config: VitConfig, trained: Trained | None) -> torch.Tensor:
    """The same with other attention and heads, and with trained weights if there are any."""
    if trained is None:
        heads = nullcontext() if config.heads is None else convert_heads(model, **config.heads)
        with heads, apply(model, config.pattern, strict=True):
            return read(model)
    with trained_weights(model, trained), apply(model, config.pattern, strict=True) as handle:
        load_own(handle, trained)
        return read(model)


def measure(model: nn.Module, config: VitConfig) -> dict[str, Any]:
    """Trains a student and reads with it; the seconds are those since the last interruption."""
    truth, teacher, start = split(seen=False)[1], read(model), time.monotonic()
    with prepared(config):
        train(VitTraining(config))
    row: dict[str, Any] = {
        "pattern": config.pattern,
        "heads": config.heads,
        "seconds": round(time.monotonic() - start, 1),
    }
    for name, trained in (("before", None), ("after", load_trained(config.out / RESULT))):
        found = read_swapped(model, config, trained)
        shares = {"accuracy": found == truth, "agreement": found == teacher}
        row[name] = {key: value.float().mean().item() for key, value in shares.items()}
    return row


def run(settings: Settings) -> dict[str, Any]:
    """Every student; returns the figures."""
    students = settings.students()
    device = torch.device("cuda" if torch.cuda.is_available() and not settings.cpu else "cpu")
    model = load_vit(settings.checkpoint).to(device)
    truth = split(seen=False)[1]
    figures: dict[str, Any] = {
        "settings": {name: value for name, value in asdict(settings).items() if not isinstance(value, Path | None)},
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
        "held_out": len(truth),
        "teacher": (read(model) == truth).float().mean().item(),
        "rows": [],
    }
    result = settings.result or settings.out / "figures.json"
    for student in students:
        figures["rows"].append(measure(model, student))
        print(json.dumps(figures["rows"][-1]), flush=True)
        write_json(result, figures)
    return figures


def main(arguments: list[str] | None = None) -> None:
    """Entry point."""
    with cli.told("measure_distill_vit"):
        settings = parse(Settings, __doc__, arguments)
        with cli.only_run(settings.out), cli.only_writer(settings.result):
            run(settings)


if __name__ == "__main__":
    main()
