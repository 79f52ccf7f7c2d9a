"""Measures what attention patterns cost the emoji image model: are its pictures still what was asked for, how fast?

    python -m scripts.measure.emoji --data out/emoji-data --device cuda --pictures out/emoji-quality

Every pattern draws the same captions from the same noise: 100 that training knew and 100 that it never saw. Counted are
the pictures for which the judge (scripts.measure.emoji_encoder) puts the right caption first, or among the first five,
of the 100, with Wilson's 95 % intervals. The Frechet distance to held-out real pictures is that of the judge's features
in their 16 main axes: 100 pictures say nothing about a covariance in all 128. "real" has the same figures of real
pictures. Stop it at any time, or with --seconds: rows that are in --out are not measured again.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from scripts.measure.emoji_encoder_model import ENCODER, SIDE, load_encoder
from scripts.measure.emoji_judge import Judge
from scripts.measure.emoji_prompts import CAPTIONS, KINDS
from scripts.train.emoji_data import load_pack
from visattn import apply
from visattn.canvas import column, row, text
from visattn.environment import devices, versions
from visattn.files import written_whole
from visattn.pipelines.load import load_pipeline
from visattn.pipelines.trained import Trained, load_own, load_trained, trained_weights

DENSE, SHIPPED = "dense", "shipped"
# Every pattern of the package that an image model of FLUX's kind takes: radial is for videos, agentsd for UNets.
PATTERNS = (
    DENSE,
    "na(window=16x16,stride=8x8)",
    "na(window=17x17)",
    "na(window=9x9,dilation=4x4)",
    "halo(block=8x8,halo=4)",
    "clear(radius=8)",
    "clear(radius=8,pool=4)",
    "routing(regions=8x8,topk=8)",
    "agent(agents=8x8)",
    "linear(feature=elu)",
    "linear(feature=hedgehog)",
    "mala",
    "flow",
    "sigmoid(sparse=na(window=17x17))",
    "sparselinear(sparse=na(window=16x16,stride=8x8))",
)
SHOWN, SHOWN_SIDE = 8, 128
WARM_UP_STEPS = 2


@dataclass(frozen=True)
class Student:
    """What runs: a pattern, with the model's own weights or trained ones, behind some steps of dense attention."""

    pattern: str
    weights: Path | None = None
    dense_steps: int = 0

    @property
    def name(self) -> str:
        """Name of the weights."""
        return SHIPPED if self.weights is None else self.weights.parent.name

    def key(self, size: int) -> str:
        """Of the row in the results."""
        behind = f", {self.dense_steps} dense steps" if self.dense_steps else ""
        return f"{self.pattern}, {size} px, {self.name}{behind}"


@dataclass(frozen=True, eq=False)
class Drawn:
    """Pictures [N, 3, size, size] by kind of captions, values 0 to 1 on the CPU; seconds and density."""

    pictures: dict[str, torch.Tensor]
    seconds: float
    attention_seconds: float
    density: float | None
    backends: list[str]


