"""Distills the embedded digits model into every student of docs/distillation.md, and measures each before and after.

    python -m scripts.distill.digits_students --out runs/digits --result docs/results/distill-digits.json
    python -m scripts.distill.digits_students --out runs/digits --jobs 5 --precision bf16       # at once on one GPU

Stop it at any time: students that are done are not trained again, the others go on. What is measured, all with the
same labels and noise: how many samples are read as what they should be, the Frechet distance to other samples of the
dense teacher and to real digits in the feature space of a classifier (see scripts/distill/judge.py), and the
PSNR to the teacher's picture from the same noise. The share of a gap that is recovered is
(before - after) / (before - teacher).
"""

from __future__ import annotations

import json
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from scripts.distill import cache_samples
from scripts.distill.judge import Judge, train_judge
from scripts.distill.process import collect, train_student
from scripts.distill.settings import option, parse
from scripts.measure.estimates import frechet
from scripts.train.digits_data import real_digits, upscale
from visattn import apply
from visattn.pipelines.embedded import load_embedded
from visattn.pipelines.trained import load_own, load_trained, trained_weights

# Pattern and further options of scripts.distill.pipeline for each student. Autocast would round the sums over all
# keys of linear forms, so they train in float32.
STUDENTS: dict[str, tuple[str, tuple[str, ...]]] = {
    "clear": ("clear(radius=3)", ()),
    "na": ("na(window=7x7)", ()),
    "hedgehog": ("linear(feature=hedgehog)", ("--precision", "no", "--maps", "0.05", "--own-lr", "5e-3")),
    "mala": ("mala", ("--precision", "no")),
    "agent": ("agent(agents=8x8)", ()),
}
PLAIN = {"clear": "sdpa", "na": "sdpa", "hedgehog": "linear", "mala": "linear", "agent": "agent"}
LOSSES = ("--denoising", "0.1", "--output", "1", "--attention", "0.05")
CLASSES, SIZE, LARGE, STEPS = 10, 64, 128, 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What to run."""

    out: Path = field(metadata={"help": "folder for samples, students and pictures"})
    result: Path | None = option(None, "file for the figures as JSON; OUT/figures.json")
    students: str = option(",".join(STUDENTS), "which of them")
    steps: int = option(1000, "optimizer steps of each")
    batch: int = option(16, "samples of a step")
    lr: float = option(1e-3, "learning rate")
    cached: int = option(500, "samples that are learned from")
    samples: int = option(500, "samples that are measured, of each student")
    large: int = option(50, "samples at twice the side, which no student was trained at; 0: none")
    reference: int = option(1000, "samples of the teacher that they are compared with")
    chunk: int = option(20, "samples at once")
    precision: str = option("no", "mixed precision of training (not of sampling): no or bf16", ("no", "bf16"))
    plain: bool = option(False, "backends in plain torch only, whatever is faster")
    jobs: int = option(1, "students trained at the same time")
    seconds: int = option(0, "stop a training after so long and take what it has; 0: never")
    cpu: bool = option(False, "stay on the CPU")
    train_cpu: bool = option(False, "train on the CPU, and sample on the GPU")
    threads: int = option(2, "threads on the CPU")

    def __post_init__(self) -> None:
        unknown = [name for name in self.names if name not in STUDENTS]
        if unknown:
            raise ValueError(f"--students {unknown[0]!r} does not exist: {', '.join(STUDENTS)}")
        for name in ("samples", "large", "reference", "cached"):
            count = getattr(self, name)
            if count % CLASSES or count < (0 if name == "large" else CLASSES):
                raise ValueError(f"--{name} {count} must be a multiple of {CLASSES}")

    @property
    def names(self) -> list[str]:
        """Students."""
        return [name.strip() for name in self.students.split(",")]


def train(name: str, settings: Settings) -> float:
    """Trains one student in a process of its own; returns the seconds."""
    pattern, options = STUDENTS[name]
    words = ["--pattern", pattern, "--samples", str(settings.out / "samples"), "--steps", str(settings.steps)]
    words += ["--batch", str(settings.batch), "--lr", str(settings.lr), "--ema", "0.99"]
    words += ["--threads", str(settings.threads), "--backend", backend_of(name, settings)]
    words += ["--cpu"] * (settings.cpu or settings.train_cpu)
    words += ["--precision", settings.precision, *LOSSES, *options]
    return train_student(words, settings.out / name, settings.seconds)


def backend_of(name: str, settings: Settings) -> str:
    """Backend of a student."""
    return PLAIN[name] if settings.plain else "auto"


class Measure:
    """Makes samples and judges them; every set has the same labels and noise."""

    def __init__(self, settings: Settings, judge: Judge) -> None:
        self.settings, self.judge = settings, judge
        self.device = torch.device("cuda" if torch.cuda.is_available() and not settings.cpu else "cpu")
        self.pipe: Any = load_embedded("digits").to(self.device)
        self.pipe.set_progress_bar_config(disable=True)
        real, _ = real_digits()
        self.real = judge.features(upscale(real, SIZE))
        self.reference = judge.features(self.sample(None, None, settings.reference, seed=1))
        self.truth = self.sample(None, None, settings.samples, seed=0)
        self.teacher = self.figures(self.truth)

    def sample(self, name: str | None, weights: Path | None, count: int, seed: int, size: int = SIZE) -> torch.Tensor:
        """Images [count, 1, size, size], values -1 to 1, labels in a circle; no name: the dense teacher."""
        labels = torch.arange(count) % CLASSES
        noise = torch.randn(count, 1, size, size, generator=torch.Generator().manual_seed(seed))
        made = []
        with ExitStack() as stack:
            trained = load_trained(weights) if weights else None
            if trained:
                stack.enter_context(trained_weights(self.pipe.transformer, trained))
            if name:
                backend = backend_of(name, self.settings)
                handle = stack.enter_context(apply(self.pipe, STUDENTS[name][0], backend=backend, strict=True))
                if trained:
                    load_own(handle, trained)
            chunk = max(1, self.settings.chunk * SIZE**2 // size**2)
            for some, start in zip(labels.split(chunk), noise.split(chunk), strict=True):
                options: dict[str, Any] = {"height": size, "width": size, "num_inference_steps": STEPS}
                output = self.pipe(some, latents=start, output_type="pt", **options)
                made.append(output.images.float().cpu() * 2 - 1)
        return torch.cat(made)

    def figures(self, images: torch.Tensor) -> dict[str, float | None]:
        """Figures of a set of samples; PSNR in dB, of pixel values 0 to 1, None for the teacher itself."""
        labels = torch.arange(len(images)) % CLASSES
        error = (images.clamp(-1, 1) - self.truth.clamp(-1, 1)).div(2).square().mean((1, 2, 3))
        features = self.judge.features(images)
        return {
            "recognized": self.judge.recognized(images, labels),
            "frechet": frechet(features, self.reference),
            "frechet_real": frechet(features, self.real),
            "psnr": None if not error.any() else float(-10 * error.clamp_min(1e-10).log10().mean()),
        }

    def student(self, name: str, weights: Path | None) -> dict[str, float | None]:
        """Figures of a student, and its picture."""
        images = self.sample(name, weights, self.settings.samples, seed=0)
        save_rows(images, self.settings.out / f"{name}-{'after' if weights else 'before'}.png")
        return self.figures(images)

    def large(self, name: str | None, weights: Path | None) -> float | None:
        """Share of samples at twice the side (four times the tokens) that are recognized; saves their picture."""
        if not self.settings.large:
            return None
        images = self.sample(name, weights, self.settings.large, seed=2, size=LARGE)
        kind = "" if name is None else "-after" if weights else "-before"
        save_rows(images, self.settings.out / f"{name or 'teacher'}{kind}-large.png")
        return self.judge.recognized(images, torch.arange(len(images)) % CLASSES)


def save_rows(images: torch.Tensor, path: Path) -> None:
    """Saves the first samples, one of each class in a row."""
    from PIL import Image

    rows = (
        images[: 2 * CLASSES, 0].clamp(-1, 1).unflatten(0, (-1, CLASSES)).permute(0, 2, 1, 3).flatten(2).flatten(0, 1)
    )
    Image.fromarray(((rows + 1) * 127.5).round().to(torch.uint8).numpy()).save(path)


def save_sheets(folder: Path, names: list[str]) -> None:
    """Puts the first row of the saved pictures on sheets: the teacher and the students, at both sizes."""
    from PIL import Image

    from visattn.canvas import column, row, text

    for sheet, side, kinds in (("students", SIZE, ("-before", "-after")), ("students-large", LARGE, ("-after-large",))):
        found = []
        for name in ("teacher", *names):
            own = ("-large" if side == LARGE else "",) if name == "teacher" else kinds
            files = [folder / f"{name}{kind}.png" for kind in own]
            # Ten digits at the model's size, five at twice the side.
            pictures = [Image.open(file).crop((0, 0, 10 * SIZE, side)) for file in files if file.is_file()]
            if pictures:
                words = (
                    ", ".join([STUDENTS[name][0], *["before and after"] * (side == SIZE)]) if name in STUDENTS else ""
                )
                found += [text(words or "dense teacher"), row([picture.convert("RGB") for picture in pictures])]
        if found:
            column(found, gap=6, margin=8).convert("L").save(folder / f"{sheet}.png", optimize=True)


def recovered(before: float | None, after: float | None, teacher: float | None) -> float | None:
    """Share of the gap to the teacher that training closed; None where there was none."""
    if before is None or after is None or teacher is None or before == teacher:
        return None
    return (before - after) / (before - teacher)


def entry_of(name: str, seconds: float, before: dict[str, float | None], measure: Measure) -> dict[str, Any]:
    """Figures of a trained student."""
    folder = measure.settings.out / name
    log = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    after = measure.student(name, folder / "student.safetensors")
    return {
        "pattern": STUDENTS[name][0],
        "steps": log[-1]["step"],
        "seconds": round(seconds, 1),
        "before": before,
        "after": after | {"recognized_large": measure.large(name, folder / "student.safetensors")},
        "recovered": {key: recovered(before[key], after[key], measure.teacher[key]) for key in after},
    }


def run(settings: Settings) -> dict[str, Any]:
    """Caches, trains, measures; returns the figures."""
    device = "cpu" if settings.cpu or not torch.cuda.is_available() else "cuda"
    batch = settings.chunk
    words = ["--out", str(settings.out / "samples"), "--count", str(settings.cached), "--steps", str(STEPS)]
    words += ["--batch", str(batch), "--shard", str(batch * 20), "--seed", "1000000", "--device", device]
    cache_samples.main([*words, "--dtype", "float32"])
    known = {key: value for key, value in asdict(settings).items() if key not in ("out", "result")}
    figures: dict[str, Any] = {"settings": known, "torch": torch.__version__}
    figures["device"] = torch.cuda.get_device_name() if device == "cuda" else "cpu"
    figures["trained_on"] = "cpu" if settings.train_cpu else figures["device"]
    with ThreadPoolExecutor(settings.jobs) as pool:
        training: dict[str, Future[float]] = {name: pool.submit(train, name, settings) for name in settings.names}
        judge = train_judge(SIZE)
        measure = Measure(settings, judge)
        save_rows(measure.truth, settings.out / "teacher.png")
        figures |= {"judge_accuracy": judge.accuracy, "reader_accuracy": judge.reader.round_trip_accuracy}
        figures |= {"teacher": measure.teacher | {"recognized_large": measure.large(None, None)}, "students": {}}
        before = {name: measure.student(name, None) for name in settings.names}
        collect(
            training,
            figures,
            lambda name, seconds: entry_of(name, seconds, before[name], measure),
            settings.result or settings.out / "figures.json",
        )
    save_sheets(settings.out, settings.names)
    return figures


def main(arguments: list[str] | None = None) -> None:
    """Entry point."""
    try:
        settings = parse(Settings, __doc__, arguments)
        if settings.threads:
            torch.set_num_threads(settings.threads)
        # Products on tensor cores where the GPU has them; the CPU does not care.
        torch.set_float32_matmul_precision("high")
        settings.out.mkdir(parents=True, exist_ok=True)
        figures = run(settings)
    except ValueError as error:
        raise SystemExit(f"distill_digits: {error}") from error
    if "failed" in figures:
        raise SystemExit(f"distill_digits: no result for {', '.join(figures['failed'])}")


if __name__ == "__main__":
    main()
