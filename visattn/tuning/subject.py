"""What is tuned, as the search sees it: layers, stages of the run, and what schedules do to its outputs."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Protocol

import torch

DENSE = "dense"
# The pattern of each stage of the run, for each layer.
Assignment = tuple[tuple[str, ...], ...]


def everywhere(name: str, layers: int, stages: int, dense: int = 0) -> Assignment:
    """A candidate at all layers and in all stages but the first ones.

    Args:
        name: The candidate.
        layers: Layers of the model.
        stages: Stages of the run.
        dense: How many first stages are dense.
    """
    return ((DENSE,) * dense + (name,) * (stages - dense),) * layers


class Local(NamedTuple):
    """What a candidate does at one layer in one stage of a run.

    Attributes:
        error: Squared error of the layer's output behind its output projection, relative to that output's square.
        seconds: Time of one call, 0 where it is not measured.
    """

    error: float
    seconds: float


@dataclass(frozen=True)
class Outcome:
    """Outputs of some samples with a schedule, beside their dense twins.

    Attributes:
        psnr: Of each sample, infinite where it equals its twin. Of outputs that are no pictures the ratio of the twin's
            square to the square of the difference, in dB.
        ssim: Of each sample.
        lpips: Of each sample, empty where it is not there.
        seconds: Wall time of a sample.
        attention_seconds: Time of a sample in attention.
        lost: Of each sample with a label 1 where the twin alone knows it, -1 where the twin alone does not, else 0.
        twin_accuracy: Share of the labels that the twins know.
    """

    psnr: tuple[float, ...]
    ssim: tuple[float, ...] = ()
    lpips: tuple[float, ...] = ()
    seconds: float = 0.0
    attention_seconds: float = 0.0
    lost: tuple[int, ...] = ()
    twin_accuracy: float | None = None

    @property
    def lost_points(self) -> float:
        """Accuracy that is lost to the twins, in points of a hundred."""
        return 100 * sum(self.lost) / len(self.lost)

    @property
    def error(self) -> float:
        """Mean squared error over the samples."""
        return sum(10 ** (-value / 10) for value in self.psnr) / len(self.psnr)

    def held(self, share: float) -> float:
        """The PSNR that so large a share of the samples has at least."""
        ranked = sorted(self.psnr)
        return ranked[min(int((1 - share) * len(ranked) + 1e-9), len(ranked) - 1)]

    def joined(self, other: Outcome) -> Outcome:
        """This and an outcome of other samples: quality of all of them, times of these."""
        return replace(
            self,
            psnr=self.psnr + other.psnr,
            ssim=self.ssim + other.ssim,
            lpips=self.lpips + other.lpips,
            lost=self.lost + other.lost,
        )

    def to_dict(self) -> dict[str, Any]:
        """As JSON, where an infinite PSNR is null."""
        psnr = [None if math.isinf(value) else value for value in self.psnr]
        return {
            "psnr": psnr,
            "ssim": list(self.ssim),
            "lpips": list(self.lpips),
            "seconds": self.seconds,
            "attention_seconds": self.attention_seconds,
            "lost": list(self.lost),
            "twin_accuracy": self.twin_accuracy,
        }

    @classmethod
    def of(cls, found: Mapping[str, Any]) -> Outcome:
        """The inverse of `to_dict`."""
        psnr = tuple(math.inf if value is None else value for value in found["psnr"])
        times = found["seconds"], found["attention_seconds"]
        return cls(
            psnr, tuple(found["ssim"]), tuple(found["lpips"]), *times, tuple(found["lost"]), found["twin_accuracy"]
        )


class Subject(Protocol):
    """A model that can be run with schedules."""

    @property
    def model(self) -> str:
        """Its class."""
        ...

    @property
    def measure(self) -> str:
        """What `Outcome.psnr` is of its outputs: "psnr" of pictures, "snr" of others."""
        ...

    @property
    def device(self) -> torch.device:
        """Where it runs."""
        ...

    @property
    def layers(self) -> int:
        """How many layers have attention that can be given a pattern."""
        ...

    @property
    def parameters(self) -> int:
        """How many numbers it has."""
        ...

    @property
    def steps(self) -> int:
        """Steps of a run."""
        ...

    @property
    def grid(self) -> tuple[int, ...]:
        """Tokens per axis."""
        ...

    def about(self) -> dict[str, Any]:
        """What decides its outputs and times, as JSON."""
        ...

    def local(
        self, step: int, candidates: Sequence[str], seeds: Sequence[int], timed: Collection[str]
    ) -> list[dict[str, Local]]:
        """What each candidate does at each layer in a step of a dense run; one that cannot run is left out.

        Args:
            step: The step.
            candidates: Their texts.
            seeds: Of the samples.
            timed: Those whose time is measured.
        """
        ...

    def outcome(
        self, edges: Sequence[float], assignment: Assignment, seeds: Sequence[int], timed: bool = True
    ) -> Outcome:
        """Run samples with a schedule and beside them, once for the same seeds, their dense twins.

        Args:
            edges: Where stages begin and end, as shares of the run.
            assignment: Patterns by layer and stage.
            seeds: Of the samples.
            timed: Whether times are wanted too: without, they are those of a run that may compile something, and of
                quality there may be PSNR alone.
        """
        ...
