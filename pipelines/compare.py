"""Put the runs of `generate` together: metrics, times, report, pictures side by side."""

from __future__ import annotations

import dataclasses
import json
import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from visattn.canvas import GAP, Picture, column, row, text
from visattn.metrics import SSIM_SIDE, psnr, ssim
from visattn.pipelines.generate import DENSE, SPARSE, Run, Settings, label_of

# Pictures smaller than this are shown enlarged, so that one can see their pixels.
READABLE = 256

MEASURED = {
    "seconds": "wall time of one pipeline call, the wrapper included",
    "attention_seconds": "time inside the attention operations of the selected modules, over all steps",
    "dense": 'the same model with the pattern "dense" at the same modules: its own attention, bit by bit',
    "order": "sparse and dense take turns; the one that goes first changes with every image and repeat",
    "warm_up": "both run 2 unmeasured steps first",
    "attention": "sites, hits and seconds are those of the first image's first run",
}


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
        summary["measured"] = MEASURED
        summary["speedup"] = {
            key: summary["times"][DENSE][key] / summary["times"][SPARSE][key]
            for key in ("seconds", "attention_seconds")
        }
        pairs = list(zip(first, _first(runs, DENSE), strict=True))
        summary["images"] = [_distance(settings, i, *pair) for i, pair in enumerate(pairs)]
        summary["mean"] = {name: _mean([image[name] for image in summary["images"]]) for name in ("psnr", "ssim")}
    else:
        summary["measured"] = {k: MEASURED[k] for k in ("seconds", "attention_seconds", "attention")} | {
            "warm_up": "none: plans, compilation and first touch of memory are included"
        }
        summary["images"] = [_image(settings, i) for i in range(settings.count)]
    return summary


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
    condition = {"prompt": settings.prompt} if settings.prompt is not None else {"label": label_of(settings, index)}
    return {"index": index, "seed": settings.seeds[index], **condition}


def _distance(settings: Settings, index: int, sparse: Run, dense: Run) -> dict[str, Any]:
    a, b = (torch.from_numpy(r.pixels).permute(2, 0, 1)[None] for r in (sparse, dense))
    decibel = psnr(a, b).item()
    return {
        **_image(settings, index),
        "equal": bool((a == b).all()),
        "psnr": decibel if math.isfinite(decibel) else None,
        "ssim": ssim(a, b).item() if min(a.shape[2:]) >= SSIM_SIDE else None,
    }


def _mean(values: Sequence[float | None]) -> float | None:
    known = [v for v in values if v is not None]
    return statistics.fmean(known) if known else None


def write(folder: Path, summary: dict[str, Any], runs: Sequence[Run]) -> None:
    """Write every picture, with a twin also the side-by-side picture, and report.json."""
    for kind in (SPARSE, DENSE):
        for run in _first(runs, kind):
            to_picture(run.pixels).save(folder / f"{kind}-{run.image:03}.png")
    if summary["settings"]["compare"]:
        comparison(summary, _first(runs, DENSE), _first(runs, SPARSE)).save(folder / "comparison.png")
    (folder / "report.json").write_text(json.dumps(summary, indent=2) + "\n")


def to_picture(pixels: NDArray[np.float32]) -> Picture:
    """Values 0 to 1 [height, width, 1 or 3] as a picture."""
    whole = (pixels.clip(0, 1) * 255).round().astype(np.uint8)
    return Image.fromarray(whole[..., 0] if whole.shape[-1] == 1 else whole)


def comparison(summary: dict[str, Any], dense: Sequence[Run], sparse: Sequence[Run]) -> Picture:
    """Dense, sparse and their difference beside each other, a row per image, with times and metrics in words."""
    times, speedup = summary["times"], summary["speedup"]
    density = "" if summary["density"] is None else f", density {summary['density']:.1%}"
    head = [
        text(f"{summary['model']}: dense attention and {summary['pattern']}", size=20),
        text(
            f"dense   {_time_text(times[DENSE])}\nsparse  {_time_text(times[SPARSE])}{density}\n"
            f"sparse is {gain(speedup['seconds'])}, its attention {gain(speedup['attention_seconds'])} "
            f"({summary['device_name']}, {summary['dtype']})"
        ),
    ]
    rows = [_comparison_row(image, d, s) for image, d, s in zip(summary["images"], dense, sparse, strict=True)]
    return column([*head, *rows], margin=2 * GAP)


def gain(speedup: float) -> str:
    """A ratio of times in words."""
    return f"{speedup:.2f}x faster" if speedup >= 1 else f"{1 / speedup:.2f}x slower"


def _time_text(times: dict[str, Any]) -> str:
    return f"{times['seconds']:.2f} s per image, {times['attention_seconds']:.2f} s of it in attention"


def _comparison_row(image: dict[str, Any], dense: Run, sparse: Run) -> Picture:
    what = f"label {image['label']}" if "label" in image else _short(image["prompt"])
    decibel = "equal" if image["equal"] else f"PSNR {image['psnr']:.1f} dB"
    similar = "" if image["ssim"] is None else f", SSIM {image['ssim']:.3f}"
    pictures = (
        ("dense", dense.pixels),
        ("sparse", sparse.pixels),
        ("difference", np.abs(dense.pixels - sparse.pixels)),
    )
    panels = [column([_readable(to_picture(pixels)), text(name, size=13)], gap=4) for name, pixels in pictures]
    return column([text(f"{what}, seed {image['seed']}: {decibel}{similar}"), row(panels)], gap=6)


def _short(prompt: str, most: int = 80) -> str:
    return prompt if len(prompt) <= most else prompt[: most - 3] + "..."


def _readable(picture: Picture) -> Picture:
    """A small picture enlarged by a whole factor, each pixel a square."""
    factor = max(1, READABLE // min(picture.size))
    size = picture.width * factor, picture.height * factor
    return picture.convert("RGB").resize(size, Image.Resampling.NEAREST)
