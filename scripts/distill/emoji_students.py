"""Distills the emoji model into every student of docs/distillation.md.

    python -m scripts.distill.emoji_students --data out/emoji-data --out runs/emoji --jobs 5 --seconds 100
    python -m scripts.measure.emoji --weights runs/emoji/*/student.safetensors

They learn from pictures that the dense model draws for captions of its training that scripts.measure.emoji does not
measure. Stop it at any time: students that are done are not trained again, the others go on.
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from scripts.distill import cache_samples
from scripts.distill.process import collect, train_student
from scripts.distill.settings import option, parse
from scripts.measure.emoji_prompts import CAPTIONS, SEEN, choose
from scripts.train.emoji_captions import TRAIN
from scripts.train.emoji_data import Pack, load_pack
from visattn.files import written_whole

# Linear forms begin far from their teacher: they learn faster, and more from what each layer should give.
LINEAR = ("--lr", "1.5e-3", "--attention", "0.3")
# Pattern and further options of scripts.distill.pipeline for each student.
STUDENTS: dict[str, tuple[str, tuple[str, ...]]] = {
    "clear": ("clear(radius=8)", ()),
    "na": ("na(window=16x16,stride=8x8)", ()),
    "hedgehog": ("linear(feature=hedgehog)", (*LINEAR, "--maps", "0.05", "--own-lr", "5e-3")),
    "mala": ("mala", LINEAR),
    "agent": ("agent(agents=8x8)", LINEAR),
}
START = 120  # seconds beside its steps after which a training is asked to stop
LOSSES = ("--denoising", "0.1", "--output", "1", "--attention", "0.1")


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What to run."""

    out: Path = field(metadata={"help": "folder for samples and students"})
    data: Path = option(Path("out/emoji-data"), "folder of the pack, whose captions are drawn")
    model: str = option("emoji", "teacher: the embedded model, or a folder of one of its kind")
    students: str = option(",".join(STUDENTS), "which of them")
    steps: int = option(2000, "optimizer steps of each, at most")
    batch: int = option(8, "samples of a step")
    lr: float = option(1e-3, "learning rate of students that are not linear")
    cached: int = option(400, "samples that are learned from")
    draw_steps: int = option(16, "denoising steps of a sample")
    chunk: int = option(50, "samples drawn at once")
    size: int = option(256, "side of the samples in pixels")
    backend: str = option("auto", "backend of the patterns")
    precision: str = option("bf16", "mixed precision: no or bf16", ("no", "bf16"))
    jobs: int = option(1, "students trained at the same time")
    seconds: int = option(0, "end a training after so many seconds of steps; 0: never")
    cpu: bool = option(False, "stay on the CPU")
    threads: int = option(2, "threads on the CPU")

    def __post_init__(self) -> None:
        unknown = [name for name in self.names if name not in STUDENTS]
        if unknown:
            raise ValueError(f"--students {unknown[0]!r} does not exist: {', '.join(STUDENTS)}")

    @property
    def names(self) -> list[str]:
        """Students."""
        return [name.strip() for name in self.students.split(",")]


def prompts(pack: Pack, count: int, seed: int = 1) -> list[str]:
    """Captions of the training split, without those that are measured."""
    measured = set(choose(pack, min(CAPTIONS, len(pack.of(TRAIN)) // 2))[SEEN])
    order = [pack.pictures[i].caption for i in pack.of(TRAIN).tolist() if i not in measured]
    random.Random(seed).shuffle(order)
    return list(dict.fromkeys(order))[:count]


def cache(settings: Settings) -> None:
    """Draws what the students learn from, unless it is there."""
    captions = prompts(load_pack(settings.data, side=32), settings.cached)
    words = ["--model", settings.model, "--steps", str(settings.draw_steps), "--size", str(settings.size)]
    draw(captions, settings.out, [*words, "--batch", str(settings.chunk)], settings.cpu)


def draw(captions: Sequence[str], out: Path, words: Sequence[str], cpu: bool) -> None:
    """Draws a sample for each caption into OUT/samples, unless they are there.

    Args:
        captions: What is drawn.
        out: The folder.
        words: Options of scripts.distill.cache_samples: model, steps, size, batch.
        cpu: Whether to stay on the CPU.
    """
    out.mkdir(parents=True, exist_ok=True)
    file = out / "prompts.txt"
    with written_whole(file) as path:
        path.write_text("\n".join(captions) + "\n")
    device = "cpu" if cpu or not torch.cuda.is_available() else "cuda"
    shard = words[words.index("--batch") + 1]
    given = [*words, "--prompts", str(file), "--out", str(out / "samples"), "--count", str(len(captions))]
    cache_samples.main([*given, "--shard", shard, "--seed", "1000000", "--device", device])


def train(name: str, settings: Settings) -> float:
    """Trains one student in a process of its own; returns the seconds."""
    pattern, options = STUDENTS[name]
    words = ["--model", settings.model, "--pattern", pattern, "--samples", str(settings.out / "samples")]
    words += ["--steps", str(settings.steps), "--batch", str(settings.batch), "--lr", str(settings.lr)]
    words += ["--ema", "0.99", "--threads", str(settings.threads), "--backend", settings.backend]
    words += ["--save-every", str(settings.steps)] + ["--cpu"] * settings.cpu
    words += ["--seconds", str(settings.seconds), "--precision", settings.precision, *LOSSES, *options]
    return train_student(words, settings.out / name, settings.seconds and settings.seconds + START)


def entry_of(name: str, seconds: float, settings: Settings) -> dict[str, Any]:
    """What a trained student's log says."""
    log = [json.loads(line) for line in (settings.out / name / "log.jsonl").read_text().splitlines()]
    found = {"pattern": STUDENTS[name][0], "steps": log[-1]["step"], "seconds": round(seconds, 1)}
    return found | {"first": log[0], "last": log[-1]}


def run(settings: Settings) -> dict[str, Any]:
    """Draws and trains; returns steps and seconds of each student, which are in OUT/students.json too."""
    cache(settings)
    known = {key: str(value) if isinstance(value, Path) else value for key, value in asdict(settings).items()}
    figures: dict[str, Any] = {"settings": known, "torch": torch.__version__, "students": {}}
    figures["device"] = "cpu" if settings.cpu or not torch.cuda.is_available() else torch.cuda.get_device_name()
    with ThreadPoolExecutor(settings.jobs) as pool:
        training: dict[str, Future[float]] = {name: pool.submit(train, name, settings) for name in settings.names}
        collect(
            training, figures, lambda name, seconds: entry_of(name, seconds, settings), settings.out / "students.json"
        )
    return figures


def main(arguments: list[str] | None = None) -> None:
    """Entry point."""
    try:
        settings = parse(Settings, __doc__, arguments)
        if settings.threads:
            torch.set_num_threads(settings.threads)
        figures = run(settings)
    except ValueError as error:
        raise SystemExit(f"distill_emoji: {error}") from error
    if "failed" in figures:
        raise SystemExit(f"distill_emoji: no student for {', '.join(figures['failed'])}")


if __name__ == "__main__":
    main()
