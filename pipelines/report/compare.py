"""Put the runs of `generate` together: metrics, times, reports, pictures side by side, videos."""

from __future__ import annotations

import dataclasses
import json
import math
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from visattn.canvas import GAP, Picture, column, row, text
from visattn.metrics import SSIM_SIDE, psnr, ssim
from visattn.pipelines.generate import DENSE, SPARSE, VIDEO, Run, Settings, label_of, prompt_of, warm_up_steps
from visattn.pipelines.report.html import page
from visattn.pipelines.report.lpips import find_lpips
from visattn.pipelines.report.video_files import contact_sheet, readable, to_picture, write_mp4, write_webp
from visattn.timing import gain

MEASURED = {
    "seconds": "wall time of one pipeline call, the wrapper included",
    "attention_seconds": "time inside the attention operations of the selected modules, over all steps",
    "dense": 'the same model with the pattern "dense" at the same modules: its own attention, bit by bit',
    "order": "sparse and dense take turns; the one that goes first changes with every image and repeat",
    "attention": "sites, hits and seconds are those of the first image's first run",
    "divergence": "L2 distance of sparse and dense latents after each step, as a share of the dense latents' norm",
    "psnr": "over all pixels, values 0 to 1, before any file is encoded; of a video over all frames",
    "ssim": "of a video the mean over frames",
}
WIDEST = 1100  # pixels of an animated comparison
COMPARED = ("psnr", "ssim", "lpips")


def summarize(pipe: Any, settings: Settings, runs: Sequence[Run], model: str) -> dict[str, Any]:
    """The report of a generation: settings, seeds, times, density, metrics, table of attention modules.

    A PSNR of equal pictures is infinite, which JSON cannot say: it is null there, and `equal` is true.
    """
    from visattn.environment import busy, cpu_name, versions

    first = _first(runs, SPARSE)
    device = torch.device(pipe.device)
    summary: dict[str, Any] = {
        "model": model,
        "pipeline": type(pipe).__name__,
        "pattern": settings.pattern,
        "settings": dataclasses.asdict(settings),
        "seeds": list(settings.seeds),
        "device": str(device),
        "device_name": torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name(),
        "threads": torch.get_num_threads(),
        "busy": busy(),
        "dtype": str(pipe.dtype).removeprefix("torch."),
        "versions": versions(),
        "density": first[0].report.density,
        "times": {kind: _times(runs, kind) for kind in (SPARSE, DENSE) if any(r.kind == kind for r in runs)},
        "attention": first[0].report.to_dict(),
    }
    if settings.compare:
        summary["shared_steps"] = max(run.shared_steps for run in runs)
        summary["measured"] = _how(warm_up_steps(pipe), summary["shared_steps"])
        summary["speedup"] = {
            key: summary["times"][DENSE][key] / summary["times"][SPARSE][key]
            for key in ("seconds", "attention_seconds")
        }
        pairs = list(zip(first, _first(runs, DENSE), strict=True))
        lpips, summary["lpips"] = find_lpips()
        found = [_distance(settings, i, *pair, lpips) for i, pair in enumerate(pairs)]
        summary["mean"] = {name: _mean([one[name] for one in found]) for name in COMPARED}
    else:
        summary["measured"] = {k: MEASURED[k] for k in ("seconds", "attention_seconds", "attention")} | {
            "warm_up": "none: plans, compilation and first touch of memory are included"
        }
        found = [_image(settings, i) for i in range(settings.count)]
    return summary | {f"{settings.output}s": found}


def _how(warm_up: int, shared: int) -> dict[str, str]:
    """What the numbers of a comparison are."""
    steps = f"{warm_up} unmeasured step{'s' * (warm_up > 1)}"
    found = MEASURED | {"warm_up": f"both run {steps} first"}
    if shared:
        found["shared_steps"] = (
            f"the first {shared} steps are dense in both and the same work: the run that goes first draws them, and "
            "their time and calls count in both"
        )
    return found


def made(summary: dict[str, Any]) -> list[dict[str, Any]]:
    """What a summary says of each image or video."""
    return summary[f"{summary['settings']['output']}s"]


def frame_rate(pipe: Any) -> int:
    """Frames per second of a pipeline's videos: what its config says, or Wan's 16."""
    return int(getattr(pipe.config, "fps", None) or 16)


def _first(runs: Sequence[Run], kind: str) -> list[Run]:
    """The first run of each image; later repeats generate the same pictures again."""
    return sorted((r for r in runs if r.kind == kind and r.repeat == 0), key=lambda r: r.image)


def _times(runs: Sequence[Run], kind: str) -> dict[str, Any]:
    mine = [r for r in runs if r.kind == kind]
    return {
        "seconds": statistics.median(r.seconds for r in mine),
        "attention_seconds": statistics.median(r.attention_seconds for r in mine),
        "runs": [
            {"image": r.image, "repeat": r.repeat, "seconds": r.seconds, "attention_seconds": r.attention_seconds}
            for r in mine
        ],
    }


def _image(settings: Settings, index: int) -> dict[str, Any]:
    prompts = settings.prompts
    condition = {"prompt": prompt_of(settings, index)} if prompts else {"label": label_of(settings, index)}
    return {"index": index, "seed": settings.seeds[index], **condition}


