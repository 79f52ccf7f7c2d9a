"""`visattn generate`: pictures from a diffusion model with a pattern, and the dense twin to compare with."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from visattn.cli.options import ForceOption, JsonOption, print_json, sizes

if TYPE_CHECKING:
    from visattn.pipelines.generate import Settings

generate = typer.Typer(
    help="Generate with a diffusion model whose attention is a pattern.", no_args_is_help=True, rich_markup_mode=None
)


@generate.callback()
def _group() -> None:
    """Generate with a diffusion model whose attention is a pattern."""


@generate.command()
def image(
    pattern: Annotated[
        str, typer.Option(help='A pattern like "na(window=9x9)", or a .json or .yaml file with one per layer.')
    ],
    out: Annotated[Path, typer.Option(help="Folder for the pictures and report.json.")],
    model: Annotated[
        str, typer.Option(help="digits (embedded), a folder in diffusers' format, or a hub id.")
    ] = "digits",
    prompt: Annotated[str | None, typer.Option(help="Text, for models that take one.")] = None,
    label: Annotated[
        str | None, typer.Option(help="Class labels like 3 or 0,3,7 or 0-9, for class-conditional models; 0,1,2,...")
    ] = None,
    count: Annotated[int | None, typer.Option(help="Number of images; one per label, or 1.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of the first image; the next has the next seed.")] = 0,
    steps: Annotated[int | None, typer.Option(help="Denoising steps; the pipeline's default.")] = None,
    guidance: Annotated[float | None, typer.Option(help="Guidance scale; the pipeline's default.")] = None,
    size: Annotated[str | None, typer.Option(help="Pixels, like 64 or 512x768 (H x W); the model's own.")] = None,
    layers: Annotated[str | None, typer.Option(help="Layers that get the pattern, like 0-3,7 or a name; all.")] = None,
    dense_layers: Annotated[int, typer.Option(help="So many of the first selected layers stay dense.")] = 0,
    dense_steps: Annotated[
        str, typer.Option(help="First steps that stay dense: a count or a fraction like 0.25.")
    ] = "0",
    backend: Annotated[str, typer.Option(help="Backend of the pattern, see `visattn doctor`.")] = "auto",
    compare: Annotated[bool, typer.Option("--compare", help="Also make the dense twin, and compare.")] = False,
    repeats: Annotated[int, typer.Option(help="Generate each image so many times; times are medians.")] = 1,
    device: Annotated[str, typer.Option(help="Like cpu, cuda or cuda:1; auto takes a GPU if there is one.")] = "auto",
    dtype: Annotated[
        str | None, typer.Option(help="float32 (the CPU's default), bfloat16 (elsewhere), float16.")
    ] = None,
    force: ForceOption = False,
    json: JsonOption = False,
) -> None:
    """Generate images with a sparse pattern; with --compare also the dense twin from the same noise."""
    labels = parse_labels(label)
    options = {
        "pattern": pattern,
        "prompt": prompt,
        "labels": labels,
        "seed": seed,
        "count": count if count is not None else max(1, len(labels)),
        "steps": steps,
        "guidance": guidance,
        "size": None if size is None else pixels(size),
        "layers": layers,
        "dense_layers": dense_layers,
        "dense_steps": parse_steps(dense_steps),
        "backend": backend,
        "compare": compare,
        "repeats": repeats,
    }
    _need_diffusers()
    from visattn.files import output_folder

    # The globs of what pipelines/compare.py writes; importing it would load torch before the folder is checked.
    with output_folder(out, force, ("sparse-*.png", "dense-*.png", "comparison.png", "report.json")) as folder:
        summary = _generate(options, folder, model, device, dtype)
    print_json(summary) if json else _print(summary, out)


def _generate(options: dict[str, Any], folder: Path, model: str, device: str, dtype: str | None) -> dict[str, Any]:
    """Load, run, write; everything that a user may have got wrong is checked as early as it can be."""
    from visattn.pipelines.compare import summarize, write
    from visattn.pipelines.generate import Settings, check, run_all
    from visattn.pipelines.load import load_pipeline

    settings = Settings(**options)
    _check_pattern(settings)
    if device == "auto":
        import torch

        device = "cuda" if torch.cuda.is_available() else "cpu"
    progress = sys.stderr.isatty()
    if not progress:
        from diffusers.utils import logging

        logging.disable_progress_bar()
    pipe = load_pipeline(model, device, dtype)
    check(pipe, settings)
    runs = list(run_all(pipe, settings, progress=progress))
    summary = summarize(pipe, settings, runs, model)
    write(folder, summary, runs)
    return summary


def _need_diffusers() -> None:
    import importlib.util

    if importlib.util.find_spec("diffusers") is None:
        raise ValueError("generate needs diffusers: pip install 'visattn[diffusers]'")


def _check_pattern(settings: Settings) -> None:
    """Raise a ValueError for a pattern, a schedule or a backend that cannot be, before a model is loaded."""
    from visattn.dispatch import load
    from visattn.schedule import Schedule

    Schedule.of(settings.pattern, settings.layers, settings.dense_layers, settings.dense_steps)
    if settings.backend != "auto":
        load(settings.backend)


def parse_labels(text: str | None) -> tuple[int, ...]:
    """`0,3,7` and `0-9` as whole numbers.

    Raises:
        ValueError: If it is anything else.
    """
    if text is None:
        return ()
    found: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d+)\s*(?:-\s*(\d+)\s*)?", part)
        if not match or (match[2] and int(match[2]) < int(match[1])):
            raise ValueError(f"--label {text!r} must be whole numbers like 3 or 0,3,7 or 0-9")
        found += range(int(match[1]), int(match[2] or match[1]) + 1)
    return tuple(found)


def parse_steps(text: str) -> int | float:
    """A count of steps, or a fraction of them.

    Raises:
        ValueError: If it is no number.
    """
    try:
        return int(text)
    except ValueError:
        pass
    try:
        return float(text)
    except ValueError:
        raise ValueError(f"--dense-steps {text!r} must be a count like 12 or a fraction like 0.25") from None


def pixels(text: str) -> tuple[int, int]:
    """`512x768` as (512, 768), `64` as (64, 64).

    Raises:
        ValueError: If it has more than two sides.
    """
    height, *others = sizes(text, "--size")
    if len(others) > 1:
        raise ValueError(f"--size {text!r} must be a side like 64, or height x width like 512x768")
    return height, others[0] if others else height


def _print(summary: dict[str, Any], out: Path) -> None:
    from visattn.pipelines.compare import gain

    attention = summary["attention"]
    density = "" if summary["density"] is None else f", density {summary['density']:.1%}"
    typer.echo(
        f"{summary['pattern']} at {attention['sites_hit']} of {attention['sites_patched']} attention modules, "
        f"{attention['hits']} calls{density}"
    )
    for reason, number in attention["fallbacks"].items():
        typer.echo(f"  {number} calls fell back to dense: {reason}")
    for kind, times in summary["times"].items():
        typer.echo(f"{kind:<8}{times['seconds']:.2f} s per image, {times['attention_seconds']:.2f} s in attention")
    if "speedup" in summary:
        speedup, mean = summary["speedup"], summary["mean"]
        typer.echo(
            f"sparse  is {gain(speedup['seconds'])} per image, {gain(speedup['attention_seconds'])} in attention"
        )
        decibel = "pictures are equal" if mean["psnr"] is None else f"PSNR {mean['psnr']:.1f} dB"
        similar = "" if mean["ssim"] is None else f", SSIM {mean['ssim']:.3f}"
        typer.echo(f"quality {decibel}{similar} against the dense twin")
    if summary["busy"]:
        typer.echo(f"warning {summary['busy']}")
    files = sorted(path.name for path in out.iterdir() if not path.name.startswith("."))
    shown = files if len(files) <= 4 else [files[0], f"... {len(files) - 3} more", *files[-2:]]
    typer.echo(f"written {out}: {', '.join(shown)}")
