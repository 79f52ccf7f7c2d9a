"""`visattn generate`: images and videos from a diffusion model with a pattern, and the dense twin to compare with."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Annotated, Any

import typer

from visattn.cli.generate_options import (
    BackendOption,
    CompareOption,
    CountOption,
    DenseLastStepsOption,
    DenseLayersOption,
    DenseStepsOption,
    DeviceOption,
    DtypeOption,
    GuidanceOption,
    LabelOption,
    LayersOption,
    OutOption,
    ParallelOption,
    PatternOption,
    PreciseLastStepsOption,
    PreciseLayersOption,
    PreciseStepsOption,
    PrecisionOption,
    PromptOption,
    RepeatsOption,
    SeedOption,
    SizeOption,
    StepsOption,
    WeightsOption,
    parse_labels,
    parse_steps,
    pixels,
)
from visattn.cli.loading import is_watched, loaded_pipeline, no_loading_bars
from visattn.cli.options import ForceOption, JsonOption, print_json
from visattn.environment import chosen_device
from visattn.given import counted
from visattn.pipelines.asked import check_rate, check_settings
from visattn.report_text import mean_density, named

generate = typer.Typer(
    help="Generate with a diffusion model whose attention is a pattern.", no_args_is_help=True, rich_markup_mode=None
)

# The globs of what pipelines/report/compare.py writes; importing it would load torch before the folder is checked.
WRITTEN = (
    *("sparse-*.png", "dense-*.png", "comparison.png", "*-???.mp4", "*-???.webp", "comparison.webp", "sheet-*.png"),
    *("report.json", "report.html"),
)
# What is said of them: these before the others, and so many in all.
FIRST, SHOWN = ("report.html", "comparison.png", "comparison.webp"), 4


@generate.callback()
def _group() -> None:
    """Generate with a diffusion model whose attention is a pattern."""


@generate.command(short_help="Images; with --compare also the dense twin.")
def image(
    pattern: PatternOption = "dense",
    out: OutOption = Path("out"),
    model: Annotated[
        str, typer.Option(help="emoji or digits (embedded), a folder in diffusers' format, or a hub id.")
    ] = "emoji",
    prompt: PromptOption = None,
    label: LabelOption = None,
    count: CountOption = None,
    seed: SeedOption = 0,
    steps: StepsOption = None,
    guidance: GuidanceOption = None,
    size: SizeOption = None,
    layers: LayersOption = None,
    dense_layers: DenseLayersOption = 0,
    dense_steps: DenseStepsOption = "0",
    dense_last_steps: DenseLastStepsOption = "0",
    precision: PrecisionOption = None,
    precise_layers: PreciseLayersOption = None,
    precise_steps: PreciseStepsOption = "0",
    precise_last_steps: PreciseLastStepsOption = "0",
    backend: BackendOption = "auto",
    weights: WeightsOption = None,
    compare: CompareOption = False,
    repeats: RepeatsOption = 1,
    parallel: ParallelOption = None,
    device: DeviceOption = "auto",
    dtype: DtypeOption = None,
    force: ForceOption = False,
    json: JsonOption = False,
) -> None:
    """Generate images with a sparse pattern; with --compare also the dense twin from the same noise."""
    _command("image", **locals())


@generate.command(short_help="Videos; with --compare also the dense twin.")
def video(
    pattern: PatternOption = "dense",
    out: OutOption = Path("out"),
    model: Annotated[
        str, typer.Option(help="animoji or moving-digits (embedded), a folder in diffusers' format, or a hub id.")
    ] = "animoji",
    prompt: PromptOption = None,
    label: LabelOption = None,
    count: CountOption = None,
    seed: SeedOption = 0,
    steps: StepsOption = None,
    guidance: GuidanceOption = None,
    size: SizeOption = None,
    frames: Annotated[int | None, typer.Option(help="Frames.", show_default="the model's own")] = None,
    fps: Annotated[
        int | None, typer.Option(help="Frames per second of the files.", show_default="the model's own, or 16")
    ] = None,
    layers: LayersOption = None,
    dense_layers: DenseLayersOption = 0,
    dense_steps: DenseStepsOption = "0",
    dense_last_steps: DenseLastStepsOption = "0",
    precision: PrecisionOption = None,
    precise_layers: PreciseLayersOption = None,
    precise_steps: PreciseStepsOption = "0",
    precise_last_steps: PreciseLastStepsOption = "0",
    backend: BackendOption = "auto",
    weights: WeightsOption = None,
    compare: CompareOption = False,
    repeats: RepeatsOption = 1,
    parallel: ParallelOption = None,
    device: DeviceOption = "auto",
    dtype: DtypeOption = None,
    force: ForceOption = False,
    json: JsonOption = False,
) -> None:
    """Generate videos with a sparse pattern; with --compare also the dense twin from the same noise."""
    _command("video", **locals())


def _command(
    output: str,
    *,
    out: Path,
    model: str,
    prompt: list[str] | None,
    label: str | None,
    count: int | None,
    size: str | None,
    dense_steps: str,
    dense_last_steps: str,
    precise_steps: str,
    precise_last_steps: str,
    weights: Path | None,
    device: str,
    dtype: str | None,
    force: bool,
    json: bool,
    fps: int | None = None,
    **options: Any,
) -> None:
    """What both commands do; `options` are those of `pipelines.generate.Settings` as they are."""
    labels = parse_labels(label)
    options |= {
        "output": output,
        "prompts": tuple(prompt or ()),
        "labels": labels,
        "count": count if count is not None else max(1, len(labels), len(prompt or ())),
        "size": pixels(size),
        "dense_steps": parse_steps(dense_steps, "--dense-steps"),
        "dense_last_steps": parse_steps(dense_last_steps, "--dense-last-steps"),
        "precise_steps": parse_steps(precise_steps, "--precise-steps"),
        "precise_last_steps": parse_steps(precise_last_steps, "--precise-last-steps"),
        "weights": None if weights is None else str(weights),
    }
    _need_diffusers()
    counts = {f"--{name}": options.get(name) for name in ("count", "repeats", "steps", "frames")}
    asked = {name: options[name] for name in ("output", "prompts", "labels", "guidance", "size", "seed")}
    check_rate(fps)
    check_settings(model, dtype, counts, **asked)
    with _processes(options["parallel"], device) as (first, device):
        from visattn.files import output_folder

        with output_folder(out, force, WRITTEN) if first else nullcontext() as folder:
            summary = _generate(options, folder, model, device, dtype, fps)
        if first:
            print_json(summary) if json else _print(summary, out)


@contextmanager
def _processes(parallel: str | None, device: str) -> Iterator[tuple[bool, str]]:
    """Whether this process is the one that writes, and its device."""
    if parallel is None:
        yield True, device
        return
    if parallel not in ("ulysses", "halo"):
        raise ValueError(f"--parallel {parallel} must be ulysses or halo")
    from visattn.parallel.processes import together

    with together(device) as place:
        yield place.first, place.device


def _generate(
    options: dict[str, Any], folder: Path | None, model: str, device: str, dtype: str | None, fps: int | None
) -> dict[str, Any]:
    """Load, run, write; everything that a user may have got wrong is checked as early as it can be.

    Without a folder nothing is written or shown: another process does that.
    """
    _check_pattern(**options)
    chosen_device(device)
    from visattn.pipelines.generate import VIDEO, Settings, check, run_all
    from visattn.pipelines.report.compare import frame_rate, summarize, write
    from visattn.pipelines.report.video_files import need_encoder

    settings = Settings(**options)
    if settings.output == VIDEO:
        need_encoder()
    progress = folder is not None and is_watched()
    if not progress:
        no_loading_bars()
    pipe = loaded_pipeline(model, device, dtype, bars=progress)
    with _warnings_told():
        check(pipe, settings)
    runs = list(run_all(pipe, settings, progress=progress))
    summary = summarize(pipe, settings, runs, model)
    if folder is not None:
        write(folder, summary, runs, fps or frame_rate(pipe))
    return summary


@contextmanager
def _warnings_told() -> Iterator[None]:
    """Shows each warning once as a line, without the place in the code that it comes from."""
    import warnings

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield
    for text in dict.fromkeys(str(warning.message) for warning in caught):
        typer.echo(f"visattn: warning: {text}", err=True)
        warnings.filterwarnings("ignore", re.escape(text))


def _need_diffusers() -> None:
    import importlib.util

    if importlib.util.find_spec("diffusers") is None:
        raise ValueError("generate needs diffusers: pip install 'visattn[diffusers]'")


def _check_pattern(pattern: str, backend: str, weights: str | None, **options: Any) -> None:
    """Raise a ValueError for a pattern, a schedule, a backend or weights that cannot be.

    They need torch, which takes a second or two to import, and nothing of diffusers, which takes several.
    """
    from visattn.dispatch import load
    from visattn.presets import is_auto
    from visattn.schedule import Schedule
    from visattn.trained import load_trained

    scheduled = "layers", "dense_layers", "dense_steps", "dense_last_steps"
    precise = "precision", "precise_layers", "precise_steps", "precise_last_steps"
    # What "auto" is, only the model says.
    if not is_auto(pattern):
        Schedule.of(pattern, *(options[name] for name in (*scheduled, *precise)))
    if backend != "auto":
        load(backend)
    if weights is not None:
        load_trained(Path(weights))


def _print(summary: dict[str, Any], out: Path) -> None:
    from visattn.timing import gain

    attention, what = summary["attention"], summary["settings"]["output"]
    density = "" if summary["density"] is None else f", density {summary['density']:.1%}"
    # Without a pattern there is one run, and nothing in it is sparse.
    own = summary["pattern"] == "dense" and "speedup" not in summary
    typer.echo(
        f"the model's own attention, dense, at {counted(attention['sites_patched'], 'module')}"
        if own
        else f"{summary['pattern']} at {attention['sites_hit']} of {attention['sites_patched']} attention modules, "
        f"{counted(attention['hits'], 'call')}{density}"
    )
    for reason, number in attention["fallbacks"].items():
        typer.echo(f"  {counted(number, 'call')} fell back to dense: {reason}")
    for line in site_table(attention["sites"]):
        typer.echo(line)
    for kind, times in summary["times"].items():
        name = "dense" if own else kind
        typer.echo(f"{name:<8}{times['seconds']:.2f} s per {what}, {times['attention_seconds']:.2f} s in attention")
    if attention.get("moved"):
        typer.echo(f"sent    {attention['moved'] / 1e6:.1f} MB by this process to others")
    if "speedup" in summary:
        speedup, mean = summary["speedup"], summary["mean"]
        typer.echo(
            f"sparse  is {gain(speedup['seconds'])} per {what}, {gain(speedup['attention_seconds'])} in attention"
        )
        equal = f"{'pictures' if what == 'image' else 'videos'} are equal"
        decibel = equal if mean["psnr"] is None else f"PSNR {mean['psnr']:.1f} dB"
        similar = "" if mean["ssim"] is None else f", SSIM {mean['ssim']:.3f}"
        far = "" if mean["lpips"] is None else f", LPIPS {mean['lpips']:.3f}"
        typer.echo(f"quality {decibel}{similar}{far} against the dense twin")
    if summary["busy"]:
        typer.echo(f"warning {summary['busy']}")
    typer.echo(f"written {out}: {_files(out)}")


def _files(out: Path) -> str:
    """The files of a folder in words: those that show the most first, not all of many."""
    found = sorted(path.name for path in out.iterdir() if not path.name.startswith("."))
    first = [name for name in FIRST if name in found]
    ordered = first + [name for name in found if name not in first]
    more = len(ordered) - SHOWN
    return ", ".join(ordered if more <= 1 else [*ordered[:SHOWN], f"and {more} more"])


def site_table(sites: Sequence[Mapping[str, Any]]) -> list[str]:
    """Lines of a table of attention modules; those that did the same share a row, with their names below each other.

    Args:
        sites: `sites` of a report as a dict.
    """
    rows: list[tuple[str, ...]] = [("modules", "pattern", "backend", "density", "hits", "dense", "fallbacks", "time")]
    for (first, *others), same in named(sites):
        seconds = sum(s["sparse_seconds"] + s["dense_seconds"] for s in same)
        rows.append((first, *_did(same), f"{seconds:.3f} s"))
        rows += [(name, *[""] * (len(rows[0]) - 1)) for name in others]
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return [
        "  " + "  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    ]


def _did(sites: Sequence[Mapping[str, Any]]) -> tuple[str, ...]:
    """What modules that are alike did."""
    site, density = sites[0], mean_density(sites)
    counts = (str(site["hits"]), str(site["dense"]), str(sum(site["fallbacks"].values())))
    return site["pattern"], ran_by(site), "-" if density is None else f"{density:.3f}", *counts


def ran_by(site: Mapping[str, Any]) -> str:
    """Which backend ran a module, and in what, if not in the model's own dtype."""
    return " ".join(filter(None, (site["backend"] or "stock", site["precision"])))
