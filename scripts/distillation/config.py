"""Settings of a distillation. All that can be wrong without a model is found here, before one is loaded."""

from __future__ import annotations

import argparse
import importlib.util
import json
import types
from dataclasses import Field, asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, get_args, get_type_hints

from visattn.patterns import Dense
from visattn.pipelines.embedded import EMBEDDED
from visattn.schedule import Schedule

PROJECTIONS = ("q", "k", "v", "out")


def option(default: Any, text: str, choices: tuple[str, ...] = ()) -> Any:
    """A field with the help that the command line shows."""
    return field(default=default, metadata={"help": text, "choices": choices})


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """Settings of one run; `python scripts/distill.py --help` says what each means.

    Raises:
        ValueError: If a value is out of range, or two of them contradict each other.
    """

    pattern: str = field(metadata={"help": 'attention of the student, like "clear(radius=3)"'})
    samples: Path = field(metadata={"help": "folder that scripts/cache_samples.py wrote"})
    out: Path = field(metadata={"help": "folder for checkpoint, log, pictures and student.safetensors"})
    model: str = option("digits", "teacher: an embedded model, a folder in diffusers' format, or a hub id")
    layers: str | None = option(None, "layers that get the pattern, like 0-3,7; all")
    dense_layers: int = option(0, "so many of the first selected layers stay dense")
    backend: str = option("auto", "backend of the pattern")
    denoising: float = option(1.0, "weight of the denoising loss against the samples")
    output: float = option(0.5, "weight of the distance to the teacher's output")
    attention: float = option(0.5, "weight of the distance of attention outputs to the teacher's")
    maps: float = option(0.0, "weight of the cross-entropy to the teacher's attention rows (linear forms)")
    attention_at: str = option("before", "attention output before or after its output projection", ("before", "after"))
    attention_layers: str | None = option(None, "layers whose attention is matched, like 0,4,8; all patched ones")
    attention_scale: str = option(
        "relative", "divide attention distances by the teacher's mean square, or not (CLEAR)", ("relative", "plain")
    )
    map_rows: int = option(64, "queries per image whose attention rows are matched")
    train: str = option("q,k,v,out", "projections that are trained, of q,k,v,out; none: only the pattern's own")
    lora: int = option(0, "rank of LoRA on these projections; 0 trains them whole")
    lora_alpha: float = option(0.0, "LoRA is scaled by alpha / rank; 0: alpha = rank")
    steps: int = option(1000, "optimizer steps")
    batch: int = option(16, "samples of an optimizer step, over all processes")
    micro_batch: int = option(0, "samples of one forward in one process; 0: all of its share at once")
    optimizer: str = option("adamw", "adamw, or prodigy (package prodigyopt)", ("adamw", "prodigy"))
    lr: float = option(0.0, "learning rate; 0: 5e-4 for adamw, 1 for prodigy")
    own_lr: float = option(0.0, "learning rate of the pattern's own parameters; 0: the same")
    weight_decay: float = option(0.0, "weight decay")
    schedule: str = option("cosine", "learning rate after the warm-up", ("cosine", "constant"))
    warmup: int = option(50, "steps of linear warm-up")
    clip: float = option(1.0, "largest norm of the gradient; 0: no clipping")
    ema: float = option(0.998, "decay of the averaged weights that are exported; 0: no average")
    times: str = option(
        "sampler",
        "noise levels: as the sampler that made the samples visits them, uniform, or logit-normal",
        ("sampler", "uniform", "logit-normal"),
    )
    precision: str = option("no", "mixed precision", ("no", "bf16"))
    checkpointing: bool = option(False, "gradient checkpointing: less memory, more time")
    cpu: bool = option(False, "run on the CPU though there is a GPU")
    threads: int = option(0, "threads of torch on the CPU; 0: its own choice")
    seed: int = option(0, "seed of everything random")
    save_every: int = option(200, "steps between checkpoints")
    log_every: int = option(10, "steps between lines of log.jsonl")
    sample_every: int = option(0, "steps between sample pictures; 0: none")
    tensorboard: bool = option(False, "also log for TensorBoard, into OUT/tensorboard")
    resume: bool = option(True, "go on from the checkpoint in OUT")

    def __post_init__(self) -> None:
        self._check_numbers()
        for entry in fields(self):
            choices = entry.metadata.get("choices")
            if choices and getattr(self, entry.name) not in choices:
                raise ValueError(f"{flag(entry)} {getattr(self, entry.name)!r} does not exist: {' or '.join(choices)}")
        self._check_losses()
        self._check_data()
        for wanted, package, why in (
            (self.optimizer == "prodigy", "prodigyopt", "--optimizer prodigy"),
            (self.tensorboard, "tensorboard", "--tensorboard"),
            (self.lora > 0, "peft", "--lora"),
        ):
            if wanted and importlib.util.find_spec(package) is None:
                raise ValueError(f"{why} needs the package {package}: pip install {package}")

    def _check_numbers(self) -> None:
        for name in ("steps", "batch", "save_every", "log_every", "map_rows"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name.replace('_', '-')} {getattr(self, name)} must be at least 1")
        at_least_zero = (
            "denoising",
            "output",
            "attention",
            "maps",
            "lora",
            "lora_alpha",
            "micro_batch",
            "lr",
            "own_lr",
        )
        for name in (*at_least_zero, "weight_decay", "warmup", "clip", "threads", "sample_every", "dense_layers"):
            if getattr(self, name) < 0:
                raise ValueError(f"--{name.replace('_', '-')} {getattr(self, name)} must not be below 0")
        if not 0 <= self.ema < 1:
            raise ValueError(f"--ema {self.ema} must be from 0 to below 1")

    def _check_losses(self) -> None:
        if not self.denoising + self.output + self.attention + self.maps:
            raise ValueError("every loss has weight 0: give --denoising, --output, --attention or --maps a weight")
        patterns = Schedule.of(self.pattern, self.layers, self.dense_layers).patterns
        if all(isinstance(pattern, Dense) for pattern in patterns):
            raise ValueError(f"--pattern {self.pattern!r} is what the teacher has: name a sparse or linear one")
        wrong = [part for part in self.projections if part not in PROJECTIONS]
        if wrong:
            raise ValueError(f"--train {self.train!r}: {wrong[0]!r} is none of {', '.join(PROJECTIONS)} (or none)")
        if self.lora and not self.projections:
            raise ValueError(f"--lora {self.lora} needs projections to be put on, but --train is none")

    def _check_data(self) -> None:
        folder = Path(self.model)
        looks_local = self.model not in EMBEDDED and (self.model.count("/") != 1 or self.model.startswith("."))
        if looks_local and not (folder / "model_index.json").is_file():
            names = ", ".join(EMBEDDED)
            raise ValueError(f"--model {self.model!r} is neither an embedded model ({names}) nor a pipeline folder")
        if not (self.samples / "index.json").is_file():
            raise ValueError(
                f"--samples {self.samples} has no index.json: write it with scripts/cache_samples.py --model "
                f"{self.model} --out {self.samples}"
            )
        model = json.loads((self.samples / "index.json").read_text())["model"]
        if model != self.model:
            raise ValueError(f"--samples {self.samples} were made by {model!r}, the teacher is --model {self.model!r}")
        if self.out.exists() and not self.out.is_dir():
            raise ValueError(f"--out {self.out} is a file: name a folder")

    @property
    def projections(self) -> tuple[str, ...]:
        """Projections that are trained."""
        return () if self.train == "none" else tuple(part.strip() for part in self.train.split(","))

    @property
    def rate(self) -> float:
        """Learning rate at its peak."""
        return self.lr or {"adamw": 5e-4, "prodigy": 1.0}[self.optimizer]

    def to_json(self) -> dict[str, Any]:
        """Settings as plain values."""
        return {key: str(value) if isinstance(value, Path) else value for key, value in asdict(self).items()}


# Settings that a resumed run may change: no weight depends on them.
CHANGEABLE = {"out", "save_every", "log_every", "sample_every", "tensorboard", "threads", "resume"}


def flag(entry: Field[Any]) -> str:
    """The option of a field."""
    return f"--{entry.name.replace('_', '-')}"


def parse(kind: type[Any], description: str | None, arguments: list[str] | None = None) -> Any:
    """A dataclass of settings from the command line: one option for each field.

    Raises:
        ValueError: If the settings are wrong.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    hints = get_type_hints(kind)
    for entry in fields(kind):
        required = not isinstance(entry.default, (str, int, float, Path, types.NoneType))
        settings: dict[str, Any] = {"help": entry.metadata["help"], "required": required}
        if not required:
            settings["default"] = entry.default
            if entry.default not in (None, "", False):
                settings["help"] += " (%(default)s)"
        if hints[entry.name] is bool:
            settings["action"] = argparse.BooleanOptionalAction
        else:
            settings["type"] = next(iter(get_args(hints[entry.name])), hints[entry.name])
        parser.add_argument(flag(entry), **settings)
    return kind(**vars(parser.parse_args(arguments)))
