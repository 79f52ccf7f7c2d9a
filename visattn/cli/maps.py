"""`visattn maps`: what the heads of a model look at, and which patterns they bear."""

from __future__ import annotations

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
from visattn.cli.options import ForceOption, JsonOption, position, print_json, unused
from visattn.files import output_folder

if TYPE_CHECKING:
    from visattn.cli.maps_models import Subject
    from visattn.maps.shown import Shown

IMPORTANCE = ("gradient", "pruning", "none")
# The globs of what maps/written.py writes.
WRITTEN = (
    *("maps.html", "maps.json", "schedule.json", "candidates.txt", "heads.png", "caught.png", "similarity.png"),
    *("rollout.png", "rows-???.png", "read-???.png", "offsets-???.png"),
)


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
    layers: Annotated[str | None, typer.Option(help="Which layers, like 0-11 or a name.", show_default="all")] = None,
    query: Annotated[
        str | None,
        typer.Option(help="Whose row is shown: cls, or a position on the grid like 12,40.", show_default="the middle"),
    ] = None,
    mass: Annotated[float, typer.Option(help="What is caught of a head that bears a pattern, a share.")] = 0.9,
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
    frames: Annotated[int | None, typer.Option(help="Frames of a video.", show_default="the model's own")] = None,
    checkpoint: Annotated[Path | None, typer.Option(help="Of a timm model: weights, random without.")] = None,
    pretrained: Annotated[bool, typer.Option("--pretrained", help="Download weights of an image model.")] = False,
    device: DeviceOption = "auto",
    dtype: DtypeOption = None,
    force: ForceOption = False,
    json: JsonOption = False,
) -> None:
    """Show what every head looks at: locality, entropy, what patterns catch, rows, rollout and importance."""
    if importance not in IMPORTANCE:
        raise ValueError(f"--importance {importance!r} must be one of {', '.join(IMPORTANCE)}")
    if not 0 < mass <= 1:
        raise ValueError(f"--mass {mass} must be above 0 and at most 1")
    if step < 0 or (steps is not None and step >= steps):
        last = "the last" if steps is None else str(steps - 1)
        raise ValueError(f"--step {step} must be from 0 to {last}")
    at: Any = query if query == "cls" else position(query)
    _check_patterns(pattern or [])
    settings = {"prompts": tuple(prompt or ()), "labels": parse_labels(label), "seed": seed, "steps": steps}
    settings |= {"guidance": guidance, "size": pixels(size), "frames": frames}
    chosen = {"pattern": tuple(pattern or ()), "layers": layers, "query": at, "mass": mass, "importance": importance}
    from visattn.cli.maps_shown import of_file, of_model

    recorded = Path(model).suffix == ".safetensors" and not images
    if recorded:
        unused(
            "for models that run, and a file of recorded calls is only read",
            **{"prompt": prompt, "label": label, "seed": seed, "steps": steps, "guidance": guidance, "size": size},
            **{"frames": frames, "checkpoint": checkpoint, "pretrained": pretrained, "dtype": dtype},
        )
    with output_folder(out, force, WRITTEN) as folder:
        if recorded:
            shown = of_file(Path(model), step, chosen)
        else:
            subject = _subject(model, images or [], settings, step, checkpoint, pretrained, device, dtype)
            shown = of_model(subject, chosen, lambda what: None if json else typer.echo(what, err=True))
        from visattn.maps.written import write

        made = [path.name for path in write(folder, shown)]
    if json:
        print_json({"folder": str(out), "files": made} | shown.overview.to_dict())
        return
    _say(out, shown)


def _check_patterns(texts: list[str]) -> None:
    """Raise a ValueError for what is no pattern, or one that catches nothing on any grid, before a model is loaded."""
    from visattn.maps.measures import check_selecting
    from visattn.patterns import parse

    for each in texts:
        check_selecting(parse(each))


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
    from visattn.environment import chosen_device

    device = chosen_device(device)
    side = None if settings["size"] is None else settings["size"][0]
    if not images:
        if model.startswith(TIMM) or (Path(model) / "config.json").is_file():
            raise ValueError(f"{model} looks at images: give some files behind its name")
        if checkpoint is not None or pretrained:
            raise ValueError(
                f"--checkpoint and --pretrained are for models of images, and {model} got none: leave them out"
            )
        return of_pipeline(model, device, dtype, settings, step)
    unused(
        "for pipelines, which take no image files",
        **{"dtype": dtype not in (None, "float32"), "step": step, "prompt": settings["prompts"]},
        **{"label": settings["labels"], **{name: settings[name] for name in ("seed", "steps", "guidance", "frames")}},
    )
    if settings["size"] is not None and len(set(settings["size"])) > 1:
        raise ValueError(f"--size {'x'.join(map(str, settings['size']))}: models of images take squares: give one side")
    if checkpoint is not None and pretrained:
        raise ValueError("--checkpoint and --pretrained both give weights: pass one of them")
    if is_of_transformers(model):
        unused(f"for models of timm, and {model} of transformers has its weights", checkpoint=checkpoint)
        return of_transformers(model, images, pretrained, side, device)
    return of_timm(model.removeprefix(TIMM), images, checkpoint, pretrained, side, device)


def _say(out: Path, shown: Shown) -> None:
    overview = shown.overview
    heads = sum(site.heads for site in overview.sites)
    typer.echo(f"{out / 'maps.html'}: {len(overview.sites)} modules, {heads} heads")
    table = overview.table(shown.mass)
    for name, density in {**overview.patterns, "dense": 1.0}.items():
        count = sum(each == name for heads_of in table.values() for each in heads_of)
        if count:
            heads_bear = "head bears" if count == 1 else "heads bear"
            typer.echo(f"  {count:>4} {heads_bear} {name} and nothing sparser ({density:.1%} of all pairs)")
    typer.echo(f"  {out / 'schedule.json'} for apply and generate --pattern, {out / 'candidates.txt'} for tune")
