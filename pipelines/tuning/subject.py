"""A diffusers pipeline as the subject of a search."""

from __future__ import annotations

import contextlib
import inspect
import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch

from visattn.environment import cpu_name, versions
from visattn.handle import apply
from visattn.metrics import SSIM_SIDE, psnr, ssim
from visattn.patterns import Pattern, SharingPattern
from visattn.pipelines.patch import targets
from visattn.pipelines.played import Played
from visattn.pipelines.record import EVERYTHING
from visattn.pipelines.report.lpips import find_lpips
from visattn.pipelines.tuning.local import Probe
from visattn.pipelines.tuning.projection import projection
from visattn.request import Request
from visattn.schedule import Schedule
from visattn.staged import Staged
from visattn.tally import all_timed
from visattn.tuning.places import Only, by_layer, names_at
from visattn.tuning.plan import stages_of
from visattn.tuning.subject import DENSE, Assignment, Local, Outcome
from visattn.watch import Watched

# Sets of dense twins that are kept, as pictures in memory.
TWINS = 4


class _Enough(Exception):
    """The step that was asked for is over."""


@dataclass(frozen=True)
class Samples:
    """What is generated.

    Attributes:
        prompts: Texts, or class labels as numbers; the sample of seed s has number s of them, in a circle.
        steps: Denoising steps, the pipeline's default if None.
        guidance: Guidance scale, likewise.
        size: (height, width) in pixels, likewise.
        frames: Frames of a video, likewise.
        batch: Samples at once.
    """

    prompts: tuple[str, ...] | tuple[int, ...]
    steps: int | None = None
    guidance: float | None = None
    size: tuple[int, int] | None = None
    frames: int | None = None
    batch: int = 4


