"""What somebody asks of a pipeline, as far as it can be checked without one: nothing heavy is imported for it.

diffusers takes seconds to import and a model some more; a typo should not wait for them.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from visattn.pipelines.embedded import EMBEDDED

IMAGE, VIDEO = "image", "video"
# What a pipeline is told what to draw by: its parameters.
PROMPT, LABELS = "prompt", "class_labels"
# Frames per second at most.
MOST_RATE = 1000
DTYPES = "float32", "bfloat16", "float16"
# Ends of names of files with weights, which are no pipeline.
WEIGHT_FILES = (".safetensors", ".bin", ".ckpt", ".pt", ".pth", ".gguf")


def check_model(model: str) -> None:
    """Check that a name is one that can be loaded.

    Raises:
        ValueError: If it is neither an embedded model, nor a folder with a pipeline, nor like an id on the hub.
    """
    folder = Path(model)
    if model in EMBEDDED:
        return
    if folder.is_dir():
        if not (folder / "model_index.json").is_file():
            raise ValueError(
                f"folder {folder} has no model_index.json, so it is not a diffusers pipeline: name one of those"
            )
    elif folder.suffix in WEIGHT_FILES or not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", model):
        names = ", ".join(EMBEDDED)
        raise ValueError(
            f"model {model!r} is not an embedded model ({names}), a folder here, or a hub id like owner/name"
        )


def check_dtype(dtype: str | None) -> None:
    """Check the name of a dtype; None is the device's own.

    Raises:
        ValueError: If it is none of `DTYPES`.
    """
    if dtype is not None and dtype not in DTYPES:
        raise ValueError(f"dtype {dtype!r} does not exist here: pass one of {', '.join(DTYPES)}")


def check_counts(counts: Mapping[str, int | None]) -> None:
    """Check numbers of things, by what errors call them; None is the pipeline's own.

    Raises:
        ValueError: If one is below 1.
    """
    for option, number in counts.items():
        if number is not None and number < 1:
            raise ValueError(f"{option} {number} must be at least 1")


def check_seeds(seed: int, count: int = 1) -> None:
    """Check the seed of the first of some samples, each of which has the next one: torch takes no others.

    Raises:
        ValueError: If one of them is out of range.
    """
    if not -(2**63) <= seed <= 2**64 - count:
        few = f" for {count} samples" * (count > 1)
        raise ValueError(f"--seed {seed} must be from {-(2**63)} to {2**64 - count}{few}")


def check_rate(fps: int | None) -> None:
    """Check frames per second of files; None is the model's own.

    Raises:
        ValueError: If there are more than milliseconds, which WebP files count in.
    """
    check_counts({"--fps": fps})
    if fps is not None and fps > MOST_RATE:
        raise ValueError(f"--fps {fps} must be from 1 to {MOST_RATE}")


def check_guidance(guidance: float | None) -> None:
    """Check a guidance scale; None is the pipeline's own.

    Raises:
        ValueError: If it is infinite or not a number.
    """
    if guidance is not None and not math.isfinite(guidance):
        raise ValueError(f"guidance {guidance} must be a finite number, like 4.5")


def check_output(name: str, makes: str, output: str) -> None:
    """Check that a pipeline makes what is asked for.

    Args:
        name: What errors call it.
        makes: IMAGE or VIDEO.
        output: What is asked for.

    Raises:
        ValueError: If it makes the other.
    """
    if makes != output:
        raise ValueError(f"{name} makes {makes}s: use visattn generate {makes}")


def check_content(name: str, takes: str, prompts: Sequence[str], labels: Sequence[int]) -> None:
    """Check what is to be drawn.

    Args:
        name: What errors call the pipeline.
        takes: PROMPT or LABELS.
        prompts: Texts that were given.
        labels: Class labels that were given.

    Raises:
        ValueError: If the pipeline takes the other, or lacks a prompt.
    """
    if takes == LABELS:
        if prompts:
            raise ValueError(f"{name} takes class labels and no prompt: pass --label 3 instead of --prompt")
        return
    if labels:
        raise ValueError(f"{name} takes a prompt and no class labels: pass --prompt TEXT instead of --label")
    if not prompts:
        raise ValueError(f"{name} needs a prompt: pass --prompt TEXT")


def check_sides(patch: int, **sides: int) -> None:
    """Check that pixel sizes are whole numbers of patches.

    Raises:
        ValueError: If one is not; the text gives the nearest that is.
    """
    for name, value in sides.items():
        if value < patch or value % patch:
            near = max(patch, round(value / patch) * patch)
            raise ValueError(f"{name} {value} is not a multiple of the patch size {patch}: pass e.g. {near}")


def check_settings(
    model: str,
    dtype: str | None,
    counts: Mapping[str, int | None],
    *,
    output: str | None = None,
    prompts: Sequence[str] = (),
    labels: Sequence[int] = (),
    guidance: float | None = None,
    size: tuple[int, int] | None = None,
    seed: int = 0,
) -> None:
    """Check all of the above that a command knows of a model that it has not loaded.

    Args:
        model: Name of the model.
        dtype: As in `check_dtype`.
        counts: As in `check_counts`.
        output: As in `check_output`; None takes either.
        prompts: As in `check_content`.
        labels: As in `check_content`.
        guidance: As in `check_guidance`.
        size: Height and width in pixels; None is the model's own.
        seed: As in `check_seeds`, of as many as "--count" says.

    Raises:
        ValueError: If something of it cannot be.
    """
    check_counts(counts)
    count = counts.get("--count") or 0
    for option, given in (("--prompt", prompts), ("--label", labels)):
        if 0 < count < len(given):
            few = f"--count {count} is less than the {len(given)} of {option}"
            raise ValueError(f"{few}: leave it out, or some of them")
    check_seeds(seed, count or 1)
    check_guidance(guidance)
    check_model(model)
    check_dtype(dtype)
    known = EMBEDDED.get(model)
    if known is not None:
        check_output(model, known.kind, output or known.kind)
        check_content(model, PROMPT if known.classes is None else LABELS, prompts, labels)
        if size is not None:
            check_sides(known.size[-1] // known.grid[-1], height=size[0], width=size[1])
