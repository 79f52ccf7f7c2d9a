"""`visattn record`: queries, keys and values of a diffusion model's attention, in a file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

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
from visattn.cli.loading import loaded_pipeline
from visattn.cli.options import ForceOption, JsonOption, output_file, print_json
from visattn.given import counted
from visattn.pipelines.asked import check_settings


def record(
    out: Annotated[Path, typer.Option(help="The file to write: .safetensors.")],
    model: Annotated[str, typer.Option(help="Embedded model, folder in diffusers' format, or hub id.")] = "emoji",
    prompt: PromptOption = None,
    label: LabelOption = None,
    at: Annotated[str, typer.Option(help="Denoising steps to record, from 0, like 4 or 0,4,8.")] = "0",
    modules: Annotated[
        list[str] | None, typer.Option(help="Names of modules, with * for anything.", show_default="all")
    ] = None,
    samples: Annotated[int, typer.Option(help="How many samples of the batch.")] = 1,
    limit: Annotated[int, typer.Option(help="Megabytes that are recorded at most.")] = 1024,
    seed: SeedOption = 0,
    steps: StepsOption = None,
    guidance: GuidanceOption = None,
    size: SizeOption = None,
    frames: Annotated[int | None, typer.Option(help="Frames of a video.", show_default="the model's own")] = None,
    device: DeviceOption = "auto",
    dtype: DtypeOption = None,
    force: ForceOption = False,
    json: JsonOption = False,
) -> None:
    """Record queries, keys and values of attention at some denoising steps, to look at what patterns list for them."""
    labels, wanted = parse_labels(label), [*dict.fromkeys(parse_labels(at, "--at"))]
    if samples < 1 or limit < 1:
        raise ValueError(f"--samples {samples} and --limit {limit} must be at least 1")
    if steps is not None and max(wanted) >= steps:
        raise ValueError(f"--at {at} must be of steps from 0 to {steps - 1}: there are --steps {steps}")
    output_file(out, (".safetensors",), force)
    settings = {"prompts": tuple(prompt or ()), "labels": labels, "seed": seed, "steps": steps, "guidance": guidance}
    settings |= {"size": pixels(size), "frames": frames}
    counts = {"--steps": steps, "--frames": frames}
    asked: dict[str, Any] = {name: settings[name] for name in ("prompts", "labels", "guidance", "size", "seed")}
    check_settings(model, dtype, counts, **asked)
    found = _record(out, model, settings, wanted, modules or ["*"], samples, limit * 10**6, device, dtype, force)
    if json:
        print_json(found)
        return
    what = f"{counted(found['calls'], 'call')} of {counted(found['modules'], 'module')}"
    typer.echo(f"{out}: {what}, {found['bytes'] / 1e6:.1f} MB")
    if found["left_out"]:
        typer.echo(f"  {counted(found['left_out'], 'call')} left out: over --limit {limit} megabytes")


def _record(
    out: Path,
    model: str,
    settings: dict[str, Any],
    steps: list[int],
    modules: list[str],
    samples: int,
    limit: int,
    device: str,
    dtype: str | None,
    force: bool,
) -> dict[str, Any]:
    """Load, run, write."""
    import inspect

    from visattn.pipelines.generate import IMAGE, VIDEO, Settings, call_arguments, check
    from visattn.pipelines.record import record as run
    from visattn.recorded import save_recorded

    pipe = loaded_pipeline(model, device, dtype, bars=True)
    output = VIDEO if "num_frames" in inspect.signature(pipe.__call__).parameters else IMAGE
    chosen = Settings(pattern="dense", output=output, **settings)
    check(pipe, chosen)
    arguments = call_arguments(pipe, chosen, 0)
    recorder = run(pipe, arguments, modules=modules, steps=steps, samples=samples, limit=limit)
    about = {"model": model, "prompts": list(chosen.prompts), "labels": list(chosen.labels), "seed": chosen.seed}
    save_recorded(out, recorder.calls, about | {"steps": chosen.steps, "left_out": recorder.left_out}, force)
    tensors = [t for call in recorder.calls for t in call.tensors.values()]
    return {
        "file": str(out),
        "calls": len(recorder.calls),
        "modules": len({call.site for call in recorder.calls}),
        "bytes": sum(t.numel() * t.element_size() for t in tensors),
        "left_out": recorder.left_out,
    }
