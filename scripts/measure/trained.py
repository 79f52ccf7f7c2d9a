"""Trains methods of sparse attention at several sparsities, and measures their pictures or clips before and after.

    python -m scripts.measure.trained emoji --data out/emoji-data --runs runs/trained --device cuda --seconds 150
    python -m scripts.measure.trained animoji --data out/animoji-data --runs runs/trained-clips --device cuda

With --chain the students of a method are trained one after the other, least sparse first, each from the one before it.

Every student learns for --seconds by the recipe of its method (scripts.distill.methods) from samples that the dense
model draws for captions of its training that are not measured. Then scripts.measure.emoji or scripts.measure.animoji
measures the dense model and each pattern with the model's own weights and with the student's. Everything goes into one
JSON file: rows, seconds and steps of each training, and its curve. Stop it at any time, or with --budget: what is there
is neither trained nor measured again. With --pictures also drawn are sheets of dense, untrained and trained pictures by
sparsity, and a chart of the training curves.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerFast

from scripts import cli
from scripts.distill.emoji_students import draw, prompts
from scripts.distill.methods import METHODS, settings_of
from scripts.distill.process import train_student
from scripts.measure import animoji, emoji
from scripts.measure.draftsman import DENSE, Draftsman, Student
from scripts.measure.emoji_encoder_model import ENCODER, check_tokens, load_encoder
from scripts.measure.trained_pictures import draw_curves, draw_sheet
from scripts.train import animoji_data, emoji_data
from scripts.train.emoji_captions import shipped_tokenizer
from visattn.files import write_json

START = 90  # seconds beside its steps after which a training is asked to stop
POINTS = 24  # of a curve: means, as a batch's distance says more about its noise
ROW_SECONDS = 20.0  # of the budget, which the row that has begun may take


@dataclass(frozen=True)
class Kind:
    """What is drawn.

    Attributes:
        judge: Makes its judge.
        drawn_by: Draws.
        captions: Captions to draw for, of a folder of the pack and their number.
        tokenizer: That of the pack, of its folder.
        size: Side in pixels.
        cached: Samples that are learned from.
        chunk: Samples drawn at once.
        batch: Rows of a step.
    """

    judge: Callable[..., Any]
    drawn_by: type[Draftsman]
    captions: Callable[[Path, int], list[str]]
    tokenizer: Callable[[Path], PreTrainedTokenizerFast]
    size: int
    cached: int
    chunk: int
    batch: int


KINDS = {
    "emoji": Kind(
        emoji.judge_of,
        Draftsman,
        lambda data, n: prompts(emoji_data.load_pack(data, side=0), n),
        emoji_data.load_tokenizer,
        256,
        400,
        50,
        8,
    ),
    "animoji": Kind(
        animoji.judge_of,
        animoji.ClipDraftsman,
        lambda data, n: prompts(animoji_data.load_pack(data, clips=False), n),
        lambda data: shipped_tokenizer(),
        animoji_data.SIDE,
        400,
        50,
        8,
    ),
}


def name_of(method: str, sparsity: float) -> str:
    """Of a student, and of its folder."""
    return f"{method}-{round(100 * sparsity, 1):g}"


def train(options: argparse.Namespace, start: float) -> dict[str, Any]:
    """Trains the students that are missing, while the budget lasts; what their logs say, by name."""
    kind = KINDS[options.kind]
    captions = kind.captions(options.data, options.cached or kind.cached)
    # What measures has to fit before anything learns.
    check_tokens(load_encoder(options.encoder or ENCODER)[1], kind.tokenizer(options.data))
    students = itertools.product(options.methods, options.sparsities)
    if not _is_late(options, start) and any(not _is_trained(options.runs / name_of(*each)) for each in students):
        words = ["--model", options.model, "--steps", str(options.draw_steps), "--size", str(options.size)]
        draw(captions, options.runs, [*words, "--batch", str(options.chunk or kind.chunk)], options.device == "cpu")
    alone = [[(method, sparsity)] for sparsity in options.sparsities for method in options.methods]
    chains = [[(method, each) for each in sorted(options.sparsities)] for method in options.methods]
    found = {}
    with ThreadPoolExecutor(options.jobs) as pool:
        for trained in pool.map(
            lambda students: _train_chain(students, options, start), chains if options.chain else alone
        ):
            for name, told in trained.items():
                print(json.dumps({name: {key: value for key, value in told.items() if key != "curve"}}), flush=True)
            found |= trained
    return found


def _train_chain(
    students: Sequence[tuple[str, float]], options: argparse.Namespace, start: float
) -> dict[str, dict[str, Any]]:
    """Trains students, each from the one before it; what their logs say, or why there is none, by name."""
    found: dict[str, dict[str, Any]] = {}
    before = None
    for method, sparsity in students:
        name, problem = name_of(method, sparsity), _train(method, sparsity, before, options, start)
        if problem:
            found[name] = {"error": problem.splitlines()[0]}
        else:
            found[name] = _told(options.runs / name, method, sparsity)
            before = sparsity
    return found


def _train(method: str, sparsity: float, before: float | None, options: argparse.Namespace, start: float) -> str:
    """Trains a student in a process of its own; returns why there is none, or nothing.

    Args:
        method: Name of the method.
        sparsity: Share of the blocks that are not listed in the end.
        before: That of the student that it starts from, None for the model's own weights.
        options: Of the command line.
        start: When the budget began.
    """
    folder, kind = options.runs / name_of(method, sparsity), KINDS[options.kind]
    if _is_trained(folder):
        return ""
    if _is_late(options, start):
        return "not trained: the budget is over"
    words = ["--model", options.model, "--method", method, "--sparsity", str(sparsity), "--backend", options.backend]
    words += ["--samples", str(options.runs / "samples"), "--batch", str(options.batch or kind.batch)]
    words += ["--steps", str(options.train_steps), "--seconds", str(options.seconds), "--lr", str(options.lr)]
    words += ["--guidance", str(options.guidance), "--optimizer", options.optimizer]
    words += ["--train", options.train] + ["--graphs"] * (options.device != "cpu")
    words += ["--ema", "0.99", "--save-every", "1000000", "--warmup", "20", "--threads", str(options.threads)]
    words += ["--precision", "no" if options.device == "cpu" else "bf16"] + ["--cpu"] * (options.device == "cpu")
    if options.chain:
        # Lists shrink from run to run.
        words += ["--pattern", METHODS[method].final(sparsity)]
    if before is not None:
        words += ["--weights", str(options.runs / name_of(method, before) / "student.safetensors"), "--stages", "all"]
    try:
        seconds = train_student([*words, *options.also], folder, options.seconds + START if options.seconds else 0)
    except RuntimeError as error:
        return str(error)
    about = {"seconds": round(seconds, 1), "device": emoji.device_name(options.device)}
    about |= {} if before is None else {"after": name_of(method, before)}
    write_json(folder / "seconds.json", about, indent=None)
    return ""


def _is_trained(folder: Path) -> bool:
    return (folder / "seconds.json").is_file()


def _is_late(options: argparse.Namespace, start: float) -> bool:
    """Whether the budget ends before a training that begins now."""
    return bool(options.budget) and time.monotonic() - start + options.seconds > options.budget


def _told(folder: Path, method: str, sparsity: float) -> dict[str, Any]:
    """What a trained student's files say."""
    log = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    found = {"method": method, "sparsity": sparsity, "pattern": METHODS[method].final(sparsity)}
    found |= {"steps": log[-1]["step"], "megabytes": round((folder / "student.safetensors").stat().st_size / 1e6, 3)}
    found |= json.loads((folder / "seconds.json").read_text())
    found["options"] = METHODS[method].options
    # Of the last stage: earlier ones have other losses.
    last = [(line["step"], line["output"]) for line in log if "output" in line]
    every = max(1, len(last) // POINTS)
    groups = [last[first : first + every] for first in range(0, len(last), every)]
    return found | {"curve": [[some[-1][0], statistics.fmean(value for _, value in some)] for some in groups]}


def measure(options: argparse.Namespace, trained: dict[str, Any], start: float) -> dict[str, Any]:
    """Measures dense attention, and every student's pattern without and with its weights, while the budget lasts."""
    kind, ready = KINDS[options.kind], {name: each for name, each in trained.items() if "error" not in each}
    parser = argparse.ArgumentParser()
    emoji.add_options(parser)
    left = max(1.0, options.budget - (time.monotonic() - start) - ROW_SECONDS) if options.budget else 0.0
    words = ["--patterns", DENSE]
    words += ["--sizes", str(options.size), "--captions", str(options.captions), "--steps", str(options.steps)]
    words += ["--model", options.model, "--data", str(options.data), "--device", options.device]
    words += ["--threads", str(options.threads), "--out", str(options.out), "--seconds", str(left)]
    words += ["--backend", options.backend, "--batch", str(options.draw_batch), "--guidance", str(options.guidance)]
    words += ["--shared"] * options.shared + ["--force"] * options.force
    words += ["--pictures", str(options.pictures)] if options.pictures else []
    words += ["--encoder", str(options.encoder)] if options.encoder else []
    given = parser.parse_args(words)
    # A line of the table needs both rows of a student: whole lines first, where the budget does not reach to the end.
    students: list[Student] = []
    for name, each in ready.items():
        students += [Student(each["pattern"]), Student(each["pattern"], options.runs / name / "student.safetensors")]

    def also(draftsman: Draftsman, figures: dict[str, Any]) -> list[Student]:
        # Written with the first row: whoever is interrupted has it.
        figures |= {"trained": joined(figures, trained, options), "kind": options.kind}
        return list(dict.fromkeys(students))

    figures = emoji.measure(given, kind.judge, kind.drawn_by, also)
    return figures | {"trained": joined(figures, trained, options)}


def joined(figures: dict[str, Any], trained: dict[str, Any], options: argparse.Namespace) -> dict[str, Any]:
    """What is known of students and what was told now, by name; each says what the measured row is of.

    A reason why one was not trained again takes nothing away, nor does a student that has no row yet, where the one
    before it has.
    """
    known: dict[str, Any] = figures.get("trained", {})
    found = dict(known)
    for name, each in trained.items():
        if "error" in each:
            found[name] = known.get(name, each)
            continue
        student = Student(each["pattern"], options.runs / name / "student.safetensors")
        row = figures["rows"].get(student.key(options.size), {})
        if row.get("weights_hash", student.hash) == student.hash:
            found[name] = each
    return found


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Trains, measures, draws; returns everything, which is in --out too."""
    start = time.monotonic()
    for method in options.methods:
        for sparsity in options.sparsities:
            settings_of(method, sparsity)
    trained = train(options, start)
    figures = measure(options, trained, start)
    emoji.write(figures, options.out)
    emoji.report(figures)
    if options.pictures:
        draw_curves(options.pictures / "curves.svg", figures["trained"])
        draw_sheet(options.pictures, figures, options.size)
    return figures


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("kind", choices=list(KINDS), help="emoji: pictures of 64x64 tokens, animoji: clips of 16x16x16")
    add("--methods", nargs="+", default=list(METHODS), help=f"of {', '.join(METHODS)}")
    add("--sparsities", nargs="+", type=cli.number, default=[0.9, 0.95, 0.97], help="shares that are not listed")
    add("--chain", action="store_true", help="each sparsity starts from its method's student of the next lower one")
    add("--seconds", type=cli.number, default=150.0, help="of steps of each training; 0: --train-steps alone end it")
    add("--train-steps", type=cli.count, default=100_000, help="optimizer steps at most")
    add("--lr", type=cli.number, default=1e-3, help="learning rate; 0: the optimizer's own")
    add("--optimizer", default="muon", choices=("adamw", "prodigy", "muon"), help="whose steps a training takes")
    add("--batch", type=int, default=0, help="rows of a step, two for each sample under guidance; 0: the model's own")
    add(
        "--guidance",
        type=float,
        default=4.5,
        help="of what is drawn; students learn what it makes of their predictions",
    )
    add("--train", default="q,k,v,out", help="what learns: some of q,k,v,out, or none, or all")
    add("--also", nargs=argparse.REMAINDER, default=[], help="further options of scripts.distill.pipeline, last of all")
    add("--jobs", type=cli.count, default=1, help="students trained at the same time")
    add(
        "--budget", type=cli.number, default=0.0, help="begin nothing that would end after so many seconds; 0: no limit"
    )
    add("--cached", type=int, default=0, help="samples that are learned from; 0: the model's own number")
    add("--draw-steps", type=cli.count, default=16, help="denoising steps of a sample")
    add("--chunk", type=int, default=0, help="samples drawn at once; 0: the model's own number")
    add("--runs", type=Path, default=None, help="folder for samples and students; runs/trained-KIND")
    add("--model", help="teacher: the embedded model, or a folder of one of its kind")
    add("--data", type=Path, help="folder of the pack")
    add("--size", type=int, default=0, help="side in pixels; 0: the model's own")
    add("--captions", type=cli.count, default=100, help="seen ones, and as many unseen ones")
    add("--steps", type=cli.count, default=24, help="denoising steps of what is measured")
    add("--draw-batch", type=cli.count, default=50, help="samples measured at once")
    add("--encoder", type=Path, help="file of the judge")
    add("--backend", default="auto")
    add("--device", type=cli.device, default="cpu")
    add("--threads", type=cli.count, default=2)
    add("--shared", action="store_true", help="others use the device too: leave out the times")
    add("--force", action="store_true", help="begin the measurements of --out anew")
    add("--out", type=Path, default=None, help="docs/results/trained-KIND.json")
    add("--pictures", type=Path, help="folder for some of the samples, the sheet and the curves")
    options = parser.parse_args(arguments)
    options.model = options.model or options.kind
    options.data = options.data or Path(f"out/{options.kind}-data")
    options.runs = options.runs or Path(f"runs/trained-{options.kind}")
    options.out = options.out or Path(f"docs/results/trained-{options.kind}.json")
    options.size = options.size or KINDS[options.kind].size
    with cli.told("measure_trained"), cli.only_run(options.runs), cli.only_writer(options.out):
        run(options)


if __name__ == "__main__":
    main()
