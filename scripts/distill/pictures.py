"""Sample pictures of a student while it learns."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import nn

from scripts.distill.samples import Index
from visattn.cli.generate_options import pixels
from visattn.pipelines.generate import IMAGE, VIDEO, Settings, call_arguments

COUNT = 4


class Pictures:
    """Draws the same few conditions with the same noise each time, side by side.

    Args:
        pipe: The teacher's pipeline.
        index: Of the cached samples: says what to ask for.
        folder: For the pictures; made when the first is saved.
    """

    def __init__(self, pipe: Any, index: Index, folder: Path) -> None:
        self.pipe, self.index, self.folder = pipe, index, folder

    @torch.no_grad()
    def save(self, student: nn.Module, name: str) -> Path:
        """Draws with the student in the place of the denoiser; a video gives its middle frame."""
        teacher = getattr(self.pipe, self.index.denoiser)
        setattr(self.pipe, self.index.denoiser, student)
        self.pipe.set_progress_bar_config(disable=True)
        try:
            row = [self._draw(i) for i in range(min(COUNT, len(self.index.settings["conditions"])))]
        finally:
            setattr(self.pipe, self.index.denoiser, teacher)
        self.folder.mkdir(parents=True, exist_ok=True)
        pixels = np.concatenate(row, axis=1).squeeze()
        path = self.folder / f"{name}.png"
        Image.fromarray((pixels * 255).round().astype(np.uint8)).save(path)
        return path

    def _draw(self, number: int) -> np.ndarray:
        """One picture [height, width, channels], values 0 to 1."""
        import inspect

        video = "num_frames" in inspect.signature(self.pipe.__call__).parameters
        wish, known = self.index.settings["conditions"][number], self.index.settings
        asked: dict[str, Any] = {"prompts": (wish,)} if isinstance(wish, str) else {"labels": (wish,)}
        settings = Settings(
            pattern="dense",
            output=VIDEO if video else IMAGE,
            seed=1_000_000 + number,
            steps=known["steps"] or None,
            guidance=known["guidance"] if known["guidance"] >= 0 else None,
            size=pixels(known["size"]),
            **asked,
        )
        output = self.pipe(**call_arguments(self.pipe, settings, 0))
        made = np.asarray(output.frames[0] if video else output.images[0], np.float32)
        return made[len(made) // 2] if video else made
