"""What draws the captions of a judge with a pattern: a model as it ships, or a student of it."""

from __future__ import annotations

import argparse
import hashlib
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from scripts.measure.emoji_judge import Judge
from scripts.measure.emoji_prompts import KINDS
from visattn import apply
from visattn.canvas import row

DENSE, SHIPPED = "dense", "shipped"
SHOWN, SHOWN_SIDE = 8, 128
WARM_UP_STEPS = 2


@dataclass(frozen=True)
class Student:
    """What runs: a pattern, with the model's own weights or trained ones, behind some steps of dense attention."""

    pattern: str
    weights: Path | None = None
    dense_steps: int = 0

    @property
    def name(self) -> str:
        """Name of the weights."""
        return SHIPPED if self.weights is None else self.weights.parent.name

    @property
    def hash(self) -> str | None:
        """What tells these weights from others of the same name; none of the model's own."""
        return None if self.weights is None else hashlib.sha256(self.weights.read_bytes()).hexdigest()[:12]

    def key(self, size: int) -> str:
        """Of the row in the results."""
        behind = f", {self.dense_steps} dense steps" if self.dense_steps else ""
        return f"{self.pattern}, {size} px, {self.name}{behind}"


@dataclass(frozen=True, eq=False)
class Drawn:
    """Pictures [N, 3, size, size] by kind of captions, values 0 to 1 on the CPU; seconds and density."""

    pictures: dict[str, torch.Tensor]
    seconds: float
    attention_seconds: float
    density: float | None
    backends: list[str]


class Draftsman:
    """Draws all captions of a judge with a pattern, always from the same noise.

    Args:
        pipe: The pipeline.
        judge: Has the captions.
        options: Steps, guidance, batch, seed of the command line.
    """

    def __init__(self, pipe: Any, judge: Judge, options: argparse.Namespace) -> None:
        self.pipe, self.judge, self.options = pipe, judge, options

    def draw(self, student: Student, size: int, count: int | None = None, kinds: Iterable[str] = KINDS) -> Drawn:
        """Pictures of every caption, or of the first so many of each kind, or of some kinds."""
        options, batch = self.options, self.batch(size)
        with patched(self.pipe, student, options.backend) as handle:
            self.call(self.judge.captions(next(iter(KINDS)))[:batch], 0, size, WARM_UP_STEPS)
            before = handle.report()
            start, made = time.perf_counter(), {}
            for number, kind in enumerate(kinds):
                captions = self.judge.captions(kind)[:count]
                parts = []
                for first in range(0, len(captions), batch):
                    some = captions[first : first + batch]
                    parts.append(self.call(some, options.seed + number * 100_000 + first, size, options.steps))
                made[kind] = torch.cat(parts)
            seconds, after = time.perf_counter() - start, handle.report()
        inside = [each.sparse_seconds + each.dense_seconds for each in (before, after)]
        backends = sorted({call.backend for site in after.sites for call in site.calls})
        density = 1.0 if student.pattern == DENSE else after.density
        drawn = sum(len(pictures) for pictures in made.values())
        return Drawn(made, seconds / drawn, (inside[1] - inside[0]) / drawn, density, backends)

    def batch(self, size: int) -> int:
        """Samples that are drawn at once."""
        return max(1, 256 * 256 * self.options.batch // size**2)

    def shape(self, size: int) -> tuple[int, ...]:
        """Of the noise of one sample."""
        return (3, size, size)

    def sheet(self, drawn: Drawn) -> Image.Image:
        """The first samples of each kind."""
        return row([_picture(each) for some in drawn.pictures.values() for each in some[:SHOWN]], gap=4)

    def call(self, captions: Sequence[str], seed: int, size: int, steps: int) -> torch.Tensor:
        """Pictures of some captions; the noise of each has a seed of its own."""
        noise = [
            torch.randn(1, *self.shape(size), generator=torch.Generator().manual_seed(seed + i))
            for i in range(len(captions))
        ]
        sizes = {"height": size, "width": size, "num_inference_steps": steps}
        output = self.pipe(
            captions, latents=torch.cat(noise), guidance_scale=self.options.guidance, output_type="pt", **sizes
        )
        return output[0].float().cpu()


def _picture(pixels: torch.Tensor) -> Image.Image:
    """[3, H, W], values 0 to 1, at SHOWN_SIDE."""
    whole = Image.fromarray((pixels * 255).round().byte().permute(1, 2, 0).numpy())
    return whole.resize((SHOWN_SIDE, SHOWN_SIDE), Image.Resampling.BOX)


@contextmanager
def patched(pipe: Any, student: Student, backend: str) -> Iterator[Any]:
    """The pipeline with a pattern and its weights; dense by visattn too, so that its attention is timed alike."""
    if student.weights is None:
        with apply(
            pipe,
            student.pattern,
            backend="auto" if student.pattern == DENSE else backend,
            strict=True,
            untrained=True,
            dense_steps=student.dense_steps,
        ) as handle:
            yield handle
        return
    with apply(pipe, student.weights, backend=backend, strict=True, dense_steps=student.dense_steps) as handle:
        yield handle
