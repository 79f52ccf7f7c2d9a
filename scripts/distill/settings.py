"""Settings that every distillation has, and how a command line becomes a dataclass of settings."""

from __future__ import annotations

import argparse
import importlib.util
import math
import types
from dataclasses import Field, asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, get_args, get_type_hints

from scripts.cli import check_seed
from scripts.distill.ranges import at, stepped, varies
from visattn.patterns import Agent, Centroids, Dense, Linear
from visattn.schedule import Schedule
from visattn.trained import Trained, load_trained


def option(default: Any, text: str, choices: tuple[str, ...] = ()) -> Any:
    """A field with the help that the command line shows."""
    return field(default=default, metadata={"help": text, "choices": choices})


@dataclass(frozen=True, slots=True, kw_only=True)
class RunConfig:
    """Settings of one run; all that can be wrong without a model is found here, before one is loaded.

    Raises:
        ValueError: If a value is out of range, or two of them contradict each other.
    """

    pattern: str = field(metadata={"help": 'attention of the student, like "clear(radius=3)"'})
    out: Path = field(metadata={"help": "folder for checkpoint, log, pictures and student.safetensors"})
    weights: Path | None = option(None, "student.safetensors of an earlier run that this one starts from")
    layers: str | None = option(None, "layers that get the pattern, like 0-3,7; all")
    dense_layers: int = option(0, "so many of the first selected layers stay dense")
    anneal: float = option(0.5, "share of the run after which numbers of the pattern like 0.5..0.05 are at their end")
    backend: str = option("auto", "backend of the pattern")
    query_heads: float = option(0.0, "query heads of the student, or a share of the teacher's below 1; 0: as many")
    kv_heads: float = option(0.0, "its key heads, which query heads share, alike; 0: one for each query head")
    heads_by: str = option("mean", "merge neighbouring heads, or keep the ones that weigh the most", ("mean", "norm"))
    allocation: str = option(
        "even", "who gives key heads to query heads: even, or norms of the keys at each forward", ("even", "norms")
    )
    lora: int = option(0, "rank of LoRA on what --train names; 0 trains it whole")
    lora_alpha: float = option(0.0, "LoRA is scaled by alpha / rank; 0: alpha = rank")
    map_rows: int = option(64, "queries per image whose attention rows are matched by --maps")
    steps: int = option(1000, "optimizer steps")
    seconds: float = option(
        0.0,
        "end after so many seconds of steps, learning rate falling by the clock; 0: never",
    )
    batch: int = option(16, "samples of an optimizer step, over all processes")
    micro_batch: int = option(0, "samples of one forward in one process; 0: all of its share at once")
    optimizer: str = option(
        "adamw",
        "adamw, prodigy (package prodigyopt), or muon: steps of matrices inside of blocks are made orthogonal, all "
        "others are adamw's",
        ("adamw", "prodigy", "muon"),
    )
    lr: float = option(0.0, "learning rate; 0: 5e-4 for adamw, 1 for prodigy, 2e-3 for muon")
    own_lr: float = option(0.0, "learning rate of the pattern's own parameters; 0: the same")
    weight_decay: float = option(0.0, "weight decay")
    schedule: str = option("cosine", "learning rate after the warm-up", ("cosine", "constant"))
    warmup: int = option(50, "steps of linear warm-up")
    clip: float = option(1.0, "largest norm of the gradient; 0: no clipping")
    ema: float = option(0.998, "decay of the averaged weights that are exported; 0: no average")
    precision: str = option("no", "mixed precision", ("no", "bf16"))
    graphs: bool = option(
        False, "record a step as a CUDA graph and replay it: several times as fast for small models on one GPU"
    )
    fsdp: bool = option(False, "processes share weights and optimizer states (FSDP2) instead of having all (DDP)")
    cpu: bool = option(False, "run on the CPU though there is a GPU")
    threads: int = option(0, "threads of torch on the CPU; 0: its own choice")
    seed: int = option(0, "seed of everything random")
    save_every: int = option(200, "steps between checkpoints")
    log_every: int = option(10, "steps between lines of log.jsonl")
    tensorboard: bool = option(False, "also log for TensorBoard, into OUT/tensorboard")
    resume: bool = option(True, "go on from the checkpoint in OUT")

    def __post_init__(self) -> None:
        self._check_numbers()
        for entry in fields(self):
            choices = entry.metadata.get("choices")
            if choices and getattr(self, entry.name) not in choices:
                known = " or ".join(choice for choice in choices if choice)
                raise ValueError(f"{flag(entry)} {getattr(self, entry.name)!r} does not exist: {known}")
        self._check_pattern()
        self._check_heads()
        self._check_sharing()
        if self.weights is not None:
            self._check_start(load_trained(self.weights))
        if self.out.exists() and not self.out.is_dir():
            raise ValueError(f"--out {self.out} is a file: name a folder")
        for wanted, package, why in (
            (self.optimizer == "prodigy", "prodigyopt", "--optimizer prodigy"),
            (self.tensorboard, "tensorboard", "--tensorboard"),
            (self.lora > 0, "peft", "--lora"),
        ):
            if wanted and importlib.util.find_spec(package) is None:
                raise ValueError(f"{why} needs the package {package}: pip install {package}")

    def _check_numbers(self) -> None:
        positive = ("steps", "batch", "save_every", "log_every", "map_rows")
        for entry in fields(self):
            value = getattr(self, entry.name)
            if isinstance(value, bool) or not isinstance(value, int | float) or entry.name == "seed":
                continue
            if not math.isfinite(value):
                raise ValueError(f"{flag(entry)} {value} must be a finite number")
            if value < (least := int(entry.name in positive)):
                raise ValueError(f"{flag(entry)} {value} must be at least {least}")
        check_seed(self.seed)
        if self.ema >= 1:
            raise ValueError(f"--ema {self.ema} must be from 0 to below 1")

    def _check_sharing(self) -> None:
        if self.graphs and self.cpu:
            raise ValueError("--graphs are CUDA graphs, not with --cpu: leave one out")
        if self.graphs and getattr(self, "checkpointing", False):
            raise ValueError("--graphs with --checkpointing, which asks the device for random states: leave one out")
        if self.fsdp and self.optimizer != "adamw":
            raise ValueError(f"--fsdp with --optimizer {self.optimizer}, which needs whole weights: pass adamw")
        if self.fsdp and varies(self.pattern):
            raise ValueError(
                f"--fsdp with --pattern {self.pattern!r}, which is applied anew as it changes: leave one out"
            )
        if self.fsdp and getattr(self, "sample_every", 0):
            raise ValueError(
                "--fsdp with --sample-every: one process draws, and has a part of the weights: leave it out"
            )

    @property
    def heads(self) -> dict[str, Any] | None:
        """How the student's heads are converted (arguments of `visattn.convert_heads`), None if they are not."""
        if not self.query_heads and not self.kv_heads:
            return None
        found = {name: getattr(self, name) or None for name in ("query_heads", "kv_heads")}
        found = {n: int(v) if v is not None and v >= 1 and v == int(v) else v for n, v in found.items()}
        return found | {"by": self.heads_by, "allocation": self.allocation, "layers": self.layers}

    def _check_heads(self) -> None:
        if self.heads is None:
            return
        if getattr(self, "maps", 0):
            raise ValueError("--maps compares rows head by head, and the student has other heads: leave it out")
        if self.lora and self.kv_heads:
            raise ValueError(f"--lora {self.lora} goes on layers of one head after the other, not with --kv-heads")

    def _check_pattern(self) -> None:
        if not any(getattr(self, name) for name in self.losses()):
            names = ", ".join(f"--{name}" for name in self.losses())
            raise ValueError(f"every loss has weight 0: give one of {names} a weight")
        first, patterns = (Schedule.of(text, self.layers, self.dense_layers).patterns for text in self.pattern_ends)
        if [type(each) for each in first] != [type(each) for each in patterns]:
            raise ValueError(f"--pattern {self.pattern!r}: the numbers may change, not {first[0]} to {patterns[0]}")
        if varies(self.pattern) and not 0 < self.anneal <= 1:
            raise ValueError(f"--anneal {self.anneal} must be a share of the run, above 0 and at most 1")
        if any(isinstance(pattern, Centroids) for pattern in patterns):
            raise ValueError(
                f"--pattern {self.pattern!r}: centroids have no gradient and would stay where they are: train them in "
                "a loop of your own with visattn.patterns.centroids.followed, or take kmeans(...), which finds its own"
            )
        if all(isinstance(pattern, Dense) for pattern in patterns):
            raise ValueError(
                f"--pattern {self.pattern!r} is what the teacher has: name a sparse or linear one, or "
                "na(window=-1), which is dense, with --query-heads"
            )
        rowless = [str(p) for p in patterns if not isinstance(p, Dense | Linear | Agent) or getattr(p, "causal", False)]
        if getattr(self, "maps", 0) and rowless:
            raise ValueError(f"--maps needs weights that are positive everywhere: linear or agent, not {rowless[0]}")

    def _check_start(self, start: Trained) -> None:
        """LoRA of another scale would be another student."""
        had = start.about.get("lora_scale", 1.0)
        if self.lora and start.lora and not math.isclose(had, self.lora_scale):
            raise ValueError(
                f"--weights {self.weights} has LoRA that counts {had:g} times, here it counts {self.lora_scale:g} "
                f"times: pass --lora-alpha {had * self.lora:g}"
            )

    @property
    def lora_scale(self) -> float:
        """How many times what LoRA adds counts."""
        return (self.lora_alpha or self.lora) / self.lora if self.lora else 1.0

    @classmethod
    def losses(cls) -> tuple[str, ...]:
        """The settings that are weights of losses."""
        raise NotImplementedError

    @property
    def staged(self) -> bool:
        """Whether a part of the run trains a part of the parameters."""
        return False

    @property
    def pattern_ends(self) -> tuple[str, str]:
        """The pattern at the beginning of the run, and at its end."""
        return at(self.pattern, 0.0), at(self.pattern, 1.0)

    def pattern_at(self, done: float) -> str:
        """The pattern when a share of the run is over."""
        return at(self.pattern, stepped(done, self.anneal))

    @property
    def rate(self) -> float:
        """Learning rate at its peak."""
        return self.lr or {"adamw": 5e-4, "prodigy": 1.0, "muon": 2e-3}[self.optimizer]

    def to_json(self) -> dict[str, Any]:
        """Settings as plain values."""
        return {key: str(value) if isinstance(value, Path) else value for key, value in asdict(self).items()}


# Settings that a resumed run may change: no weight depends on them.
CHANGEABLE = {
    "out",
    "save_every",
    "log_every",
    "sample_every",
    "tensorboard",
    "threads",
    "graphs",
    "resume",
    "fsdp",
    "sequence",
    "parallel",
}


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
        settings: dict[str, Any] = {"help": entry.metadata["help"].replace("%", "%%"), "required": required}
        if not required:
            # What is not given is left to presets.
            settings["default"] = argparse.SUPPRESS
            if entry.default not in (None, "", False):
                settings["help"] += f" ({entry.default})"
        if hints[entry.name] is bool:
            settings["action"] = argparse.BooleanOptionalAction
        else:
            settings["type"] = next(iter(get_args(hints[entry.name])), hints[entry.name])
        parser.add_argument(flag(entry), **settings)
    given = vars(parser.parse_args(arguments))
    return kind(**(kind.preset(given) if hasattr(kind, "preset") else {}) | given)
