"""`visattn tune`: the fastest schedule of patterns that holds a quality, or the best one at a speed."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from visattn.cli.generate_options import (
    DeviceOption,
    DtypeOption,
    GuidanceOption,
    LabelOption,
    PromptOption,
    SizeOption,
    StepsOption,
    parse_labels,
    pixels,
)
from visattn.cli.options import ForceOption, check_above, output_file, unused
from visattn.pipelines.asked import IMAGE, check_seeds, check_settings
from visattn.pipelines.embedded import EMBEDDED

if TYPE_CHECKING:
    from visattn.tuning.found import Found
    from visattn.tuning.goal import Goal
    from visattn.tuning.places import Only
    from visattn.tuning.plan import Plan
    from visattn.tuning.subject import Subject

# Below this many times the speed of dense attention a schedule is said to be slower; nearer to 1 is noise of two runs.
NOISE = 0.97


def tune(
    out: Annotated[Path, typer.Option(help="The schedule to write: .json; beside it a page .html.")],
    model: Annotated[
        str, typer.Option(help="Embedded model, folder in diffusers' format, or hub id; timm:NAME for a model of timm.")
    ] = "emoji",
    prompts: Annotated[
        Path | None,
        typer.Option(help="Text file with a prompt in each line; what is behind the first --seeds only verifies."),
    ] = None,
    prompt: PromptOption = None,
    label: LabelOption = None,
    pictures: Annotated[
        Path | None, typer.Option(help="Of a timm model: folder of images, with a subfolder a class for --accuracy.")
    ] = None,
    checkpoint: Annotated[Path | None, typer.Option(help="Of a timm model: weights, random without.")] = None,
    psnr: Annotated[
        float | None, typer.Option(help="Least PSNR to dense attention, in dB; of a timm model SNR of its outputs.")
    ] = None,
    accuracy: Annotated[
        float | None, typer.Option(help="Or, of a timm model: the most accuracy to lose, in points of a hundred.")
    ] = None,
    speedup: Annotated[float | None, typer.Option(help="Or: how many times faster attention has to be.")] = None,
    share: Annotated[float, typer.Option(help="Share of the samples that has to reach --psnr.")] = 0.95,
    margin: Annotated[float, typer.Option(help="By how many dB measured samples have to be better.")] = 0.5,
    candidates: Annotated[
        Path | None,
        typer.Option(
            help="Text file with a pattern in each line, instead of the list of the grid; PATTERN @ LAYER, LAYER "
            "for some layers alone."
        ),
    ] = None,
    stages: Annotated[
        int, typer.Option(help="Parts of the steps with own patterns, each as long as those before it.")
    ] = 4,
    seeds: Annotated[int, typer.Option(help="Samples whose quality is measured.")] = 8,
    held_out: Annotated[int, typer.Option(help="Samples with other seeds that verify the result.")] = 20,
    seed: Annotated[int, typer.Option(help="Seed of the first sample.")] = 0,
    minutes: Annotated[float, typer.Option(help="Begin no measurement after so long; 0 for no limit.")] = 0.0,
    steps: StepsOption = None,
    guidance: GuidanceOption = None,
    size: SizeOption = None,
    frames: Annotated[int | None, typer.Option(help="Frames of a video.", show_default="the model's own")] = None,
    batch: Annotated[int, typer.Option(help="Samples at once.")] = 4,
    device: DeviceOption = "auto",
    dtype: DtypeOption = None,
    journal: Annotated[
        Path | None, typer.Option(help="Measurements so far, for this and other goals.", show_default="OUT with .jsonl")
    ] = None,
    force: ForceOption = False,
) -> None:
    """Find which pattern each layer takes in which steps, for a quality or a speed; verified on samples held out."""
    _check(model, pictures, (psnr, speedup, accuracy), share, margin, minutes)
    if min(stages, seeds, held_out, batch) < 1:
        raise ValueError(f"--stages {stages}, --seeds {seeds}, --held-out {held_out}, --batch {batch}: at least 1 each")
    of_timm = pictures is not None
    check_seeds(seed, seeds + held_out)
    given = {"prompt": prompt, "prompts": prompts, "label": label, "steps": steps, "guidance": guidance}
    if of_timm:
        unused(
            f"for pipelines, and {model} is a model of timm", **given, frames=frames, dtype=dtype, stages=stages != 4
        )
    else:
        unused(f"for models of timm, and {model} is none", checkpoint=checkpoint)
    texts = () if of_timm else _texts(model, (prompt, prompts, label), steps, frames, guidance, pixels(size), dtype)
    output_file(out, (".json",), force)
    lines = journal or out.with_suffix(".jsonl")
    # One that is there goes on.
    output_file(lines, (lines.suffix.lower(),), True)
    if lines.resolve() in (out.resolve(), out.with_suffix(".html").resolve()):
        raise ValueError(f"--journal {journal} is what --out {out} writes: name another file")
    from visattn.environment import precisions_of
    from visattn.files import alone, written_whole
    from visattn.tuning.budget import fitted
    from visattn.tuning.candidates import candidates as of_grid
    from visattn.tuning.candidates import checked
    from visattn.tuning.found import tuned
    from visattn.tuning.goal import Goal
    from visattn.tuning.journal import Journal
    from visattn.tuning.measure import Measurer
    from visattn.tuning.page import page
    from visattn.tuning.places import read_lines
    from visattn.tuning.plan import Plan
    from visattn.tuning.search import Search

    listed, only = read_lines(_lines(candidates, "a pattern"))
    deadline = time.monotonic() + 60 * minutes if minutes else float("inf")
    if pictures is not None:
        seen = pictures, pixels(size), accuracy is not None
        subject, stages = _backbone(model, checkpoint, seen, batch, device, only), 1
    else:
        subject = _pipeline(model, device, dtype, (texts, steps, guidance, pixels(size), frames, batch), only)
    every = max(1, round(subject.steps / stages))
    chosen = checked(listed, subject.grid) if listed else of_grid(subject.grid, every, precisions_of(subject.device))
    plan = Plan(chosen, stages, seeds=seeds, quick=min(seeds, batch), seed=seed, steps=subject.steps)
    goal = Goal(psnr, speedup, accuracy, share, margin, held_out)
    about = subject.about() | {"candidates": chosen, "edges": plan.edges}
    about |= {"only": {name: sorted(some) for name, some in only.items()}} if only else {}
    with alone(lines), _goes_on(lines), _progress() as tell:
        kept = Journal(lines, about)
        measurer = Measurer(subject, plan, kept, deadline, tell)
        if minutes:
            plan = fitted(measurer, 60 * minutes, held_out)
            measurer = Measurer(subject, plan, kept, deadline, tell)
        found = Search(measurer, goal).run()
        made = tuned(measurer, goal, found)
    made.write(out)
    with written_whole(out.with_suffix(".html")) as temporary:
        temporary.write_text(page(made, found), encoding="utf-8")
    _say(out, goal, plan, found, dict(made.verified))
    if 0 < len(texts) <= plan.seeds:
        typer.echo(
            f"  the {len(texts)} prompts that were searched with are those of the held-out samples, others may have "
            f"less: with more than --seeds {plan.seeds} prompts others verify too"
        )


def _check(
    model: str,
    pictures: Path | None,
    goals: tuple[float | None, float | None, float | None],
    share: float,
    margin: float,
    minutes: float,
) -> None:
    """Refuse goals that do not go together or not with the model; `goals` are PSNR, speedup and accuracy."""
    psnr, speedup, accuracy = goals
    if sum(each is not None for each in (psnr, speedup, accuracy)) != 1:
        given = {"--psnr": psnr, "--speedup": speedup, "--accuracy": accuracy}
        told = " and ".join(f"{name} {value:g}" for name, value in given.items() if value is not None)
        raise ValueError(f"{told or 'no goal'}: pass either --psnr or --speedup, or --accuracy of a timm model")
    of_timm = model.startswith("timm:")
    if of_timm != (pictures is not None) or (accuracy is not None and not of_timm):
        raise ValueError(
            f"--pictures and --accuracy are for a timm model, like timm:vit_small_patch14_dinov2: {model} is "
            f"{'one, pass --pictures' if of_timm else 'none'}"
        )
    if psnr is not None:
        check_above("--psnr", psnr, 0, finite=True)
    if speedup is not None:
        check_above("--speedup", speedup, 1, finite=True)
    if accuracy is not None and not 0 <= accuracy < 100:
        raise ValueError(f"--accuracy {accuracy:g} must be from 0 to below 100: points of a hundred that may be lost")
    if not 0 <= margin < float("inf"):
        raise ValueError(f"--margin {margin:g} must be 0 or more: by how many dB measured samples have to be better")
    if not 0 < share <= 1:
        raise ValueError(f"--share {share:g} must be above 0 and at most 1: a part of the samples")
    if not minutes >= 0:
        raise ValueError(f"--minutes {minutes:g} must be above 0, or 0 for no limit")


def _texts(
    model: str,
    content: tuple[list[str] | None, Path | None, str | None],
    steps: int | None,
    frames: int | None,
    guidance: float | None,
    size: tuple[int, int] | None,
    dtype: str | None,
) -> tuple[Any, ...]:
    """What is drawn, prompts or labels: all that can be checked of a pipeline that is not loaded is checked."""
    prompt, prompts, label = content
    texts, labels = (*(prompt or ()), *_lines(prompts, "a prompt")), parse_labels(label)
    if texts and labels:
        raise ValueError("--label and prompts: a model takes one of them, leave the other out")
    if not texts and not labels:
        raise ValueError("pass --prompts FILE or --prompt TEXT, or --label for a model of classes")
    known, counts = EMBEDDED.get(model), {"--steps": steps, "--frames": frames}
    check_settings(model, dtype, counts, prompts=texts, labels=labels, guidance=guidance, size=size)
    if known is not None and known.kind == IMAGE:
        unused(f"for videos, and {model} makes images", frames=frames)
    return texts or labels


@contextmanager
def _goes_on(journal: Path) -> Iterator[None]:
    """Says after Ctrl-C that nothing is lost."""
    try:
        yield
    except KeyboardInterrupt:
        typer.echo(f"stopped: the same command goes on behind the last line of {journal}", err=True)
        raise


def _pipeline(model: str, device: str, dtype: str | None, samples: tuple[Any, ...], only: Only) -> Subject:
    from visattn.cli.loading import loaded_pipeline
    from visattn.pipelines.tuning.subject import PipelineSubject, Samples

    pipe = loaded_pipeline(model, device, dtype, bars=False)
    return PipelineSubject(pipe, Samples(*samples), model, only=only)


def _backbone(
    model: str,
    checkpoint: Path | None,
    seen: tuple[Path, tuple[int, int] | None, bool],
    batch: int,
    device: str,
    only: Only,
) -> Subject:
    """A model of timm, and what it sees: a folder of pictures, their size, and whether they need labels."""
    pictures, size, labelled = seen
    from visattn.environment import chosen_device
    from visattn.models.load import create_with_weights
    from visattn.models.tuning.pictures import Pictures
    from visattn.models.tuning.subject import BackboneSubject

    side = None if size is None else size[0]
    net = create_with_weights(model.removeprefix("timm:"), checkpoint, False, side, None).to(chosen_device(device))
    found = Pictures.of_folder(pictures, net, side)
    if labelled and found.labels is None:
        raise ValueError(f"--accuracy needs classes: give {pictures} a subfolder with the images of each")
    return BackboneSubject(net, found, model, batch, only)


def _lines(path: Path | None, what: str) -> tuple[str, ...]:
    """The lines of a text file that are not empty."""
    from visattn.files import read_text

    if path is None:
        return ()
    if not path.is_file():
        raise ValueError(f"{path} does not exist: pass a text file with {what} in each line")
    found = tuple(line.strip() for line in read_text(path).splitlines() if line.strip())
    if not found:
        raise ValueError(f"{path} is empty: write {what} in each line")
    return found


@contextmanager
def _progress() -> Iterator[Any]:
    """A bar for each part of a search, on stderr."""
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True)) as bars:
        known: dict[str, Any] = {}

        def tell(what: str, done: int, of: int) -> None:
            if what not in known:
                known[what] = bars.add_task(what, total=of)
            bars.update(known[what], completed=done, total=of)

        yield tell


def _say(out: Path, goal: Goal, plan: Plan, found: Found, figures: dict[str, Any]) -> None:
    """What was found, in words."""
    from visattn.timing import gain

    faster = figures["attention_seconds_dense"] / max(figures["attention_seconds"], 1e-12)
    whole = figures["seconds_dense"] / max(figures["seconds"], 1e-12)
    typer.echo(f"{out}: attention is {gain(faster)} than dense, a whole sample {gain(whole)}")
    if faster < NOISE and not found.missed:
        typer.echo(
            "! the schedule takes longer than dense attention on the samples held out: with so few tokens there may be "
            "nothing to win, and on a busy machine times are wrong"
        )
    for name in ("psnr", "snr"):
        if figures.get(f"{name}_mean") is not None:
            typer.echo(
                f"  {figures['samples']} held-out samples: {name.upper()} to dense {figures[f'{name}_mean']:.1f} dB in "
                f"the mean, {figures[f'{name}_worst']:.1f} dB at worst"
            )
    if "accuracy_lost" in figures:
        typer.echo(f"  accuracy {figures['accuracy_dense']:.1%} dense, {figures['accuracy_lost']:+.2f} points lost")
    ranks = {name: "unknown" if rank is None else f"{rank:.2f}" for name, rank in found.ranks.items()}
    typer.echo(f"  predictions: rank correlation {', '.join(f'{rank} with {name}' for name, rank in ranks.items())}")
    if not found.complete:
        typer.echo("  --minutes were over: the same command with more goes on from here (with --force)")
    if not found.held:
        typer.echo(f"  on the samples held out it is not true that the schedule {goal}")
        typer.echo(f"  more than --seeds {plan.seeds}, or a larger --margin, are needed")
    if found.missed:
        typer.echo(f"  {found.missed}")
