"""Settings of the distillation of a diffusion model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from scripts.distill.masses import reason
from scripts.distill.methods import METHODS, settings_of
from scripts.distill.ranges import at
from scripts.distill.samples import read_index
from scripts.distill.settings import RunConfig, option
from scripts.distill.stages import ALL, Stage, parse_stages
from visattn.checks import PRECISIONS
from visattn.patterns import Dense
from visattn.pipelines.embedded import EMBEDDED
from visattn.schedule import Schedule

PROJECTIONS = ("q", "k", "v", "out")


@dataclass(frozen=True, slots=True, kw_only=True)
class Config(RunConfig):
    """Settings of one run; `python -m scripts.distill.pipeline --help` says what each means.

    Raises:
        ValueError: If a value is out of range, or two of them contradict each other.
    """

    method: str = option("", f"recipe of a published method: {', '.join(METHODS)}; other options win over it")
    sparsity: float = option(0.95, "share of the blocks that --method does not list")
    pattern: str = option(
        "", 'attention of the student, like "clear(radius=3)"; "topk(keep=0.5..0.05)" changes over the run'
    )
    samples: Path = field(metadata={"help": "folder that scripts/distill/cache_samples.py wrote"})
    model: str = option("digits", "teacher: an embedded model, a folder in diffusers' format, or a hub id")
    denoising: float = option(1.0, "weight of the denoising loss against the samples")
    output: float = option(0.5, "weight of the distance to the teacher's output")
    attention: float = option(0.5, "weight of the distance of attention outputs to the teacher's")
    maps: float = option(0.0, "weight of the cross-entropy to the teacher's attention rows (linear and agent)")
    mass: float = option(0.0, "weight of the distance of block scores to the teacher's mass on blocks (topk, gate ...)")
    mass_blocks: int = option(8, "query blocks per image and head whose scores are compared by --mass")
    temperature: str = option("1", "of --mass: above 1 blocks with little mass count more; 4..1 falls over the run")
    guidance: float = option(
        0.0,
        "compare by --output what guidance of this scale makes of both predictions of a sample, with the condition and "
        "without it, as its sampler does; 0: each by itself",
    )
    errors: str = option(
        "velocity",
        "predictions are compared by their velocity, or by what a step of the sampler makes of it, which does not "
        "magnify errors at little noise",
        ("velocity", "step"),
    )
    stages: str = option(
        "all",
        "shares of the run: router trains the pattern's own parameters, transfer the projections too, both layer by "
        "layer on the teacher's inputs, and all the student as it runs; like router:0.2,transfer:0.3,all:0.5",
    )
    quantize: str = option(
        "", "forward of attention in 8 bits, gradients of the exact one: int8 or fp8", ("", *PRECISIONS)
    )
    attention_at: str = option("before", "attention output before or after its output projection", ("before", "after"))
    attention_layers: str | None = option(None, "layers whose attention is matched, like 0,4,8; all patched ones")
    attention_scale: str = option(
        "relative", "divide attention distances by the teacher's mean square, or not (CLEAR)", ("relative", "plain")
    )
    train: str = option(
        "q,k,v,out",
        "projections that are trained, of q,k,v,out; none: only the pattern's own; all: every weight of the model",
    )
    times: str = option(
        "sampler",
        "noise levels: as the sampler that made the samples visits them, uniform, or logit-normal",
        ("sampler", "uniform", "logit-normal"),
    )
    sequence: int = option(1, "processes that share the tokens of each sample, for long clips")
    parallel: str = option("halo", "how they do with --sequence above 1", ("halo", "ulysses"))
    checkpointing: bool = option(False, "gradient checkpointing: less memory, more time")
    sample_every: int = option(0, "steps between sample pictures; 0: none")

    def __post_init__(self) -> None:
        # Not super(): a dataclass with slots is another class than the one that this function was made in.
        if not self.pattern:
            raise ValueError(f"--pattern is missing: give one, or --method {' or '.join(METHODS)}")
        RunConfig.__post_init__(self)
        wrong = [part for part in self.projections if part not in PROJECTIONS]
        if wrong:
            raise ValueError(f"--train {self.train!r}: {wrong[0]!r} is none of {', '.join(PROJECTIONS)} (or none, all)")
        if self.lora and not self.projections:
            raise ValueError(
                f"--lora {self.lora} needs projections to be put on, but --train is {self.train}: name some"
            )
        stages = parse_stages(self.stages)
        self._check_mass()
        if self.staged:
            self._check_staged(stages)
        if self.quantize:
            Schedule.of(self.pattern_ends[1], self.layers, self.dense_layers, precision=self.quantize)
        if self.guidance and (self.batch % 2 or self.micro_batch % 2):
            raise ValueError(f"--guidance {self.guidance:g} runs pairs: --batch and --micro-batch must be even")
        if self.sequence < 1:
            raise ValueError(f"--sequence {self.sequence} must be at least 1")
        if self.sequence > 1 and self.maps:
            raise ValueError(f"--maps with --sequence {self.sequence}: a process has rows of its own tokens only")
        if self.query_heads and self.attention and self.attention_at == "before":
            raise ValueError("--query-heads leaves other heads before the output projection: pass --attention-at after")
        self._check_data()

    def _check_mass(self) -> None:
        try:
            low = min(float(at(self.temperature, share)) for share in (0.0, 1.0))
        except ValueError:
            low = 0.0
        if not 0 < low < float("inf"):
            raise ValueError(f"--temperature {self.temperature!r} must be above 0, like 2, or a range like 4..1")
        if not self.mass:
            return
        if not 0 < self.mass_blocks <= self.map_rows:
            raise ValueError(f"--mass-blocks {self.mass_blocks} must be from 1 to --map-rows {self.map_rows}")
        for pattern in Schedule.of(self.pattern_ends[1], self.layers, self.dense_layers).patterns:
            why = "" if isinstance(pattern, Dense) else reason(pattern)
            if why:
                raise ValueError(f"--mass {self.mass:g}: {why}: leave it out, or choose by topk(score=mean) or a gate")
        for name, wrong in (("checkpointing", self.checkpointing), ("sequence", self.sequence > 1)):
            if wrong:
                raise ValueError(f"--mass with --{name}: it sees the calls of whole forwards in one process")

    def _check_staged(self, stages: tuple[Stage, ...]) -> None:
        if not (self.attention or self.mass or self.maps):
            raise ValueError(f"--stages {self.stages!r} learn by --attention, --mass or --maps: give one a weight")
        patterns = Schedule.of(self.pattern_ends[1], self.layers, self.dense_layers).patterns
        if not stages[0].whole and not any(pattern.learnable for pattern in patterns):
            raise ValueError(
                f"--stages {self.stages!r}: {patterns[0]} has no parameters of its own for a router stage: leave it out"
            )
        for name, wrong in (
            ("fsdp", self.fsdp),
            ("checkpointing", self.checkpointing),
            ("sequence", self.sequence > 1),
        ):
            if wrong:
                raise ValueError(f"--stages {self.stages!r} with --{name}: pass --stages all")
        if self.attention_layers is not None and not (self.mass or self.maps):
            raise ValueError(f"--stages {self.stages!r} train every layer: leave --attention-layers out")

    def _check_data(self) -> None:
        folder = Path(self.model)
        looks_local = self.model not in EMBEDDED and (self.model.count("/") != 1 or self.model.startswith("."))
        if looks_local and not (folder / "model_index.json").is_file():
            names = ", ".join(EMBEDDED)
            raise ValueError(
                f"--model {self.model!r} is neither an embedded model ({names}) nor a pipeline folder: name one"
            )
        if not (self.samples / "index.json").is_file():
            raise ValueError(
                f"--samples {self.samples} has no index.json: write it with scripts/distill/cache_samples.py --model "
                f"{self.model} --out {self.samples}"
            )
        model = read_index(self.samples)["model"]
        if model != self.model:
            raise ValueError(
                f"--samples {self.samples} were made by {model!r}, the teacher is --model {self.model!r}: "
                "pass samples of its own"
            )

    @classmethod
    def preset(cls, given: Mapping[str, Any]) -> dict[str, Any]:
        """What the method that was asked for sets.

        Raises:
            ValueError: If there is none of that name, or a sparsity of no method.
        """
        if not given.get("method"):
            if "sparsity" in given:
                raise ValueError(f"--sparsity {given['sparsity']:g} is that of a --method: {', '.join(METHODS)}")
            return {}
        return settings_of(given["method"], given.get("sparsity", cls.__dataclass_fields__["sparsity"].default))

    @classmethod
    def losses(cls) -> tuple[str, ...]:
        """The settings that are weights of losses."""
        return ("denoising", "output", "attention", "maps", "mass")

    @property
    def staged(self) -> bool:
        """Whether there are stages but the last."""
        return self.stages != ALL

    @property
    def projections(self) -> tuple[str, ...]:
        """Projections that are trained by themselves."""
        return () if self.train in ("none", "all") else tuple(part.strip() for part in self.train.split(","))
