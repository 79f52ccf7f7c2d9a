"""A denoiser's student: where it attends otherwise, what of it learns, and its losses."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from scripts.distill.config import Config
from scripts.distill.forcing import Forcing
from scripts.distill.learner import Learner, add_lora
from scripts.distill.losses import Recorder, attention_distance, distance
from scripts.distill.masses import Masses
from scripts.distill.noise import Noise
from scripts.distill.ranges import at
from scripts.distill.samples import SampleSet, nested, ready, sent
from scripts.distill.stages import parse_stages, stage_at
from visattn.patterns import Dense
from visattn.pipelines.families import find_family
from visattn.schedule import Schedule
from visattn.straight import straight_through

# Module names of each projection in diffusers' attention classes; fused ones train all three.
MODULES = {"q": ("to_q", "to_qkv"), "k": ("to_k", "to_qkv"), "v": ("to_v", "to_qkv"), "out": ("to_out.0",)}

# Steps in which a temperature falls.
TEMPERATURES = 4


@dataclass(frozen=True)
class Batch:
    """One batch on the device.

    Attributes:
        noisy: What the denoiser sees [B, ...].
        target: What it should predict [B, ...].
        times: The denoiser's time [B].
        arguments: Its other arguments.
        places: Queries whose attention rows are matched, as shares of the tokens [R].
        weights: Of each sample's squared error [B], None for equal ones.
    """

    noisy: torch.Tensor
    target: torch.Tensor
    times: torch.Tensor
    arguments: dict[str, Any]
    places: torch.Tensor
    weights: torch.Tensor | None = None


class Distiller(Learner):
    """A denoiser and its student.

    Args:
        teacher: The denoiser, on the device.
        anchor: Its argument with the noisy latents.
        config: Settings.
        mesh: The processes that share each sample's tokens.

    Raises:
        ValueError: If the pattern, the layers or the projections do not fit the model.
    """

    config: Config

    def __init__(self, teacher: nn.Module, anchor: str, config: Config, mesh: Any = None) -> None:
        super().__init__(teacher, config)
        self.anchor = anchor
        self.sites = selected_sites(self.student, config)
        if config.checkpointing:
            _checkpoint(self.student)
        learning = projections(self.sites, config)
        self.lora = add_lora(self.student, list(learning), config) if config.lora else []
        self.swap(*(() if mesh is None else (config.parallel, mesh)))
        self._among = None if mesh is None else mesh.get_group()
        for module in () if config.lora else [self.student] if config.train == "all" else learning.values():
            module.requires_grad_(True)
        watched = [path for path, _ in matched_sites(teacher, self.sites, config)]
        before = config.attention_at == "before"
        self._seen = [Recorder({p: m.get_submodule(p) for p in watched}, before) for m in (teacher, self.student)]
        if config.maps:
            self.watch_rows(list(self.sites))
        self._masses = Masses()
        if config.mass:
            self.watch((self._masses.teacher, self._masses.student), list(self.sites))
        self._forcing = Forcing(teacher, self.student, self.sites) if config.staged else None
        self._stages = parse_stages(config.stages)
        # As the optimizer is made: all that learns at some time does.
        self.stage, self._done = self._stages[-1], 0.0

    def reach(self, done: float) -> bool:
        """See `Learner.reach`."""
        super().reach(done)
        self._done, before, self.stage = done, self.stage, stage_at(self._stages, done)
        if self.stage == before:
            return False
        for name, parameter in self._learning.items():
            parameter.requires_grad_(self.stage.whole or name.startswith("own."))
        return True

    @property
    def _temperature(self) -> float:
        """Of --mass, in steps: between them a forward does the same, and recorded ones go on."""
        return float(at(self.config.temperature, round(self._done * TEMPERATURES) / TEMPERATURES))

    @property
    def phase(self) -> Any:
        """See `Learner.phase`."""
        return self.pattern, self.stage, self._temperature

    def stage_share(self, done: float) -> float:
        """See `Learner.stage_share`."""
        return (done - self.stage.start) / (self.stage.end - self.stage.start)

    def trained(self) -> dict[str, nn.Parameter]:
        """See `Learner.trained`."""
        self._learning = super().trained()
        return self._learning

    def forward(self, batch: Batch) -> dict[str, torch.Tensor]:
        """Losses of a batch, without their weights; those of weight 0 are left out."""
        config, losses, forced, temperature = self.config, {}, self.stage.forced, self._temperature
        with (
            self._forcing.active(forced) if self._forcing else nullcontext(),
            self._masses.of(batch.places[: config.mass_blocks], temperature) if config.mass else nullcontext(),
        ):
            truth = expected = None
            if config.output or config.attention or config.maps or config.mass:
                with torch.no_grad(), self._rows[0].of(batch.places):
                    truth, expected = self._predict(self.teacher, self._seen[0], batch)
            with self._rows[1].of(batch.places), straight_through():
                predicted, attended = self._predict(self.student, self._seen[1], batch)
        if config.denoising and not forced:
            losses["denoising"] = distance(predicted, batch.target, batch.weights)
        if config.output and not forced:
            assert truth is not None
            losses["output"] = self._output_distance(predicted, truth, batch.weights)
        if config.attention:
            assert expected is not None
            self._check_slabs()
            relative = config.attention_scale == "relative"
            losses["attention"] = attention_distance(attended, expected, relative, self._among)
        if config.maps:
            losses["maps"] = self.row_distance()
        if config.mass:
            losses["mass"] = self._masses.loss()
        return losses

    def _output_distance(
        self, predicted: torch.Tensor, truth: torch.Tensor, weights: torch.Tensor | None
    ) -> torch.Tensor:
        """Distance of predictions; under guidance of what it makes of each pair, without and with the condition."""
        scale = self.config.guidance
        if not scale:
            return distance(predicted, truth, weights)
        ours, theirs = (torch.lerp(x[::2], x[1::2], scale) for x in (predicted, truth))
        return distance(ours, theirs, None if weights is None else weights[::2])

    def _check_slabs(self) -> None:
        """See that no process's attention outputs hold tokens that others have too.

        Raises:
            ValueError: If they do.
        """
        if self._among is None:
            return
        layouts = {call.problem.layout for site in self.handle.report().sites for call in site.calls}
        joint = next((layout for layout in layouts if layout.prefix or layout.suffix), None)
        if joint is not None:
            raise ValueError(
                f"--attention with --sequence: attention outputs on {joint} hold text, which every process has: pass "
                "--attention 0"
            )

    def _predict(
        self, model: nn.Module, recorder: Recorder, batch: Batch
    ) -> tuple[torch.Tensor, Mapping[str, torch.Tensor]]:
        """What a denoiser predicts, and its attention outputs."""
        arguments = {self.anchor: batch.noisy, "timestep": batch.times, "return_dict": False} | batch.arguments
        with recorder:
            out = model(**arguments)[0].float()
        # Models that also predict a variance put it behind the rest.
        if out.shape[1] == 2 * batch.target.shape[1]:
            out = out.chunk(2, dim=1)[0]
        return out, recorder.kept


def _checkpoint(model: Any) -> None:
    if not getattr(model, "_supports_gradient_checkpointing", False):
        raise ValueError(f"{type(model).__name__} knows no gradient checkpointing: leave --checkpointing away")
    model.enable_gradient_checkpointing()


def selected_sites(model: nn.Module, config: Config) -> dict[str, nn.Module]:
    """The attention modules that get the pattern, by path."""
    return {path: module for path, module, pattern in _assigned(model, config) if not isinstance(pattern, Dense)}


def _assigned(model: nn.Module, config: Config) -> list[tuple[str, nn.Module, Any]]:
    family = find_family(model)
    if family is None:
        raise ValueError(
            f"{type(model).__name__} is no model class that visattn.apply knows: `visattn models` lists them"
        )
    found = family.find_sites(model)
    schedule = Schedule.of(config.pattern_ends[0], config.layers, config.dense_layers)
    patterns = schedule.assign([site for site, _ in found], type(model).__name__)
    return [(s.path, module, p) for (s, module), p in zip(found, patterns, strict=True) if p is not None]


def matched_sites(model: nn.Module, sites: Mapping[str, nn.Module], config: Config) -> list[tuple[str, nn.Module]]:
    """The attention modules whose outputs are matched."""
    if config.attention_layers is None:
        return list(sites.items())
    family = find_family(model)
    assert family is not None
    found = family.find_sites(model)
    picked = Schedule.of("dense", config.attention_layers).assign([s for s, _ in found], type(model).__name__)
    return [(s.path, module) for (s, module), p in zip(found, picked, strict=True) if p is not None]


def projections(sites: Mapping[str, nn.Module], config: Config) -> dict[str, nn.Module]:
    """The projections that are trained, by path; projections of text tokens stay as they are.

    Raises:
        ValueError: If a module has none of them.
    """
    found: dict[str, nn.Module] = {}
    for path, module in sites.items():
        names = dict.fromkeys(name for part in config.projections for name in MODULES[part])
        own = {name: child for name, child in module.named_modules() if name in names}
        if names and not own:
            raise ValueError(f"{path} ({type(module).__name__}) has none of {', '.join(names)}: pass --train none")
        found |= {f"{path}.{name}": child for name, child in own.items()}
    return found


def build_batch(
    samples: SampleSet, noise: Noise, config: Config, step: int, part: slice, device: torch.device
) -> Batch:
    """A part of the batch of a step; it depends on seed and step alone, not on how many processes share it."""
    generator = torch.Generator().manual_seed(config.seed * 1_000_003 + step)
    # Under guidance both rows of a sample, the one without a condition first, with the same noise.
    each = 2 if config.guidance else 1
    if (part.stop - part.start) % each:
        raise ValueError(
            f"--guidance {config.guidance:g} runs pairs, and a process has {part.stop - part.start} samples"
        )
    count = config.batch // each
    picks = torch.randint(len(samples), (count,), generator=generator).repeat_interleave(each)[part].tolist()
    rows = torch.rand(count, generator=generator).repeat_interleave(each)[part]
    if config.guidance:
        null = samples.null_row
        rows = torch.tensor([0.25 + 0.5 * null, 0.75 - 0.5 * null]).repeat(len(rows) // 2)
    drawn = noise.draw(count, config.times, generator).repeat_interleave(each)[part]
    times, weights = sent(drawn, device), noise.weights(drawn, config.errors)
    latents, tensors = samples.take(picks, rows, device)
    # A GPU draws the noise itself: a CPU takes longer for it than some models for their step.
    there = torch.Generator(device).manual_seed(generator.initial_seed()) if device.type == "cuda" else generator
    dirt = torch.randn((count, *latents.shape[1:]), generator=there, device=device)
    places = sent(torch.rand(config.map_rows, generator=generator), device)
    noisy, target, told = noise.mix(latents.float(), dirt.repeat_interleave(each, 0)[part], times)
    flat = {name: ready(value, device) for name, value in tensors.items()} | samples.told(device)
    return Batch(
        noisy,
        target,
        told,
        nested(flat | samples.index.plain),
        places,
        None if weights is None else sent(weights, device),
    )