class PipelineSubject:
    """See `visattn.tuning.subject.Subject`."""

    measure = "psnr"

    def __init__(
        self, pipe: Any, samples: Samples, name: str = "", backend: str = "auto", only: Only = MappingProxyType({})
    ) -> None:
        """Look at a pipeline.

        Args:
            pipe: The pipeline.
            samples: What is generated.
            name: Of the model, as it was asked for.
            backend: "auto" or the name of a backend.
            only: Candidates that are for some layers alone, see `visattn.tuning.places`.

        Raises:
            ValueError: If it has several kinds of denoising models, which a schedule cannot tell apart, or no layer
                that a candidate is for.
        """
        self.pipe, self.samples, self.name, self.backend = pipe, samples, name, backend
        found = targets.find(pipe, Request(Schedule.of(DENSE)))
        self._models = [(one.model, one.family.find_sites(one.model)) for one in found]
        self._layers = list(dict.fromkeys(site.layer for site, _ in self._models[0][1]))
        self._only = by_layer(only, self._layers, {site.path: site.layer for site, _ in self._models[0][1]})
        self.model = type(found[0].model).__name__
        kinds = {(type(m).__name__, tuple(site.path for site, _ in sites)) for m, sites in self._models}
        if len(kinds) > 1:
            raise ValueError(f"{type(pipe).__name__} has {len(kinds)} kinds of denoising models: a schedule is for one")
        self.layers = len(self._layers)
        self.parameters = sum(each.numel() for each in found[0].model.parameters())
        parameters = inspect.signature(pipe.__call__).parameters
        self.steps = samples.steps or parameters["num_inference_steps"].default
        self._video = "num_frames" in parameters
        self._labels = "class_labels" in parameters
        self._twins: dict[tuple[int, ...], torch.Tensor] = {}
        # What the models gave in the dense run that injections begin like, and of which samples that was.
        self._played: tuple[tuple[int, ...], Played] | None = None
        # Patterns that have run with so many samples: nothing of them is left to be compiled.
        self._warm: set[tuple[Pattern, int]] = set()
        self._lpips = find_lpips()[0]
        self.grid = self._find_grid()

    @property
    def device(self) -> torch.device:
        """See `Subject.device`."""
        return torch.device(self.pipe.device)

    def about(self) -> dict[str, Any]:
        """See `Subject.about`."""
        device = self.device
        given = {k: v for k, v in vars(self.samples).items() if v is not None}
        return {
            "model": self.name or self.model,
            "grid": list(self.grid),
            "steps": self.steps,
            "samples": given,
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name(),
            "dtype": str(self.pipe.dtype).removeprefix("torch."),
            "torch": versions()["torch"],
        }

    def local(
        self, step: int, candidates: Sequence[str], seeds: Sequence[int], timed: Collection[str]
    ) -> list[dict[str, Local]]:
        """See `Subject.local`."""
        model = self._models[0][0]
        of_site = {site.path: names_at(site.layer, candidates, self._only) for site, _ in self._models[0][1]}
        probe = Probe(candidates, step, lambda path, channels: projection(model, path, channels), timed, of_site)
        self._watch(probe, step, seeds)
        found = probe.found
        result: list[dict[str, Local]] = []
        for layer in self._layers:
            sites = [found[site.path] for site, _ in self._models[0][1] if site.layer == layer and site.path in found]
            names = [name for name in candidates if sites and all(name in each for each in sites)]
            result.append(
                {
                    n: Local(sum(each[n].error for each in sites), sum(each[n].seconds for each in sites))
                    for n in names or [DENSE]
                    if sites
                }
                or {DENSE: Local(0.0, 0.0)}
            )
        return result

    def outcome(
        self, edges: Sequence[float], assignment: Assignment, seeds: Sequence[int], timed: bool = True
    ) -> Outcome:
        """See `Subject.outcome`."""
        schedule = schedule_of(edges, assignment)
        if timed:
            return self.outcome_of(schedule, seeds)
        twins, played = self._played_twins(seeds)
        with played.until(self._dense_steps(edges, assignment)):
            pictures, seconds, attention = self.run(schedule, seeds)
        # What is not timed says how far outputs are moved, for which the error is enough.
        quality = self.quality(pictures, twins, perceived=False)
        return Outcome(*quality, seconds / len(seeds), attention / len(seeds))

    def outcome_of(self, schedule: Schedule, seeds: Sequence[int]) -> Outcome:
        """Quality beside the dense twins, and times, of samples with a schedule."""
        twins = self.twins(seeds)
        self._warm_up(schedule, seeds)
        pictures, seconds, attention = self.run(schedule, seeds)
        return Outcome(*self.quality(pictures, twins), seconds / len(seeds), attention / len(seeds))

    def twins(self, seeds: Sequence[int]) -> torch.Tensor:
        """The samples [N, frames, C, H, W] without any pattern."""
        key = tuple(seeds)
        if key not in self._twins:
            while len(self._twins) >= TWINS:
                del self._twins[next(iter(self._twins))]
            self._twins[key] = self.run(Schedule.of(DENSE), seeds)[0]
        return self._twins[key]

    def _played_twins(self, seeds: Sequence[int]) -> tuple[torch.Tensor, Played]:
        """Dense twins, and what the models gave in their run."""
        key = tuple(seeds)
        if self._played is None or self._played[0] != key:
            compiled = any(hasattr(each, "_orig_mod") for each in self.pipe.components.values())
            models = [] if compiled else [model for model, _ in self._models]
            played = Played(models, self.steps, -(-len(key) // self.samples.batch))
            self._twins.pop(key, None)
            with played.recorded():
                self.twins(seeds)
            self._played = key, played
        return self.twins(seeds), self._played[1]

    def _dense_steps(self, edges: Sequence[float], assignment: Assignment) -> int:
        """Steps from the first one on in which an assignment is dense everywhere."""
        stages = len(edges) - 1
        first = next((s for s in range(stages) if any(row[s] != DENSE for row in assignment)), stages)
        return round(edges[first] * self.steps)

    def quality(
        self, pictures: torch.Tensor, twins: torch.Tensor, perceived: bool = True
    ) -> tuple[tuple[float, ...], tuple[float, ...], tuple[float, ...]]:
        """PSNR of each sample, over all its frames, and if `perceived` means of SSIM and LPIPS over them."""
        found: tuple[list[float], list[float], list[float]] = ([], [], [])
        for one, other in zip(pictures, twins, strict=True):
            # All frames above each other: the error is over all of them.
            here = [x.to(self.device) for x in (one, other)]
            whole = [x.transpose(0, 1).flatten(1, 2)[None] for x in here]
            found[0].append(float(psnr(*whole)[0]))
            if not perceived:
                continue
            if min(one.shape[-2:]) >= SSIM_SIDE:
                found[1].append(float(ssim(*here).mean()))
            if self._lpips is not None:
                found[2].append(float(self._lpips(one, other).mean()))
        return tuple(found[0]), tuple(found[1]), tuple(found[2])

    def run(self, schedule: Schedule, seeds: Sequence[int]) -> tuple[torch.Tensor, float, float]:
        """Generate.

        Returns:
            Samples [N, frames, C, H, W] with values 0 to 1 on the CPU, wall time, and time in attention.
        """
        parts, seconds = [], 0.0
        with torch.no_grad(), all_timed(), apply(self.pipe, schedule, backend=self.backend, always=True) as handle:
            for first in range(0, len(seeds), self.samples.batch):
                self._wait()
                start = time.perf_counter()
                output = self.pipe(**self.arguments(seeds[first : first + self.samples.batch]))
                self._wait()
                seconds += time.perf_counter() - start
                found = torch.as_tensor(output.frames if self._video else output.images)
                found = found if self._video else found[:, None]
                parts.append(found.float().movedim(-1, -3))
            report = handle.report()
        return torch.cat(parts), seconds, report.sparse_seconds + report.dense_seconds

    def _warm_up(self, schedule: Schedule, seeds: Sequence[int]) -> None:
        """Run a short run where patterns are new for a number of samples: what is timed compiles and plans nothing."""
        batch, rest = self.samples.batch, len(seeds) % self.samples.batch
        for count in {min(batch, len(seeds)), rest} - {0}:
            new = {(pattern, count) for pattern in schedule.patterns} - self._warm
            if not new:
                continue
            edges = {edge for staged in schedule.staged for stage in staged.stages for edge in (stage.first, stage.end)}
            # A step of each stage: those that take what one chose run the same kernels. Those that share what one
            # computed run others, and the last step of a run keeps nothing.
            each = 2 if any(isinstance(pattern, SharingPattern) for pattern in schedule.patterns) else 1
            steps = min(self.steps, each * max(1, len(edges) - 1))
            with torch.no_grad(), apply(self.pipe, schedule, backend=self.backend, always=True):
                self.pipe(**self.arguments(seeds[:count]) | {"num_inference_steps": steps})
            self._warm |= new

    def arguments(self, seeds: Sequence[int]) -> dict[str, Any]:
        """Of a call of the pipeline for some samples."""
        prompts, given = self.samples.prompts, self.samples
        chosen = [prompts[seed % len(prompts)] for seed in seeds]
        made: dict[str, Any] = {"class_labels" if self._labels else "prompt": chosen, "output_type": "np"}
        # Noise from the CPU is the same on every device.
        made["generator"] = [torch.Generator("cpu").manual_seed(seed) for seed in seeds]
        if given.size is not None:
            made["height"], made["width"] = given.size
        rest = {"num_inference_steps": given.steps, "guidance_scale": given.guidance, "num_frames": given.frames}
        return made | {name: value for name, value in rest.items() if value is not None}

    def _watch(self, watcher: Any, step: int, seeds: Sequence[int]) -> None:
        """Show a watcher the calls of a dense run, up to a step."""

        def watch(watched: Watched) -> None:
            if watched.step is not None and watched.step > step:
                raise _Enough
            watcher(watched)

        with torch.no_grad(), apply(self.pipe, EVERYTHING) as handle:
            handle.watch(watch)
            with contextlib.suppress(_Enough):
                self.pipe(**self.arguments(seeds[: self.samples.batch]))
        # A run that did not end leaves caches in the middle of a step.
        for model, _ in self._models:
            reset: Any = getattr(model, "_reset_stateful_cache", None)
            if reset is not None:
                reset()

    def _find_grid(self) -> tuple[int, ...]:
        grids: list[tuple[int, ...]] = []

        def look(watched: Watched) -> None:
            grids.append(watched.layouts[0].grid)
            if len(grids) >= self.layers:
                raise _Enough

        self._watch(look, 0, (0,))
        if not grids:
            raise ValueError(f"no attention of {self.model} can run a pattern: `visattn doctor --model` says why")
        # Levels of a UNet have coarser ones.
        return max(grids)

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def schedule_of(edges: Sequence[float], assignment: Assignment) -> Schedule:
    """The schedule of an assignment; layers with equal rows share one rule."""
    rows: dict[Staged, list[int]] = {}
    for layer, row in enumerate(assignment):
        rows.setdefault(Staged.of(stages_of(edges, row)), []).append(layer)
    return Schedule(tuple((tuple(layers), staged) for staged, layers in rows.items()))
