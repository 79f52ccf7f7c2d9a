"""Settings of the distillation of a diffusion model."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path

from scripts.distill.settings import RunConfig, option
from visattn.pipelines.embedded import EMBEDDED

PROJECTIONS = ("q", "k", "v", "out")


@dataclass(frozen=True, slots=True, kw_only=True)
class Config(RunConfig):
    """Settings of one run; `python -m scripts.distill.pipeline --help` says what each means.

    Raises:
        ValueError: If a value is out of range, or two of them contradict each other.
    """

    samples: Path = field(metadata={"help": "folder that scripts/distill/cache_samples.py wrote"})
    model: str = option("digits", "teacher: an embedded model, a folder in diffusers' format, or a hub id")
    denoising: float = option(1.0, "weight of the denoising loss against the samples")
    output: float = option(0.5, "weight of the distance to the teacher's output")
    attention: float = option(0.5, "weight of the distance of attention outputs to the teacher's")
    maps: float = option(0.0, "weight of the cross-entropy to the teacher's attention rows (linear and agent)")
    attention_at: str = option("before", "attention output before or after its output projection", ("before", "after"))
    attention_layers: str | None = option(None, "layers whose attention is matched, like 0,4,8; all patched ones")
    attention_scale: str = option(
        "relative", "divide attention distances by the teacher's mean square, or not (CLEAR)", ("relative", "plain")
    )
    train: str = option("q,k,v,out", "projections that are trained, of q,k,v,out; none: only the pattern's own")
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
        RunConfig.__post_init__(self)
        wrong = [part for part in self.projections if part not in PROJECTIONS]
        if wrong:
            raise ValueError(f"--train {self.train!r}: {wrong[0]!r} is none of {', '.join(PROJECTIONS)} (or none)")
        if self.lora and not self.projections:
            raise ValueError(f"--lora {self.lora} needs projections to be put on, but --train is none")
        if self.sequence < 1:
            raise ValueError(f"--sequence {self.sequence} must be at least 1")
        if self.sequence > 1 and self.maps:
            raise ValueError(f"--maps with --sequence {self.sequence}: a process has rows of its own tokens only")
        if self.query_heads and self.attention and self.attention_at == "before":
            raise ValueError("--query-heads leaves other heads before the output projection: pass --attention-at after")
        self._check_data()

    def _check_data(self) -> None:
        folder = Path(self.model)
        looks_local = self.model not in EMBEDDED and (self.model.count("/") != 1 or self.model.startswith("."))
        if looks_local and not (folder / "model_index.json").is_file():
            names = ", ".join(EMBEDDED)
            raise ValueError(f"--model {self.model!r} is neither an embedded model ({names}) nor a pipeline folder")
        if not (self.samples / "index.json").is_file():
            raise ValueError(
                f"--samples {self.samples} has no index.json: write it with scripts/distill/cache_samples.py --model "
                f"{self.model} --out {self.samples}"
            )
        model = json.loads((self.samples / "index.json").read_text())["model"]
        if model != self.model:
            raise ValueError(f"--samples {self.samples} were made by {model!r}, the teacher is --model {self.model!r}")

    @classmethod
    def losses(cls) -> tuple[str, ...]:
        """The settings that are weights of losses."""
        return ("denoising", "output", "attention", "maps")

    @property
    def projections(self) -> tuple[str, ...]:
        """Projections that are trained."""
        return () if self.train == "none" else tuple(part.strip() for part in self.train.split(","))
