"""Caches what a distillation learns from: samples that the teacher's own pipeline makes, or a folder of images.

    python -m scripts.distill.cache_samples --model digits --labels 0-9 --count 1000 --steps 8 --out runs/digits-samples
    python -m scripts.distill.cache_samples --model black-forest-labs/FLUX.1-dev --prompts prompts.txt --count 10000 \
        --out runs/flux-samples --device cuda
    python -m scripts.distill.cache_samples --model digits --images pictures --out runs/picture-samples

Kept are the clean latents and all that the pipeline told its denoiser (embeddings, labels, guidance), so that training
needs neither text encoder nor VAE. With --images (models that work on pixels) the pictures are the clean samples; a
subfolder named by a number gives its pictures that label. Stop it at any time: the same command goes on.
"""

from __future__ import annotations

import inspect
import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from scripts import cli
from scripts.distill.capture import Capture, Told, find_denoiser
from scripts.distill.noise import KINDS
from scripts.distill.samples import LATENTS, Index, save_tensors, shard_path
from scripts.distill.settings import option, parse
from visattn.cli.generate_options import parse_labels, pixels
from visattn.cli.loading import loaded_pipeline
from visattn.environment import chosen_device
from visattn.files import read_text, read_values, write_json
from visattn.given import said
from visattn.pipelines.asked import check_dtype, check_guidance, check_model, check_sides
from visattn.pipelines.embedded import EMBEDDED

