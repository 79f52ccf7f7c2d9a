"""Distills the emoji model into every student of docs/distillation.md.

    python -m scripts.distill.emoji_students --data out/emoji-data --out runs/emoji --jobs 5 --seconds 100
    python -m scripts.measure.emoji --weights runs/emoji/*/student.safetensors

They learn from pictures that the dense model draws for captions of its training that scripts.measure.emoji does not
measure. Stop it at any time: students that are done are not trained again, the others go on.
"""

from __future__ import annotations

import json
import math
import random
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from scripts import cli
from scripts.distill import cache_samples
from scripts.distill.pipeline import THEN
from scripts.distill.process import collect, train_student
from scripts.distill.settings import option, parse
from scripts.measure.emoji_prompts import CAPTIONS, SEEN, choose
from scripts.train.emoji_captions import TRAIN
from scripts.train.emoji_data import Pack, load_pack
from visattn.files import written_whole


@dataclass(frozen=True)
class Phase:
    """A part of a student's training.

    Attributes:
        share: Of the student's time and steps.
        smaller: By how much the side of its samples is smaller than --size; a step has this squared as many of them.
        options: Further ones of scripts.distill.pipeline; later phases have those of the first too.
    """

    share: float
    smaller: int
    options: tuple[str, ...]


LOSSES = ("--denoising", "0.1", "--output", "1", "--attention", "0.1")
LOCAL = (Phase(1.0, 1, ("--lr", "1e-3")),)
# What sums over all keys see does not depend on how near tokens are to each other: it is learned from many small
# samples first. Nothing of such a student is like its teacher then, so every weight learns; layer by layer on the
# teacher's inputs, which are not what it will get, it learns less in as many steps.
LINEAR = (
    Phase(0.3, 4, ("--train", "all", "--own-lr", "2e-2")),
    Phase(0.3, 2, ()),
    Phase(0.4, 1, ("--lr", "1e-3")),
)
# Pattern and training of each student.
STUDENTS: dict[str, tuple[str, tuple[Phase, ...]]] = {
    "clear": ("clear(radius=8)", LOCAL),
    "na": ("na(window=16x16,stride=8x8)", LOCAL),
    "hedgehog": ("linear(feature=hedgehog)", LINEAR),
    "mala": ("mala", LINEAR),
    "agent": ("agent(agents=8x8)", LINEAR),
}
SAVE = 200  # steps after which a killed training goes on
START = 120  # seconds beside its steps after which a training is asked to stop


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What to run."""

    out: Path = field(metadata={"help": "folder for samples and students"})
    data: Path = option(Path("out/emoji-data"), "folder of the pack, whose captions are drawn")
    model: str = option("emoji", "teacher: the embedded model, or a folder of one of its kind")
    students: str = option(",".join(STUDENTS), "which of them")
    steps: int = option(2000, "optimizer steps of each, at most")
    batch: int = option(16, "samples of a step; of smaller ones more")
    optimizer: str = option("muon", "of scripts.distill.pipeline")
    lr: float = option(0.0, "learning rate; 0: that of each phase")
    cached: int = option(400, "samples that are learned from; of smaller ones more")
    draw_steps: int = option(16, "denoising steps of a sample")
    chunk: int = option(50, "samples drawn at once")
    size: int = option(256, "side of the samples in pixels")
    before: Path | None = option(None, "--out of an earlier run, whose students begin where they ended")
    backend: str = option("auto", "backend of the patterns")
    precision: str = option("bf16", "mixed precision: no or bf16", ("no", "bf16"))
    jobs: int = option(1, "students trained at the same time")
    seconds: int = option(0, "end a training after so many seconds of steps; 0: never")
    graphs: bool = option(True, "record steps as CUDA graphs, where there is a GPU")
    cpu: bool = option(False, "stay on the CPU")
    threads: int = option(2, "threads on the CPU")

    def __post_init__(self) -> None:
        unknown = [name for name in self.names if name not in STUDENTS]
        if unknown:
            raise ValueError(f"--students {unknown[0]!r} does not exist: {', '.join(STUDENTS)}")
        most = max(self.smaller)
        if self.size % (4 * most):
            raise ValueError(
                f"--size {self.size} must be a multiple of {4 * most}: samples {most} times smaller are drawn too"
            )
        absent = [] if self.before is None else [name for name in self.names if not self.begin(name).is_file()]
        if absent:
            raise ValueError(f"--before {self.before} has no {self.begin(absent[0])}: train it there first")
        if self.before is not None and self.before.resolve() == self.out.resolve():
            raise ValueError(f"--before {self.before} is --out: students that learn further need a folder of their own")

    @property
    def names(self) -> list[str]:
        """Students."""
        return [name.strip() for name in self.students.split(",")]

    @property
    def smaller(self) -> list[int]:
        """By how much samples are smaller than --size, the smallest first."""
        return sorted({phase.smaller for name in self.names for phase in self.phases(name)}, reverse=True)

    def begin(self, name: str) -> Path:
        """The weights that a student begins with, of an earlier run."""
        assert self.before is not None
        return self.before / name / "student.safetensors"

    def phases(self, name: str) -> tuple[Phase, ...]:
        """A student's training; one that learns further has seen enough of the smallest samples."""
        first, *rest = STUDENTS[name][1]
        if self.before is None or not rest:
            return first, *rest
        rest[0] = replace(rest[0], options=(*first.options, *rest[0].options))
        return tuple(replace(each, share=each.share / (1 - first.share)) for each in rest)

    def side(self, smaller: int) -> int:
        """Of samples that are so much smaller, in pixels."""
        return self.size // smaller

    def samples(self, smaller: int) -> Path:
        """Folder of the samples of this side."""
        return self.out / f"samples-{self.side(smaller)}"

    def folder(self, name: str, number: int) -> Path:
        """Of a student's phase; that of its last is the student's."""
        last = number + 1 == len(self.phases(name))
        return self.out / name if last else self.out / name / f"phase-{number + 1}"


