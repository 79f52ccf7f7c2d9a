"""Run a pipeline with a pattern, and beside it the dense twin from the same noise: time and distance of each."""

from __future__ import annotations

import inspect
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from visattn.handle import Handle, apply
from visattn.pipelines.alike import Alike
from visattn.pipelines.asked import (
    IMAGE,
    LABELS,
    PROMPT,
    VIDEO,
    check_content,
    check_counts,
    check_guidance,
    check_output,
    check_seeds,
)
from visattn.pipelines.embedded.pixel import PixelPipeline
from visattn.pipelines.patch.targets import DENOISERS
from visattn.report import Report
from visattn.trained import load_own, load_trained, trained_weights

SPARSE, DENSE = "sparse", "dense"


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What to generate.

    Attributes:
        pattern: A pattern's text, or the path of a JSON or YAML file with one per layer.
        output: IMAGE or VIDEO; below, "image" means either.
        prompts: Texts, for models that take one; image i gets prompt i, in a circle.
        labels: Class labels, for class-conditional models; image i gets label i, in a circle.
        seed: Of the first image; image i gets seed + i.
        count: Number of images.
        steps: Denoising steps, the pipeline's default if None.
        guidance: Guidance scale, the pipeline's default if None.
        size: (height, width) in pixels, the model's own if None.
        frames: Frames of a video, the model's own if None.
        layers: As in `visattn.apply`.
        dense_layers: As in `visattn.apply`.
        dense_steps: As in `visattn.apply`.
        dense_last_steps: As in `visattn.apply`.
        precision: As in `visattn.apply`.
        precise_layers: As in `visattn.apply`.
        precise_steps: As in `visattn.apply`.
        precise_last_steps: As in `visattn.apply`.
        backend: As in `visattn.apply`.
        weights: File of a distilled student, whose tensors the sparse runs have; see `visattn.trained`.
        compare: Whether the dense twin is generated too; it keeps the model's own weights.
        repeats: How often each image is generated; times are medians.
        parallel: As in `visattn.apply`.
    """

    pattern: str
    output: str = IMAGE
    prompts: tuple[str, ...] = ()
    labels: tuple[int, ...] = ()
    seed: int = 0
    count: int = 1
    steps: int | None = None
    guidance: float | None = None
    size: tuple[int, int] | None = None
    frames: int | None = None
    layers: str | None = None
    dense_layers: int = 0
    dense_steps: int | float = 0
    dense_last_steps: int | float = 0
    precision: str | None = None
    precise_layers: str | None = None
    precise_steps: int | float = 0
    precise_last_steps: int | float = 0
    backend: str = "auto"
    weights: str | None = None
    compare: bool = False
    repeats: int = 1
    parallel: str | None = None

    @property
    def seeds(self) -> tuple[int, ...]:
        """Seed of each image."""
        return tuple(range(self.seed, self.seed + self.count))


@dataclass(frozen=True, eq=False)
class Run:
    """One image, generated once.

    Attributes:
        kind: SPARSE or DENSE.
        image: Index of the image.
        repeat: Index of the repeat.
        pixels: [height, width, channels], or [frames, height, width, channels] of a video, values 0 to 1.
        seconds: Wall time of the pipeline call.
        report: What happened in its attention modules.
        divergence: Of a sparse run with a twin: distance of its latents from the twin's after each step, as a share
            of the twin's norm (L2); empty if the pipeline does not show its latents.
        shared_steps: First steps that the other run of the pair drew; their time and calls are counted here too.
    """

    kind: str
    image: int
    repeat: int
    pixels: NDArray[np.float32]
    seconds: float
    report: Report
    divergence: tuple[float, ...] = ()
    shared_steps: int = 0

    @property
    def attention_seconds(self) -> float:
        """Time inside the attention operations of the selected modules, whether sparse or dense."""
        return self.report.sparse_seconds + self.report.dense_seconds


def check(pipe: Any, settings: Settings) -> None:
    """Check that a pipeline takes these settings, before anything runs.

    Raises:
        ValueError: If it does not; the text says what would work.
    """
    name, takes = type(pipe).__name__, _parameters(pipe)
    check_counts({option: getattr(settings, option) for option in ("count", "repeats", "steps", "frames")})
    check_seeds(settings.seed, settings.count)
    check_guidance(settings.guidance)
    check_output(name, VIDEO if "num_frames" in takes else IMAGE, settings.output)
    content = next((each for each in (LABELS, PROMPT) if each in takes), None)
    if content is None:
        raise ValueError(f"{name} takes neither a prompt nor class labels: call visattn.apply on it in Python")
    check_content(name, content, settings.prompts, settings.labels)
    for value, parameter, option in (
        (settings.guidance, "guidance_scale", "--guidance"),
        (settings.size, "height", "--size"),
        (settings.steps, "num_inference_steps", "--steps"),
    ):
        if value is not None and parameter not in takes:
            raise ValueError(f"{name} has no {parameter}: leave {option} away")
    if isinstance(pipe, PixelPipeline):
        known = inspect.signature(pipe.check_inputs).parameters
        for image in range(settings.count):
            arguments = call_arguments(pipe, settings, image)
            pipe.check_inputs(**{key: value for key, value in arguments.items() if key in known})


def run_all(pipe: Any, settings: Settings, *, progress: bool = True) -> Iterator[Run]:
    """Generate every image, with its dense twin next to it where `settings.compare` asks for it.

    With a twin, both kinds first run `warm_up_steps` unmeasured (plans, compilation, first touch of memory), then take
    turns in changing order. The twin has the pattern "dense" at the same modules: its attention is the model's
    own, bit by bit, and is timed in the same way. First steps that are dense in both are drawn once for each pair,
    see `visattn.pipelines.alike`.

    Raises:
        ValueError: If the pipeline does not take the settings, or makes what is no picture.
    """
    check(pipe, settings)
    kinds = (SPARSE, DENSE) if settings.compare else (SPARSE,)
    if settings.compare:
        for kind in kinds:
            _run(pipe, settings, kind, 0, 0, f"warm-up, {kind}" if progress else None)
    for repeat in range(settings.repeats):
        for image in range(settings.count):
            pair, alike = [], Alike(pipe, steps_of(pipe, settings), steps_alike(pipe, settings))
            for kind in kinds[:: -1 if (repeat + image) % 2 else 1]:
                again = f", {repeat + 1} of {settings.repeats}" if settings.repeats > 1 else ""
                text = f"{settings.output} {image + 1} of {settings.count}, {kind}{again}"
                pair.append(_run(pipe, settings, kind, image, repeat, text if progress else None, alike))
            yield from _with_divergence(pair)


# What one run leaves: its result, and the latents after every step on the model's device.
Trail = list[torch.Tensor]


def warm_up_steps(pipe: Any) -> int:
    """Unmeasured steps before a comparison: on a CPU nothing compiles, and one has touched all memory."""
    return 1 if torch.device(pipe.device).type == "cpu" else 2


def steps_of(pipe: Any, settings: Settings) -> int:
    """Denoising steps of a run, 0 if the pipeline does not say."""
    parameter = inspect.signature(pipe.__call__).parameters.get("num_inference_steps")
    found = settings.steps or (None if parameter is None else parameter.default)
    return found if isinstance(found, int) else 0


def steps_alike(pipe: Any, settings: Settings) -> int:
    """How many steps, from the first one on, are the same work in a sparse run and its twin: those that stay dense.

    None are with trained weights, which only the sparse run has, nor on several devices.
    """
    if not settings.compare or settings.weights is not None or settings.parallel is not None:
        return 0
    steps, dense = steps_of(pipe, settings), settings.dense_steps
    return min(steps - 1, dense if isinstance(dense, int) else round(dense * steps)) if steps else 0


def _run(
    pipe: Any, settings: Settings, kind: str, image: int, repeat: int, text: str | None, alike: Alike | None = None
) -> tuple[Run, Trail]:
    """One run; without `alike` it is one to warm up, every step of which has the pattern."""
    pipe.set_progress_bar_config(desc=text, disable=text is None, leave=False, dynamic_ncols=True)
    arguments = call_arguments(pipe, settings, image)
    schedule: dict[str, Any] = {"layers": settings.layers}
    if kind == SPARSE:
        schedule |= {"dense_layers": settings.dense_layers, "backend": settings.backend}
        schedule |= {"precision": settings.precision, "precise_layers": settings.precise_layers}
        if alike is not None:
            schedule |= {"dense_steps": settings.dense_steps, "dense_last_steps": settings.dense_last_steps}
            schedule |= {"precise_steps": settings.precise_steps, "precise_last_steps": settings.precise_last_steps}
    if alike is None and "num_inference_steps" in _parameters(pipe):
        arguments["num_inference_steps"] = warm_up_steps(pipe)
    trail: Trail = []
    if settings.compare and alike is not None:
        arguments |= _record(pipe, trail, alike)
    with nullcontext() if alike is None else alike.run(), _patched(pipe, settings, kind, schedule) as handle:
        _wait(pipe)
        if alike is not None:
            alike.begin(handle.report)
        start = time.perf_counter()
        output = pipe(**arguments)
        _wait(pipe)
        seconds, report, shared = time.perf_counter() - start, handle.report(), 0
    if alike is not None:
        seconds, report, shared = alike.whole(seconds, report)
    pixels = np.asarray((output.frames if settings.output == VIDEO else output.images)[0], np.float32)
    if not np.isfinite(pixels).all():
        # As a file they would be black, and a twin that is broken alike would count as equal.
        raise ValueError(
            f"the {kind} {settings.output} {image} has pixels that are no numbers: {type(pipe).__name__} overflows in "
            f"{str(pipe.dtype).removeprefix('torch.')}, try --dtype bfloat16 or float32"
        )
    return Run(kind, image, repeat, pixels, seconds, report, shared_steps=shared), trail


@contextmanager
def _patched(pipe: Any, settings: Settings, kind: str, schedule: dict[str, Any]) -> Iterator[Handle]:
    """The pipeline with its pattern, and with the trained weights if they are asked for."""
    trained = load_trained(Path(settings.weights)) if settings.weights and kind == SPARSE else None
    pattern = settings.pattern if kind == SPARSE else DENSE
    weights = trained_weights(denoiser(pipe), trained) if trained else nullcontext()
    # What is shown is the pattern, and the models that come along were trained with theirs.
    given = schedule | {"always": True, "parallel": settings.parallel, "untrained": trained is not None}
    with weights, apply(pipe, pattern, **given) as handle:
        if trained:
            load_own(handle, trained)
        yield handle


def denoiser(pipe: Any) -> torch.nn.Module:
    """The one model of a pipeline that denoises, which trained weights are for.

    Raises:
        ValueError: If there are several.
    """
    found = [getattr(pipe, name) for name in DENOISERS if isinstance(getattr(pipe, name, None), torch.nn.Module)]
    if len(found) != 1:
        name = type(pipe).__name__
        raise ValueError(f"{name} has {len(found)} denoising models, and weights are for one: leave --weights away")
    return found[0]


def _record(pipe: Any, trail: Trail, alike: Alike) -> dict[str, Any]:
    """Arguments that make a pipeline tell the end of every step and put its latents on the trail; none if it cannot."""
    if "callback_on_step_end" not in _parameters(pipe) or "latents" not in pipe._callback_tensor_inputs:
        return {}

    def keep(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        # A copy on the device: waiting for the CPU here would be in the time of the run.
        trail.append(tensors["latents"].detach().clone())
        if step == alike.last:
            _wait(pipe)
            alike.part()
        return {}

    return {"callback_on_step_end": keep, "callback_on_step_end_tensor_inputs": ["latents"]}


def _with_divergence(pair: Sequence[tuple[Run, Trail]]) -> Iterator[Run]:
    """The runs of one image; the sparse one learns how far it went from its twin, and the trails are let go."""
    trails = {run.kind: trail for run, trail in pair}
    found = tuple(
        ((sparse.double() - dense.double()).norm() / dense.double().norm()).item()
        for sparse, dense in zip(trails[SPARSE], trails.get(DENSE, []), strict=False)
    )
    for run, _ in pair:
        yield replace(run, divergence=found) if run.kind == SPARSE else run


def call_arguments(pipe: Any, settings: Settings, image: int) -> dict[str, Any]:
    """Keyword arguments of the pipeline call for one image; what the user left open stays the pipeline's default."""
    arguments: dict[str, Any] = {"output_type": "np"}
    # Noise from the CPU is the same for every device, and for the twin.
    arguments["generator"] = torch.Generator("cpu").manual_seed(settings.seeds[image])
    if settings.prompts:
        arguments["prompt"] = prompt_of(settings, image)
    else:
        arguments["class_labels"] = [label_of(settings, image)]
    if settings.size is not None:
        arguments["height"], arguments["width"] = settings.size
    for name, value in (
        ("num_inference_steps", settings.steps),
        ("guidance_scale", settings.guidance),
        ("num_frames", settings.frames),
    ):
        if value is not None:
            arguments[name] = value
    return arguments


def prompt_of(settings: Settings, image: int) -> str:
    """Prompt of an image: the given ones in a circle."""
    return settings.prompts[image % len(settings.prompts)]


def label_of(settings: Settings, image: int) -> int:
    """Class label of an image: the given ones in a circle, or 0, 1, 2, ..."""
    return settings.labels[image % len(settings.labels)] if settings.labels else image


def _parameters(pipe: Any) -> Sequence[str]:
    return list(inspect.signature(pipe.__call__).parameters)


def _wait(pipe: Any) -> None:
    if torch.device(pipe.device).type == "cuda":
        torch.cuda.synchronize(pipe.device)