IMAGES = (".png", ".jpg", ".jpeg", ".webp")


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What to cache.

    Raises:
        ValueError: If a value is out of range, or two of them contradict each other.
    """

    out: Path = field(metadata={"help": "folder for the samples"})
    model: str = option("digits", "an embedded model, a folder in diffusers' format, or a hub id")
    count: int = option(1000, "samples; with --images, at most")
    labels: str | None = option(None, "class labels in a circle, like 0-9; embedded models: all of theirs")
    prompts: Path | None = option(None, "text file, one prompt a line, in a circle")
    images: Path | None = option(None, "folder of pictures instead of samples, for models that work on pixels")
    steps: int = option(0, "denoising steps; 0: the pipeline's own")
    guidance: float = option(-1.0, "guidance scale; -1: the pipeline's own")
    size: str | None = option(None, "pixels, like 64 or 512x768; the model's own")
    batch: int = option(16, "samples at once")
    shard: int = option(256, "samples of a file, a multiple of --batch")
    seed: int = option(0, "seed of the first sample; the next has the next seed")
    device: str = option("auto", "like cpu or cuda; auto takes a GPU if there is one")
    dtype: str | None = option(None, "float32 (the CPU's), bfloat16 (elsewhere), float16")
    threads: int = option(0, "threads of torch on the CPU; 0: its own choice")

    def __post_init__(self) -> None:
        for name in ("count", "batch", "shard"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name} {getattr(self, name)} must be at least 1")
        if self.shard % self.batch:
            raise ValueError(f"--shard {self.shard} must be a multiple of --batch {self.batch}")
        if self.steps < 0 or self.threads < 0:
            raise ValueError(f"--steps {self.steps} and --threads {self.threads} must not be below 0")
        if self.labels is not None and self.prompts is not None:
            raise ValueError("--labels and --prompts: a model takes one of them, leave the other out")
        for name, path in (("prompts", self.prompts), ("images", self.images)):
            if path is not None and not path.exists():
                raise ValueError(f"--{name} {path} does not exist: name what does")
        cli.check_seed(self.seed)
        check_guidance(self.guidance)
        if self.guidance < 0 and self.guidance != -1:
            raise ValueError(f"--guidance {self.guidance:g} must be at least 0, or -1 for the pipeline's own")
        if self.out.exists() and not self.out.is_dir():
            raise ValueError(f"--out {self.out} is a file: name a folder")
        if self.images is not None:
            list_images(self.images)
        check_model(self.model)
        check_dtype(self.dtype)
        self._check_known(parse_labels(self.labels), self._prompts(), pixels(self.size))

    def _check_known(self, labels: Sequence[int], prompts: Sequence[str], size: tuple[int, int] | None) -> None:
        """What is known of an embedded model before it is loaded."""
        known = EMBEDDED.get(self.model)
        if known is None:
            return
        if known.classes is None and not prompts:
            raise ValueError(f"{self.model} takes prompts: pass --prompts, a text file with one in each line")
        if known.classes is not None and prompts:
            raise ValueError(f"{self.model} takes class labels: pass --labels instead of --prompts")
        wrong = [label for label in labels if label >= (known.classes or 0)]
        if wrong:
            raise ValueError(f"--labels {self.labels}: {self.model} has labels from 0 to {(known.classes or 0) - 1}")
        if size is not None:
            check_sides(known.size[-1] // known.grid[-1], height=size[0], width=size[1])

    def _prompts(self) -> list[str]:
        """The lines of --prompts that are not empty; none without."""
        if self.prompts is None:
            return []
        if not self.prompts.is_file():
            raise ValueError(f"--prompts {self.prompts} is no file: pass a text file with a prompt in each line")
        lines = [line.strip() for line in read_text(self.prompts).splitlines() if line.strip()]
        if not lines:
            raise ValueError(f"--prompts {self.prompts} has no prompt: write one in each line")
        return lines

    @property
    def conditions(self) -> list[int] | list[str]:
        """Labels or prompts, in a circle."""
        if self.prompts is not None:
            return self._prompts()
        known = EMBEDDED.get(self.model)
        return list(parse_labels(self.labels) or range(known.classes if known and known.classes else 1))

    def to_json(self) -> dict[str, Any]:
        """What the samples depend on."""
        names = ("model", "count", "steps", "guidance", "size", "batch", "shard", "seed", "dtype")
        plain = {name: getattr(self, name) for name in names}
        return plain | {"images": str(self.images) if self.images else None, "conditions": self.conditions}


class Source:
    """Makes batches of samples with a pipeline; sample i depends on its seed alone.

    Raises:
        ValueError: If the pipeline does not take the settings.
    """

    def __init__(self, pipe: Any, settings: Settings) -> None:
        self.pipe, self.settings = pipe, settings
        self.denoiser, self.model, self.anchor = find_denoiser(pipe)
        self.takes = inspect.signature(pipe.__call__).parameters
        self.pictures = list_images(settings.images) if settings.images else []
        self.count = min(settings.count, len(self.pictures)) if self.pictures else settings.count
        if "callback_on_step_end" not in self.takes:
            raise ValueError(f"{type(pipe).__name__} has no callback_on_step_end: its latents cannot be seen")
        needed = "prompt" if "prompt" in self.takes else "class_labels"
        if (needed == "prompt") != (settings.prompts is not None):
            raise ValueError(
                f"{type(pipe).__name__} takes {needed}: pass {'--prompts' if needed == 'prompt' else '--labels'}"
            )
        if self.pictures and "vae" in pipe.components:
            raise ValueError(f"{type(pipe).__name__} works on latents: --images is for models that work on pixels")
        self.needed = needed

    def conditions(self, first: int, count: int) -> list[Any]:
        """Labels or prompts of some samples; a picture's label is the name of its folder."""
        own = self.settings.conditions
        found = [own[i % len(own)] for i in range(first, first + count)]
        for i, path in enumerate(self.pictures[first : first + count]):
            if path.parent.name.isdigit():
                found[i] = int(path.parent.name)
        return found

    def make(self, first: int, count: int) -> tuple[torch.Tensor, Told]:
        """Clean latents [count, ...] and what the denoiser was told."""
        settings = self.settings
        seeds = range(settings.seed + first, settings.seed + first + count)
        arguments: dict[str, Any] = {self.needed: self.conditions(first, count), "output_type": "pt"}
        arguments["generator"] = [torch.Generator("cpu").manual_seed(seed) for seed in seeds]
        if "vae" in self.pipe.components:
            arguments["output_type"] = "latent"
        if settings.steps or self.pictures:
            arguments["num_inference_steps"] = settings.steps or 1
        if settings.guidance >= 0:
            arguments["guidance_scale"] = settings.guidance
        if settings.size is not None:
            arguments["height"], arguments["width"] = pixels(settings.size)  # type: ignore[misc]
        with Capture(self.model, self.anchor) as capture, torch.no_grad():
            self.pipe(**arguments, callback_on_step_end=capture.step_end)
        assert capture.latents is not None
        if not capture.latents.isfinite().all():
            raise ValueError(
                f"samples from seed {seeds[0]} on are not finite: nothing can be learned from them, pass a smaller "
                "--guidance, or --dtype float32 or bfloat16"
            )
        latents, pack = capture.latents, getattr(self.pipe, "pack_latents", None) or (lambda latents: latents)
        told = capture.told(pack(latents))
        if self.pictures:
            latents = read_images(self.pictures[first : first + count], list(latents.shape[1:]))
        return pack(latents), told

    def index(self, told: Told) -> Index:
        """The index of the samples, still without shards."""
        kind = prediction_kind(self.pipe)
        times = [float(t) for t in self.pipe.scheduler.timesteps]
        settings = self.settings.to_json()
        return Index(
            model=settings["model"],
            denoiser=self.denoiser,
            anchor=self.anchor,
            time_scale=told.time_scale,
            kind=kind,
            timesteps=times,
            plain=told.plain,
            settings=settings,
        )