def _distance(
    settings: Settings, index: int, sparse: Run, dense: Run, lpips: Callable[..., torch.Tensor] | None
) -> dict[str, Any]:
    a, b = (_frames(r) for r in (sparse, dense))
    # All frames below each other: the error of a video is that of all its pixels.
    decibel = psnr(*(x.transpose(0, 1).flatten(1, 2)[None] for x in (a, b))).item()
    return {
        **_image(settings, index),
        "equal": bool((a == b).all()),
        "psnr": decibel if math.isfinite(decibel) else None,
        "ssim": ssim(a, b).mean().item() if min(a.shape[2:]) >= SSIM_SIDE else None,
        "lpips": None if lpips is None else lpips(a, b).mean().item(),
        "divergence": list(sparse.divergence),
    }


def _frames(run: Run) -> torch.Tensor:
    """Pixels as pictures [frames or 1, channels, height, width]."""
    pixels = torch.from_numpy(run.pixels)
    return (pixels if pixels.ndim == 4 else pixels[None]).permute(0, 3, 1, 2)


def _mean(values: Sequence[float | None]) -> float | None:
    known = [v for v in values if v is not None]
    return statistics.fmean(known) if known else None


def write(folder: Path, summary: dict[str, Any], runs: Sequence[Run], fps: int = 8) -> None:
    """Write every picture or video, with a twin also what compares them and report.html, and report.json.

    Args:
        folder: Where to.
        summary: From `summarize`.
        runs: The runs behind it.
        fps: Frames per second of videos.
    """
    dense, sparse = _first(runs, DENSE), _first(runs, SPARSE)
    video = summary["settings"]["output"] == VIDEO
    # Without a twin a run whose pattern is "dense" has nothing sparse.
    alone = DENSE if summary["pattern"] == DENSE and not dense else SPARSE
    for run in (*sparse, *dense):
        path = folder / f"{alone if run.kind == SPARSE else DENSE}-{run.image:03}"
        if video:
            write_mp4(path.with_suffix(".mp4"), run.pixels, fps)
            write_webp(path.with_suffix(".webp"), [readable(to_picture(frame)) for frame in run.pixels], fps)
        else:
            to_picture(run.pixels).save(path.with_suffix(".png"))
    if video:
        for i, run in enumerate(sparse):
            shown = {DENSE: dense[i].pixels} if dense else {}
            contact_sheet(shown | {alone: run.pixels}).save(folder / f"sheet-{i:03}.png")
    if summary["settings"]["compare"]:
        if video:
            write_webp(folder / "comparison.webp", moving_comparison(summary, dense, sparse), fps)
        else:
            comparison(summary, dense, sparse).save(folder / "comparison.png")
        (folder / "report.html").write_text(page(summary, folder), encoding="utf-8")
    (folder / "report.json").write_text(json.dumps(summary, indent=2) + "\n")


def comparison(summary: dict[str, Any], dense: Sequence[Run], sparse: Sequence[Run]) -> Picture:
    """Dense, sparse and their difference beside each other, a row per image, with times and metrics in words."""
    times, speedup = summary["times"], summary["speedup"]
    density = "" if summary["density"] is None else f", density {summary['density']:.1%}"
    head = [
        text(f"{summary['model']}: dense attention and {summary['pattern']}", size=20),
        text(
            f"dense   {_time_text(times[DENSE])}\nsparse  {_time_text(times[SPARSE])}{density}\n"
            f"sparse is {gain(speedup['seconds'])}, its attention {gain(speedup['attention_seconds'])} "
            f"({summary['device_name']}, {summary['dtype']})" + (f"\n{summary['busy']}" if summary["busy"] else "")
        ),
    ]
    rows = [_comparison_row(image, d, s) for image, d, s in zip(made(summary), dense, sparse, strict=True)]
    return column([*head, *rows], margin=2 * GAP)


def moving_comparison(summary: dict[str, Any], dense: Sequence[Run], sparse: Sequence[Run]) -> list[Picture]:
    """Frames of dense and sparse videos beside each other, as many in a row as fit; shorter videos go round."""
    texts = [_what(one) for one in made(summary)]
    title = text(f"{summary['model']}: dense attention (left) and {summary['pattern']} (right)", size=16)
    found = []
    for moment in range(max(len(run.pixels) for run in sparse)):
        cells = []
        for what, *pair in zip(texts, dense, sparse, strict=True):
            shown = [readable(to_picture(run.pixels[moment % len(run.pixels)])) for run in pair]
            cells.append(column([row(shown, gap=4), text(what, size=13)], gap=4))
        found.append(column([title, row(cells, wrap=WIDEST)], margin=GAP))
    return found


def _time_text(times: dict[str, Any]) -> str:
    return f"{times['seconds']:.2f} s per image, {times['attention_seconds']:.2f} s of it in attention"


def _comparison_row(image: dict[str, Any], dense: Run, sparse: Run) -> Picture:
    decibel = "equal" if image["equal"] else f"PSNR {image['psnr']:.1f} dB"
    similar = "" if image["ssim"] is None else f", SSIM {image['ssim']:.3f}"
    pictures = (
        ("dense", dense.pixels),
        ("sparse", sparse.pixels),
        ("difference", np.abs(dense.pixels - sparse.pixels)),
    )
    panels = [column([readable(to_picture(pixels)), text(name, size=13)], gap=4) for name, pixels in pictures]
    return column([text(f"{_what(image)}, seed {image['seed']}: {decibel}{similar}"), row(panels)], gap=6)


def _what(image: dict[str, Any]) -> str:
    """What an image or video shows."""
    return f"label {image['label']}" if "label" in image else _short(image["prompt"])


def _short(prompt: str, most: int = 80) -> str:
    return prompt if len(prompt) <= most else prompt[: most - 3] + "..."