def prompts(pack: Pack, count: int, seed: int = 1) -> list[str]:
    """Captions of the training split, without those that are measured."""
    measured = set(choose(pack, min(CAPTIONS, len(pack.of(TRAIN)) // 2))[SEEN])
    order = [pack.pictures[i].caption for i in pack.of(TRAIN).tolist() if i not in measured]
    random.Random(seed).shuffle(order)
    return list(dict.fromkeys(order))[:count]


def cache(settings: Settings) -> None:
    """Draws what the students learn from, unless it is there."""
    pack = load_pack(settings.data, side=0)
    for smaller in settings.smaller:
        words = ["--model", settings.model, "--steps", str(settings.draw_steps), "--size", str(settings.side(smaller))]
        words += ["--batch", str(settings.chunk * smaller**2)]
        draw(prompts(pack, settings.cached * smaller**2), settings.samples(smaller), words, settings.cpu)


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
    pattern, phases = STUDENTS[name][0], settings.phases(name)
    words = ["--model", settings.model, "--pattern", pattern, "--optimizer", settings.optimizer]
    words += ["--ema", "0.99", "--threads", str(settings.threads), "--backend", settings.backend]
    words += ["--precision", settings.precision, "--warmup", "20", *LOSSES]
    words += ["--graphs"] * (settings.graphs and torch.cuda.is_available() and not settings.cpu)
    words += ["--cpu"] * settings.cpu
    words += [] if settings.before is None else ["--weights", str(settings.begin(name))]
    for number, phase in enumerate(phases):
        steps, seconds = math.ceil(settings.steps * phase.share), settings.seconds * phase.share
        words += [THEN] * (number > 0) + ["--out", str(settings.folder(name, number))]
        words += ["--samples", str(settings.samples(phase.smaller) / "samples"), "--steps", str(steps)]
        words += ["--batch", str(settings.batch * phase.smaller**2), *phase.options]
        words += ["--lr", str(settings.lr)] if settings.lr else []
        words += ["--seconds", str(seconds), "--save-every", str(SAVE)]
    return train_student(words, settings.folder(name, len(phases) - 1), settings.seconds and settings.seconds + START)


def entry_of(name: str, seconds: float, settings: Settings) -> dict[str, Any]:
    """What a trained student's logs say."""
    pattern, phases = STUDENTS[name][0], settings.phases(name)
    found: dict[str, Any] = {"pattern": pattern, "seconds": round(seconds, 1), "phases": []}
    for number, phase in enumerate(phases):
        log = (settings.folder(name, number) / "log.jsonl").read_text().splitlines()
        first, last = json.loads(log[0]), json.loads(log[-1])
        found["phases"].append({"size": settings.side(phase.smaller), "first": first, "last": last})
    return found | {"steps": sum(each["last"]["step"] for each in found["phases"])}


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
    with cli.told("distill_emoji"):
        settings = parse(Settings, __doc__, arguments)
        if settings.threads:
            torch.set_num_threads(settings.threads)
        with cli.only_run(settings.out):
            figures = run(settings)
    if "failed" in figures:
        raise SystemExit(f"distill_emoji: no student for {', '.join(figures['failed'])}")


if __name__ == "__main__":
    main()