def prediction_kind(pipe: Any) -> str:
    """What a pipeline's denoiser predicts: what the pipeline itself says, or its scheduler's configuration.

    Raises:
        ValueError: If it is none of `noise.KINDS`.
    """
    scheduler = pipe.scheduler
    kind = getattr(pipe, "prediction_type", None) or scheduler.config.get("prediction_type", "flow_prediction")
    flow = "FlowMatch" in type(scheduler).__name__
    kind = "flow" if kind == "flow_prediction" or (flow and kind != "sample") else kind
    if kind not in KINDS:
        raise ValueError(f"{type(pipe).__name__} predicts {kind}: known are {', '.join(KINDS)}")
    return kind


def list_images(folder: Path) -> list[Path]:
    """Pictures of a folder and its subfolders, sorted.

    Raises:
        ValueError: If there is none.
    """
    found = sorted(path for path in folder.rglob("*") if path.suffix.lower() in IMAGES)
    if not found:
        raise ValueError(f"--images {folder} holds no {', '.join(IMAGES)}: name a folder with some")
    return found


def read_images(paths: list[Path], shape: list[int]) -> torch.Tensor:
    """Pictures as [B, C, H, W] with values -1 to 1, their shorter side scaled and the rest cut off."""
    import numpy as np
    from PIL import Image, ImageOps

    channels, height, width = shape
    rows = []
    for path in paths:
        try:
            with Image.open(path) as picture:
                fitted = ImageOps.fit(picture.convert("L" if channels == 1 else "RGB"), (width, height))
        except OSError as error:
            raise ValueError(f"{path} is no picture that can be read ({error}): take it out of the folder") from error
        pixel = torch.from_numpy(np.array(fitted, np.float32)).view(height, width, -1)
        rows.append(pixel.permute(2, 0, 1) / 127.5 - 1)
    return torch.stack(rows)


def shards(count: int, size: int) -> Iterator[tuple[int, int, int]]:
    """Number, first sample and samples of each shard."""
    for number in range(math.ceil(count / size)):
        yield number, number * size, min(size, count - number * size)


def begin(folder: Path, settings: dict[str, Any]) -> None:
    """Checks that the samples in a folder, if there are some, were made by the same settings; says so in the folder.

    Raises:
        ValueError: If they were not.
    """
    mine = folder / "settings.json"
    then = read_values(mine)
    other = [f"{k} {then.get(k)!r} then, {v!r} now" for k, v in settings.items() if then.get(k) != v]
    if other and any(folder.glob("shard-*")):
        raise ValueError(f"{folder} holds samples of other settings ({said(other)}): pass another --out")
    write_json(mine, settings)


def cache(source: Source, folder: Path, report: Any) -> Index:
    """Writes the shards that are missing, and the index at the end."""
    settings, index = source.settings, None
    plan = list(shards(source.count, settings.shard))
    for number, first, size in plan:
        last = number == len(plan) - 1
        # The last one is always made: the index needs what the pipeline told its denoiser.
        if shard_path(folder, number).is_file() and not last:
            continue
        found: dict[str, list[torch.Tensor]] = {}
        for start in range(0, size, settings.batch):
            latents, told = source.make(first + start, min(settings.batch, size - start))
            for name, value in ({LATENTS: latents} | told.tensors).items():
                found.setdefault(name, []).append(value.cpu())
            report(first + start + len(latents))
        if last:
            index = source.index(told)
            noise = None if index.kind == "flow" else getattr(source.pipe.scheduler, "alphas_cumprod", None)
            constants = told.constants | ({} if noise is None else {"noise.alphas": noise})
            save_tensors(folder / "constants.safetensors", constants)
        save_tensors(shard_path(folder, number), {name: torch.cat(values) for name, values in found.items()})
    assert index is not None
    index.shards.extend(size for _, _, size in plan)
    index.save(folder)
    return index


def main(arguments: list[str] | None = None) -> None:
    """Entry point."""
    from tqdm import tqdm

    with cli.told("cache_samples"):
        settings = parse(Settings, __doc__, arguments)
        chosen_device(settings.device)
        with cli.only_run(settings.out):
            begin(settings.out, settings.to_json())
            if (settings.out / "index.json").is_file():
                print(f"{settings.out} is whole already")
                return
            if settings.threads:
                torch.set_num_threads(settings.threads)
            pipe: Any = loaded_pipeline(settings.model, settings.device, settings.dtype, bars=False)
            source = Source(pipe, settings)
            with tqdm(total=source.count, unit="sample", disable=None, file=sys.stderr) as bar:
                index = cache(source, settings.out, lambda done: bar.update(done - bar.n))
        print(f"{sum(index.shards)} samples in {settings.out}, denoiser {index.denoiser}, {index.kind}")


if __name__ == "__main__":
    main()
