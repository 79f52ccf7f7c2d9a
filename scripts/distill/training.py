"""The distillation of a diffusion model: what is loaded, and what a step learns from."""

from __future__ import annotations

from typing import Any

import torch

from scripts.distill.config import Config
from scripts.distill.loop import Run, begin
from scripts.distill.noise import Noise
from scripts.distill.optimizers import micro_batches
from scripts.distill.pictures import Pictures
from scripts.distill.samples import SampleSet
from scripts.distill.sharing import sequence_mesh
from scripts.distill.student import Batch, Distiller, build_batch
from visattn.pipelines.load import load_pipeline


class Training(Run):
    """One run on cached samples.

    Args:
        config: Settings, checked.

    Raises:
        ValueError: If teacher, samples and settings do not fit together.
    """

    def __init__(self, config: Config) -> None:
        accelerator = begin(config)
        together = config.sequence
        mesh = sequence_mesh(accelerator.device, accelerator.num_processes, together)
        parts = micro_batches(config, accelerator.process_index // together, accelerator.num_processes // together)
        self.samples = SampleSet(config.samples)
        index = self.samples.index
        self.noise = Noise(
            index.kind, tuple(index.timesteps), index.time_scale, self.samples.constants.get("noise.alphas")
        )
        # What does not fit is refused before anything is loaded.
        self.noise.weights(torch.ones(1), config.errors)
        pipe: Any = load_pipeline(config.model, str(accelerator.device), "float32")
        if not hasattr(pipe, index.denoiser):
            raise ValueError(
                f"{config.model} has no {index.denoiser}, which the samples in {config.samples} were made by: "
                "cache samples of this model"
            )
        self.settings, self.pictures = config, Pictures(pipe, index, config.out / "samples")
        learner = Distiller(getattr(pipe, index.denoiser), index.anchor, config, mesh)
        super().__init__(config, accelerator, learner, parts)

    def draw(self, part: slice) -> Batch:
        """See `Run.draw`."""
        return build_batch(self.samples, self.noise, self.settings, self.step, part, self.accelerator.device)

    def picture(self) -> None:
        """A row of samples."""
        with self.averaged() as student, self.accelerator.autocast():
            self.pictures.save(student, f"{self.step:06d}")
