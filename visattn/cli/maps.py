"""`visattn maps`: what the heads of a model look at, and which patterns they bear."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from visattn.cli.generate_options import (
    DeviceOption,
    DtypeOption,
    GuidanceOption,
    LabelOption,
    PromptOption,
    SeedOption,
    SizeOption,
    StepsOption,
    parse_labels,
    pixels,
)
from visattn.cli.options import ForceOption, JsonOption, position, print_json

if TYPE_CHECKING:
    from visattn.cli.maps_models import Subject
    from visattn.maps.shown import Shown
    from visattn.recorded import Recorded

IMPORTANCE = ("gradient", "pruning", "none")


def maps(
    model: Annotated[
        str,
        typer.Argument(
            help="timm:NAME, a folder or repository of transformers or diffusers, an embedded model, or a file of "
            "`visattn record`."
        ),
    ],
    images: Annotated[list[Path] | None, typer.Argument(help="Image files, for models of images.")] = None,
    out: Annotated[Path, typer.Option(help="Folder for maps.html, its pictures and numbers: new, or empty.")] = Path(
        "maps"
    ),
    pattern: Annotated[
        list[str] | None, typer.Option(help="Candidates, several times for several; rows are shown under the first.")
    ] = None,
    layers: Annotated[str | None, typer.Option(help="Which layers, like 0-11 or a name; all.")] = None,
    query: Annotated[
        str | None, typer.Option(help="Whose row is shown: cls, or a position on the grid like 12,40; the middle.")
    ] = None,
    mass: Annotated[float, typer.Option(help="Share of dense attention that a head keeps to bear a pattern.")] = 0.9,
    importance: Annotated[
        str, typer.Option(help="Of heads: gradient (one backward), pruning (a forward a head) or none.")
    ] = "gradient",
    step: Annotated[int, typer.Option(help="Of a pipeline: denoising step that is looked at, from 0.")] = 0,
    prompt: PromptOption = None,
    label: LabelOption = None,
    seed: SeedOption = 0,
    steps: StepsOption = None,
    guidance: GuidanceOption = None,
    size: SizeOption = None,
    frames: Annotated[int | None, typer.Option(help="Frames of a video; the model's own.")] = None,
    checkpoint: Annotated[Path | None, typer.Option(help="Of a timm model: weights, random without.")] = None,
    pretrained: Annotated[bool, typer.Option("--pretrained", help="Download weights of an image model.")] = False,
    device: DeviceOption = "cpu",
    dtype: DtypeOption = None,
    force: ForceOption = False,
    json: JsonOption = False,
) -> None:
    """Show what every head looks at: locality, entropy, mass that patterns keep, rows, rollout and importance."""
    if importance not in IMPORTANCE:
        raise ValueError(f"--importance {importance!r} must be one of {', '.join(IMPORTANCE)}")
    if not 0 < mass <= 1:
        raise ValueError(f"--mass {mass} must be above 0 and at most 1")
    at: Any = query if query == "cls" else position(query)
    _check_folder(out, force)
    import visattn

    for each in pattern or ():
        visattn.parse(each)
    settings = {"prompts": tuple(prompt or ()), "labels": parse_labels(label), "seed": seed, "steps": steps}
    settings |= {"guidance": guidance, "size": pixels(size), "frames": frames}
    chosen = {"pattern": tuple(pattern or ()), "layers": layers, "query": at, "mass": mass, "importance": importance}
    if Path(model).suffix == ".safetensors" and not images:
        shown = _of_file(Path(model), step, chosen)
    else:
        subject = _subject(model, images or [], settings, step, checkpoint, pretrained, device, dtype)
        shown = _of_model(subject, chosen)
    out.mkdir(parents=True, exist_ok=True)
    from visattn.maps.written import write

    made = write(out, shown)
    if json:
        print_json({"folder": str(out), "files": [path.name for path in made]} | shown.overview.to_dict())
        return
    _say(out, shown)


def _check_folder(out: Path, force: bool) -> None:
    if out.exists() and not out.is_dir():
        raise ValueError(f"--out {out} is a file: give a folder")
    if out.is_dir() and any(out.iterdir()) and not force:
        raise ValueError(f"--out {out} has files in it: give an empty folder, or --force to write among them")


def _subject(
    model: str,
    images: list[Path],
    settings: dict[str, Any],
    step: int,
    checkpoint: Path | None,
    pretrained: bool,
    device: str,
    dtype: str | None,
) -> Subject:
    from visattn.cli.maps_models import TIMM, of_pipeline, of_timm, of_transformers
    from visattn.clients.transformers.load import is_of_transformers
    from visattn.environment import check_device

    check_device(device)
    side = None if settings["size"] is None else settings["size"][0]
    if not images:
        if model.startswith(TIMM) or (Path(model) / "config.json").is_file():
            raise ValueError(f"{model} looks at images: give some files behind its name")
        if checkpoint is not None or pretrained:
            raise ValueError(f"--checkpoint and --pretrained are for models of images, and {model} got none")
        return of_pipeline(model, device, dtype, settings, step)
    if dtype not in (None, "float32") or step or settings["prompts"] or settings["labels"]:
        raise ValueError("--dtype, --step, --prompt and --label are for pipelines, which take no image files")
    if is_of_transformers(model):
        return of_transformers(model, images, pretrained, side, device)
    return of_timm(model.removeprefix(TIMM), images, checkpoint, pretrained, side, device)


def _of_file(path: Path, step: int, chosen: dict[str, Any]) -> Shown:
    """A file of recorded calls: one step of it."""
    from visattn.recorded import load_recorded
    from visattn.schedule import selectors_of
    from visattn.selectors import SiteName, pick

    calls, about = load_recorded(path)
    known = sorted({call.step for call in calls if call.step is not None})
    here = [call for call in calls if call.call == 0 and call.step in (step, None)]
    if not here:
        raise ValueError(f"{path} has no step {step}: pass --step {' or '.join(map(str, known))}")
    if chosen["layers"] is not None:
        names = [SiteName(call.site, call.site) for call in here]
        wanted = pick(selectors_of(chosen["layers"]), names, [name.layer for name in names], str(path))
        here = [call for i, call in enumerate(here) if i in wanted]
    said = f"{about.get('model', path.name)}, step {step} of recorded calls"
    return _shown(f"Attention of {about.get('model', path.name)}", said, here, chosen, {}, "", None)


def _of_model(subject: Subject, chosen: dict[str, Any]) -> Shown:
    from visattn import maps

    options = {"layers": chosen["layers"]}
    calls = maps.calls(subject.model, subject.forward, **options)
    found: dict[str, Any] = {}
    pruned: dict[str, maps.Pruned] = {}
    words = ""
    if chosen["importance"] == "gradient":
        found = maps.gradient(subject.model, subject.forward, classes=subject.classes, **options)
        words = "how the logarithm of the predicted class' probability" if subject.classes else "how far the output"
        words += " moves with a gate on the head, to first order"
    elif chosen["importance"] == "pruning":
        pruned = maps.pruning(subject.model, subject.forward, classes=subject.classes, **options)
        found = {site: each.change if each.divergence is None else each.divergence for site, each in pruned.items()}
        words = "relative change of the output" if not subject.classes else "divergence of the class probabilities"
        words += " when the head is zeroed"
    name = type(subject.model).__name__
    shown = _shown(f"Attention of {name}", subject.about, calls, chosen, found, words, subject)
    return replace(shown, pruned={site: each.to_dict() for site, each in pruned.items()})


def _shown(
    title: str,
    about: str,
    calls: list[Recorded],
    chosen: dict[str, Any],
    importance: dict[str, Any],
    words: str,
    subject: Subject | None,
) -> Shown:
    from visattn import maps
    from visattn.maps.heat import plane
    from visattn.maps.look import default_patterns, details, query_token, rolled_out
    from visattn.maps.shown import Shown

    grids = [call.layout.grid for call in calls]
    largest = max(grids, key=lambda grid: (len(grid), grid))
    query, sample = chosen["query"], 0 if subject is None else subject.sample
    # Before anything is computed.
    token = query_token(query, calls[grids.index(largest)].layout, largest)
    patterns = chosen["pattern"] or default_patterns(largest)
    found = maps.overview(calls, patterns, importance=importance)
    rows_of = chosen["pattern"][0] if chosen["pattern"] else None
    of_class = query == "cls" or (query is None and subject is not None and subject.images is not None)
    whose = "the class token" if query == "cls" else f"query {','.join(map(str, query or [n // 2 for n in largest]))}"
    try:
        rolled: Any = plane(rolled_out(calls, None if of_class else token, sample), largest)
        first = "the class token" if calls[0].layout.prefix else "the mean token"
        said = f"rollout of {first if of_class else whose} through {len(calls)} modules"
    except ValueError as error:
        rolled, said = None, f"No rollout: {error}"
    return Shown(
        title,
        about,
        found,
        details(calls, query, rows_of, sample),
        whose,
        rows_of or "",
        chosen["mass"],
        words,
        None if subject is None else (subject.picture, subject.name),
        (rolled, said),
        _scores(subject, calls),
    )


def _scores(subject: Subject | None, calls: list[Recorded]) -> list[str]:
    """How well rollout shows what a classifier needs."""
    from visattn.maps.look import rolled_out, scored

    if subject is None or subject.scores is None or len({call.layout for call in calls}) > 1:
        return []
    import torch

    layout = calls[0].layout
    if layout.dims != 2:
        return []
    maps = torch.stack([rolled_out(calls, None, i) for i in range(subject.images.shape[0])])
    grid: Any = layout.grid
    return [
        f"Rollout as a saliency map, its largest {each['share']:.0%}: average drop {each['average_drop']:.1%}, "
        f"more confident in {each['confidence_gain']:.0%} of the images."
        for each in scored(subject.scores, subject.images, maps, grid)
    ]


def _say(out: Path, shown: Shown) -> None:
    overview = shown.overview
    heads = sum(site.heads for site in overview.sites)
    typer.echo(f"{out / 'maps.html'}: {len(overview.sites)} modules, {heads} heads")
    table = overview.table(shown.mass)
    for name, density in {**overview.patterns, "dense": 1.0}.items():
        count = sum(each == name for heads_of in table.values() for each in heads_of)
        if count:
            typer.echo(f"  {count:>4} heads bear {name} at most ({density:.1%} of all pairs)")
    typer.echo(f"  {out / 'schedule.json'} for apply and generate --pattern, {out / 'candidates.txt'} for tune")
