"""The options of `visattn generate image` and `visattn generate video`, and how their texts are read."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated

import typer

PatternOption = Annotated[
    str, typer.Option(help='Like "topk(keep=0.2, rest=mean)", or a .json or .yaml file with a pattern per layer.')
]
OutOption = Annotated[Path, typer.Option(help="Folder for what is generated and report.json: new, or empty.")]
PromptOption = Annotated[
    list[str] | None, typer.Option(help="Text, for models that take one; several times for several.")
]
LabelOption = Annotated[
    str | None,
    typer.Option(help="Class labels like 3 or 0,3,7 or 0-9, for class-conditional models.", show_default="0,1,2,..."),
]
CountOption = Annotated[int | None, typer.Option(help="How many.", show_default="one for each prompt or label")]
SeedOption = Annotated[int, typer.Option(help="Seed of the first; the next has the next seed.")]
StepsOption = Annotated[int | None, typer.Option(help="Denoising steps.", show_default="the pipeline's own")]
GuidanceOption = Annotated[float | None, typer.Option(help="Guidance scale.", show_default="the pipeline's own")]
SizeOption = Annotated[
    str | None, typer.Option(help="Pixels, like 64 or 512x768 (H x W).", show_default="the model's own")
]
LayersOption = Annotated[
    str | None, typer.Option(help="Layers that get the pattern, like 0-3,7 or a name.", show_default="all")
]
DenseLayersOption = Annotated[int, typer.Option(help="So many of the first selected layers stay dense.")]
DenseStepsOption = Annotated[str, typer.Option(help="First steps that stay dense: a count or a fraction like 0.25.")]
DenseLastStepsOption = Annotated[str, typer.Option(help="Last steps that stay dense: a count or a fraction like 0.1.")]
PrecisionOption = Annotated[
    str | None,
    typer.Option(help="int8 or fp8: what the pattern computes in; a CPU simulates its errors, slowly."),
]
PreciseLayersOption = Annotated[str | None, typer.Option(help="Layers that stay in the model's dtype: as --layers.")]
PreciseStepsOption = Annotated[str, typer.Option(help="First steps that do: a count or a fraction like 0.25.")]
PreciseLastStepsOption = Annotated[str, typer.Option(help="Last steps that do: a count or a fraction like 0.1.")]
BackendOption = Annotated[str, typer.Option(help="Backend of the pattern, see `visattn doctor`.")]
WeightsOption = Annotated[
    Path | None,
    typer.Option(help="student.safetensors of scripts.distill.pipeline: trained weights of the pattern's model."),
]
CompareOption = Annotated[
    bool, typer.Option("--compare", help="Also make the dense twin, compare, and write report.html.")
]
RepeatsOption = Annotated[int, typer.Option(help="Generate each so many times; times are medians.")]
DeviceOption = Annotated[str, typer.Option(help="Like cpu, cuda or cuda:1; auto takes a GPU if there is one.")]
ParallelOption = Annotated[
    str | None,
    typer.Option(help="Share each model over the processes of torchrun: ulysses or halo; the first one writes."),
]
DtypeOption = Annotated[str | None, typer.Option(help="float32 (the CPU's default), bfloat16 (elsewhere), float16.")]

# Numbers that a text like 0-9 stands for at most: a typo should not fill the memory.
MOST_LABELS = 100_000


def parse_labels(text: str | None, option: str = "--label") -> tuple[int, ...]:
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
            raise ValueError(f"{option} {text!r} must be whole numbers like 3 or 0,3,7 or 0-9")
        first, last = int(match[1]), int(match[2] or match[1])
        if last - first >= MOST_LABELS - len(found):
            raise ValueError(f"{option} {text!r} has more than {MOST_LABELS} numbers: pass fewer")
        found += range(first, last + 1)
    return tuple(found)


def parse_steps(text: str, option: str) -> int | float:
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
        raise ValueError(f"{option} {text!r} must be a count like 12 or a fraction like 0.25") from None


def pixels(text: str | None) -> tuple[int, int] | None:
    """`512x768` as (512, 768), `64` as (64, 64).

    Raises:
        ValueError: If it has more than two sides.
    """
    if text is None:
        return None
    found = re.fullmatch(r"0*([1-9]\d*)(?:x0*([1-9]\d*))?", text.strip().lower())
    if found is None:
        raise ValueError(f"--size {text!r} must be a side in pixels like 64, or height x width like 512x768")
    return int(found[1]), int(found[2] or found[1])