class Draftsman:
    """Draws all captions of a judge with a pattern, always from the same noise.

    Args:
        pipe: The pipeline.
        judge: Has the captions.
        options: Steps, guidance, batch, seed of the command line.
    """

    def __init__(self, pipe: Any, judge: Judge, options: argparse.Namespace) -> None:
        self.pipe, self.judge, self.options = pipe, judge, options

    def draw(self, student: Student, size: int) -> Drawn:
        """Pictures of every caption."""
        options, batch = self.options, self.batch(size)
        with patched(self.pipe, student, options.backend) as handle:
            self.call(self.judge.captions(next(iter(KINDS)))[:batch], 0, size, WARM_UP_STEPS)
            before = handle.report()
            start, made = time.perf_counter(), {}
            for number, kind in enumerate(KINDS):
                captions = self.judge.captions(kind)
                parts = []
                for first in range(0, len(captions), batch):
                    some = captions[first : first + batch]
                    parts.append(self.call(some, options.seed + number * 100_000 + first, size, options.steps))
                made[kind] = torch.cat(parts)
            seconds, after = time.perf_counter() - start, handle.report()
        inside = [each.sparse_seconds + each.dense_seconds for each in (before, after)]
        backends = sorted({call.backend for site in after.sites for call in site.calls})
        density = 1.0 if student.pattern == DENSE else after.density
        count = sum(len(pictures) for pictures in made.values())
        return Drawn(made, seconds / count, (inside[1] - inside[0]) / count, density, backends)

    def batch(self, size: int) -> int:
        """Samples that are drawn at once."""
        return max(1, 256 * 256 * self.options.batch // size**2)

    def shape(self, size: int) -> tuple[int, ...]:
        """Of the noise of one sample."""
        return (3, size, size)

    def sheet(self, drawn: Drawn) -> Image.Image:
        """The first samples of each kind."""
        return row([_picture(each) for some in drawn.pictures.values() for each in some[:SHOWN]], gap=4)

    def call(self, captions: Sequence[str], seed: int, size: int, steps: int) -> torch.Tensor:
        """Pictures of some captions; the noise of each has a seed of its own."""
        noise = [
            torch.randn(1, *self.shape(size), generator=torch.Generator().manual_seed(seed + i))
            for i in range(len(captions))
        ]
        sizes = {"height": size, "width": size, "num_inference_steps": steps}
        output = self.pipe(
            captions, latents=torch.cat(noise), guidance_scale=self.options.guidance, output_type="pt", **sizes
        )
        return output[0].float().cpu()


def _picture(pixels: torch.Tensor) -> Image.Image:
    """[3, H, W], values 0 to 1, at SHOWN_SIDE."""
    whole = Image.fromarray((pixels * 255).round().byte().permute(1, 2, 0).numpy())
    return whole.resize((SHOWN_SIDE, SHOWN_SIDE), Image.Resampling.BOX)


@contextmanager
def patched(pipe: Any, student: Student, backend: str) -> Iterator[Any]:
    """The pipeline with a pattern and its weights; dense by visattn too, so that its attention is timed alike."""
    if student.weights is None:
        with apply(
            pipe,
            student.pattern,
            backend="auto" if student.pattern == DENSE else backend,
            strict=True,
            dense_steps=student.dense_steps,
        ) as handle:
            yield handle
        return
    trained: Trained = load_trained(student.weights)
    with (
        trained_weights(pipe.transformer, trained),
        apply(pipe, student.pattern, backend=backend, strict=True, dense_steps=student.dense_steps) as handle,
    ):
        load_own(handle, trained)
        yield handle


def judge_of(encoder: Any, options: argparse.Namespace) -> Judge:
    """The judge of pictures."""
    return Judge.of(encoder, load_pack(options.data, options.device, SIDE), options.captions)


def measure(
    options: argparse.Namespace,
    judge_of: Callable[[Any, argparse.Namespace], Judge] = judge_of,
    drawn_by: Callable[..., Draftsman] = Draftsman,
    also: Callable[[Draftsman, dict[str, Any]], list[Student]] | None = None,
) -> dict[str, Any]:
    """Measures the rows that are missing and writes each when it is done; returns everything.

    Args:
        options: Of the command line.
        judge_of: Makes the judge of an encoder.
        drawn_by: The kind of draftsman.
        also: Makes more rows, of the draftsman and the results so far.
    """
    start = time.monotonic()
    torch.set_num_threads(options.threads)
    students = [Student(pattern, None, options.dense_steps) for pattern in options.patterns]
    students += [Student(load_trained(path).about["pattern"], path, options.dense_steps) for path in options.weights]
    encoder, about = load_encoder(options.encoder, options.device)
    judge = judge_of(encoder, options)
    pipe: Any = load_pipeline(options.model, options.device, options.dtype)
    pipe.set_progress_bar_config(disable=True)
    figures = begin(options, pipe, judge, about)
    draftsman = drawn_by(pipe, judge, options)
    students += also(draftsman, figures) if also else []
    for size in options.sizes:
        rows = figures["rows"]
        missing = [each for each in students if "error" in rows.get(each.key(size), {"error": "not measured"})]
        if not missing:
            continue
        dense = draftsman.draw(Student(DENSE), size)
        for student in missing:
            if options.seconds and time.monotonic() - start > options.seconds:
                print(f"stopped after {options.seconds:g} s: the same command goes on", flush=True)
                return figures
            figures["rows"][student.key(size)] = entry(student, size, draftsman, dense, options)
            write(figures, options.out)
    return figures


def entry(
    student: Student, size: int, draftsman: Draftsman, dense: Drawn, options: argparse.Namespace
) -> dict[str, Any]:
    """One row of the results; a pattern that cannot run says why."""
    found: dict[str, Any] = {"pattern": student.pattern, "size": size, "weights": student.name}
    if student.dense_steps:
        found["dense_steps"] = student.dense_steps
    twin = student == Student(DENSE)
    try:
        drawn = dense if twin else draftsman.draw(student, size)
    except Exception as error:
        # Kernels may fail to compile in ways of their own; the other patterns are worth measuring.
        print(f"{student.key(size)}: {type(error).__name__}: {error}", flush=True)
        return found | {"error": (str(error) or type(error).__name__).splitlines()[0]}
    judge = draftsman.judge
    found |= {"density": drawn.density, "backends": drawn.backends}
    found |= {"seconds": round(drawn.seconds, 5), "attention_seconds": round(drawn.attention_seconds, 5)}
    found |= {kind: judge.named(drawn.pictures[kind], kind) for kind in KINDS}
    if not twin:
        pairs = [torch.cat(list(each.pictures.values())) for each in (drawn, dense)]
        found |= judge.likeness(*pairs)
    if options.pictures:
        save_strip(draftsman.sheet(drawn), options.pictures, student, size)
    print(json.dumps(found), flush=True)
    return found


def begin(options: argparse.Namespace, pipe: Any, judge: Judge, encoder: dict[str, Any]) -> dict[str, Any]:
    """The results so far, or new ones with all that does not depend on a pattern.

    Raises:
        ValueError: If the file holds results of another model or other settings.
    """
    settings = {name: getattr(options, name) for name in ("captions", "steps", "guidance", "seed", "batch")}
    settings |= {"model": model_hash(pipe.transformer), "dtype": str(pipe.dtype).removeprefix("torch.")}
    settings |= {"device": torch.cuda.get_device_name() if options.device.startswith("cuda") else "cpu"}
    if options.out.is_file() and not options.force:
        known = json.loads(options.out.read_text())
        other = [name for name, value in settings.items() if known["settings"].get(name) != value]
        if other:
            then, now = known["settings"].get(other[0]), settings[other[0]]
            raise ValueError(
                f"{options.out} has rows of {other[0]} {then!r}, not {now!r}: pass another --out or --force"
            )
        return known
    figures: dict[str, Any] = {
        "settings": settings,
        "versions": versions(),
        "devices": devices(),
        "encoder": encoder,
        "frechet_axes": judge.axes.shape[1],
        "frechet_variance_kept": round(judge.kept, 4),
        "frechet_reference": len(judge.reference),
        "lpips": judge.lpips_note,
        "real": {kind: judge.real(kind) for kind in KINDS},
        "rows": {},
    }
    write(figures, options.out)
    return figures


def model_hash(model: torch.nn.Module) -> str:
    """What tells one set of weights from another, whatever the type that they are loaded in."""
    found = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        found.update(name.encode())
        found.update(value.detach().to("cpu", torch.bfloat16).view(torch.int16).numpy().tobytes())
    return found.hexdigest()[:12]


def write(figures: dict[str, Any], path: Path) -> None:
    """Writes the results whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with written_whole(path) as temporary:
        temporary.write_text(json.dumps(figures, indent=1) + "\n")


def save_strip(sheet: Image.Image, folder: Path, student: Student, size: int) -> None:
    """Saves the first samples of a row, and puts all strips of this size in the folder on one sheet."""
    folder.mkdir(parents=True, exist_ok=True)
    strip = column([text(student.key(size)), sheet], gap=4)
    name = "".join(sign if sign.isalnum() else "-" for sign in f"{student.pattern}-{student.name}")
    strip.save(folder / f"strip-{size}-{name}.png")
    strips = sorted(folder.glob(f"strip-{size}-*.png"), key=lambda path: path.stat().st_mtime)
    column([Image.open(path) for path in strips], margin=8).save(folder / f"sheet-{size}.png", optimize=True)


def add_options(parser: argparse.ArgumentParser) -> None:
    """Options of a measurement; the defaults are those of pictures."""
    add = parser.add_argument
    add("--patterns", nargs="*", default=list(PATTERNS), help="every one of the package's")
    add("--weights", nargs="*", type=Path, default=[], help="student.safetensors files; own patterns")
    add("--sizes", nargs="+", type=int, default=[256], help="sides in pixels")
    add("--captions", type=int, default=CAPTIONS, help="seen ones, and as many unseen ones")
    add("--steps", type=int, default=24)
    add("--dense-steps", type=int, default=0, help="steps of a run that are dense before the pattern begins")
    add("--guidance", type=float, default=4.5)
    add("--batch", type=int, default=50, help="samples at once at the model's own size; fewer at larger sizes")
    add("--seed", type=int, default=0)
    add("--backend", default="auto")
    add("--model", default="emoji", help="embedded model, or folder of a pipeline of its kind")
    add("--data", type=Path, default=Path("out/emoji-data"), help="folder of the pack")
    add("--encoder", type=Path, default=ENCODER, help="file of the judge")
    add("--device", default="cpu")
    add("--dtype", help="float32 (the CPU's), bfloat16 (elsewhere), float16")
    add("--threads", type=int, default=2)
    add("--seconds", type=float, default=0.0, help="begin no row after so long; 0: no limit")
    add("--out", type=Path, default=Path("docs/results/emoji-quality.json"))
    add("--force", action="store_true", help="begin --out anew")
    add("--pictures", type=Path, help="folder for some of the samples")


def report(figures: dict[str, Any]) -> None:
    """Prints a line for each row."""
    for key, found in figures["rows"].items():
        if "error" in found:
            print(f"{key:<64} {found['error']}")
        else:
            shares = "  ".join(f"{kind} {found[kind]['top1']:.0%}/{found[kind]['top5']:.0%}" for kind in KINDS)
            print(f"{key:<64} {shares}  {found['seconds']:.3f} s, attention {found['attention_seconds']:.3f} s")


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser)
    try:
        report(measure(parser.parse_args(arguments)))
    except ValueError as error:
        raise SystemExit(f"measure_emoji: {error}") from error


if __name__ == "__main__":
    main()
