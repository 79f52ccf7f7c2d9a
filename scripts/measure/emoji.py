"""Measures what attention patterns cost the emoji image model: are its pictures still what was asked for, how fast?

    python -m scripts.measure.emoji --data out/emoji-data --device cuda --pictures out/emoji-quality

Every pattern draws the same captions from the same noise: 100 that training knew and 100 that it never saw. Counted are
the pictures for which the judge (scripts.measure.emoji_encoder) puts the right caption first, or among the first five,
of the 100, with Wilson's 95 % intervals. The Frechet distance to held-out real pictures is that of the judge's features
in their 16 main axes: 100 pictures say nothing about a covariance in all 128. "real" has the same figures of real
pictures. Stop it at any time, or with --seconds: rows that are in --out are not measured again. Where others use the
device too, --shared leaves out the times; the same command without it adds them later.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from scripts import cli
from scripts.continued import check_same
from scripts.measure.draftsman import DENSE, Draftsman, Drawn, Student
from scripts.measure.emoji_encoder_model import ENCODER, SIDE, check_tokens, load_encoder
from scripts.measure.emoji_judge import Judge
from scripts.measure.emoji_prompts import CAPTIONS, KINDS, SEEN
from scripts.measure.twins import Twins
from scripts.train.emoji_data import load_pack
from visattn.canvas import column, text
from visattn.environment import devices, versions
from visattn.files import write_json
from visattn.pipelines.load import load_pipeline
from visattn.trained import load_trained

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

# Packages whose versions pictures and times depend on.
DEPENDS = ("torch", "triton", "diffusers")


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
    check_tokens(about, judge.pack.tokenizer)
    pipe: Any = load_pipeline(options.model, options.device, options.dtype)
    pipe.set_progress_bar_config(disable=True)
    figures = begin(options, pipe, judge, about)
    draftsman = drawn_by(pipe, judge, options)
    students += also(draftsman, figures) if also else []
    twins = Twins(options.twins, draftsman, figures["settings"])
    try:
        for size, student, make in _missing(students, figures["rows"], draftsman, twins, options):
            if options.seconds and time.monotonic() - start > options.seconds:
                print(f"stopped after {options.seconds:g} s: the same command goes on", flush=True)
                break
            row = figures["rows"][student.key(size)] = make()
            write(figures, options.out)
            # Only now: nobody may be there to read it, and it took long.
            print(json.dumps(row), flush=True)
    finally:
        # Once, and not after each row: the device would wait for the picture.
        for size in options.sizes if options.pictures else ():
            save_sheet(options.pictures, size)
    return figures


def _missing(
    students: Sequence[Student],
    rows: dict[str, Any],
    draftsman: Draftsman,
    twins: Twins,
    options: argparse.Namespace,
) -> Iterator[tuple[int, Student, Callable[[], dict[str, Any]]]]:
    """Size, student and what makes its row, for each row that is not there or has no times yet."""
    for size in options.sizes:
        missing = [each for each in students if not _measured(each, rows.get(each.key(size)))]
        times = not options.shared and Student(DENSE) in missing
        dense = twins.drawn(size, times) if missing else None
        for student in missing:
            assert dense is not None
            yield size, student, partial(entry, student, size, draftsman, dense, options)
        for student in students:
            known = rows[student.key(size)]
            if not options.shared and known.get("seconds", 0) is None:
                yield size, student, partial(_timed, known, student, size, draftsman)


def _measured(student: Student, row: dict[str, Any] | None) -> bool:
    """Whether a row is there, and of these weights."""
    return row is not None and "error" not in row and row.get("weights_hash") == student.hash


def _timed(known: dict[str, Any], student: Student, size: int, draftsman: Draftsman) -> dict[str, Any]:
    """A row that was measured where others used the device too, with the times of one batch."""
    return known | _times(draftsman.draw(student, size, draftsman.batch(size), [SEEN]))


def _times(drawn: Drawn) -> dict[str, float]:
    return {"seconds": round(drawn.seconds, 5), "attention_seconds": round(drawn.attention_seconds, 5)}


def entry(
    student: Student, size: int, draftsman: Draftsman, dense: Drawn, options: argparse.Namespace
) -> dict[str, Any]:
    """One row of the results; a pattern that cannot run says why."""
    found: dict[str, Any] = {"pattern": student.pattern, "size": size, "weights": student.name}
    if student.hash:
        found["weights_hash"] = student.hash
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
    found |= dict.fromkeys(_times(drawn)) if options.shared else _times(drawn)
    found |= {kind: judge.named(drawn.pictures[kind], kind) for kind in KINDS}
    if not twin:
        pairs = [torch.cat(list(each.pictures.values())) for each in (drawn, dense)]
        found |= judge.likeness(*pairs)
    if options.pictures:
        save_strip(draftsman.sheet(drawn), options.pictures, student, size)
    return found


def begin(options: argparse.Namespace, pipe: Any, judge: Judge, encoder: dict[str, Any]) -> dict[str, Any]:
    """The results so far, or new ones with all that does not depend on a pattern.

    Raises:
        ValueError: If the file holds results of another model, device or version, or of other settings.
    """
    settings = {name: getattr(options, name) for name in ("captions", "steps", "guidance", "seed", "batch")}
    settings |= {"model": model_hash(pipe.transformer), "dtype": str(pipe.dtype).removeprefix("torch.")}
    settings |= {"device": device_name(options.device)}
    if options.out.is_file() and not options.force:
        known = json.loads(options.out.read_text())
        here = {name: value for name, value in versions().items() if name in DEPENDS}
        check_same(known, {"settings": settings, "versions": here}, options.out)
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


def device_name(device: str) -> str:
    """What results call a device."""
    return torch.cuda.get_device_name() if device.startswith("cuda") else "cpu"


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
    write_json(path, figures)


def save_strip(sheet: Image.Image, folder: Path, student: Student, size: int) -> None:
    """Saves the first samples of a row."""
    folder.mkdir(parents=True, exist_ok=True)
    strip = column([text(student.key(size)), sheet], gap=4)
    strip.save(strip_path(folder, student, size))


def save_sheet(folder: Path, size: int) -> None:
    """Puts all strips of a size that are in the folder on one sheet."""
    strips = sorted(folder.glob(f"strip-{size}-*.png"), key=lambda path: path.stat().st_mtime)
    if strips:
        column([Image.open(path) for path in strips], margin=8).save(folder / f"sheet-{size}.png", optimize=True)


def strip_path(folder: Path, student: Student, size: int) -> Path:
    """Where `save_strip` saves the samples of a row."""
    name = "".join(sign if sign.isalnum() else "-" for sign in f"{student.pattern}-{student.name}")
    return folder / f"strip-{size}-{name}.png"


def add_options(parser: argparse.ArgumentParser) -> None:
    """Options of a measurement; the defaults are those of pictures."""
    add = parser.add_argument
    add("--patterns", nargs="*", default=list(PATTERNS), help="every one of the package's")
    add("--weights", nargs="*", type=Path, default=[], help="student.safetensors files; own patterns")
    add("--sizes", nargs="+", type=int, default=[256], help="sides in pixels")
    add("--captions", type=cli.count, default=CAPTIONS, help="seen ones, and as many unseen ones")
    add("--steps", type=cli.count, default=24)
    add("--dense-steps", type=int, default=0, help="steps of a run that are dense before the pattern begins")
    add("--guidance", type=cli.number, default=4.5)
    add("--batch", type=cli.count, default=50, help="samples at once at the model's own size; fewer at larger sizes")
    add("--seed", type=cli.seed, default=0)
    add("--backend", default="auto")
    add("--model", default="emoji", help="embedded model, or folder of a pipeline of its kind")
    add("--data", type=Path, default=Path("out/emoji-data"), help="folder of the pack")
    add("--encoder", type=Path, default=ENCODER, help="file of the judge")
    add("--device", type=cli.device, default="cpu")
    add("--dtype", help="float32 (the CPU's), bfloat16 (elsewhere), float16")
    add("--threads", type=cli.count, default=2)
    add("--seconds", type=cli.number, default=0.0, help="begin no row after so long; 0: no limit")
    add("--out", type=Path, default=Path("docs/results/emoji-quality.json"))
    add("--shared", action="store_true", help="others use the device too: leave out the times")
    add("--force", action="store_true", help="begin --out anew")
    add("--pictures", type=Path, help="folder for some of the samples")
    add("--twins", type=Path, help="folder that keeps the dense model's samples for the next process")


def report(figures: dict[str, Any]) -> None:
    """Prints a line for each row."""
    for key, found in figures["rows"].items():
        if "error" in found:
            print(f"{key:<64} {found['error']}")
        else:
            shares = "  ".join(f"{kind} {found[kind]['top1']:.0%}/{found[kind]['top5']:.0%}" for kind in KINDS)
            inside, whole = found["attention_seconds"], found["seconds"]
            times = "" if whole is None else f"  {whole:.3f} s, attention {inside:.3f} s"
            print(f"{key:<64} {shares}{times}")


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser)
    options = parser.parse_args(arguments)
    with cli.told("measure_emoji"), cli.only_writer(options.out):
        report(measure(options))


if __name__ == "__main__":
    main()
