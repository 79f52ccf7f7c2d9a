"""Pictures that a ViT's student learns from; a batch depends on seed and step alone."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from scripts.distill.vit_config import DIGITS, VitConfig, list_pictures
from scripts.train.digits_data import jitter, upscale
from scripts.train.digits_vit_model import SIZE, split

DECODERS = 8


class Pictures(Protocol):
    """Where batches come from."""

    def draw(self, step: int, part: slice) -> torch.Tensor:
        """A part of the batch of a step [B, C, H, W], as the model wants it."""
        ...


def generator_of(seed: int, step: int) -> torch.Generator:
    """Every step draws from its own seed: a resumed run needs no generator state to be exact."""
    return torch.Generator().manual_seed(seed * 1_000_003 + step)


class Digits:
    """Digits that the ViT of digits_vit.py was trained on, moved and turned as `digits_data.jitter` does."""

    def __init__(self, config: VitConfig) -> None:
        self.config, (self.images, _) = config, split(seen=True)

    def draw(self, step: int, part: slice) -> torch.Tensor:
        """See `Pictures.draw`."""
        generator = generator_of(self.config.seed, step)
        index = torch.randint(len(self.images), (self.config.batch,), generator=generator)
        theta = jitter(len(index), self.config.augment, generator)
        return upscale(self.images[index[part]], self.config.size or SIZE, theta[part])


class Folder:
    """Pictures of a folder: a random square of each, scaled, half of them mirrored.

    Args:
        config: Settings.
        data: The model's `timm.data.resolve_model_data_config`: input size, mean and deviation of its channels.
    """

    def __init__(self, config: VitConfig, data: dict[str, Any]) -> None:
        self.config, self.paths = config, list_pictures(Path(config.data))
        self.channels, height, _ = data["input_size"]
        self.size = config.size or height
        self.mean, self.std = (torch.tensor(data[name]).view(-1, 1, 1) for name in ("mean", "std"))
        self.pool = ThreadPoolExecutor(DECODERS)

    def draw(self, step: int, part: slice) -> torch.Tensor:
        """See `Pictures.draw`."""
        generator = generator_of(self.config.seed, step)
        index = torch.randint(len(self.paths), (self.config.batch,), generator=generator)[part]
        # Side of the square as a share of the shorter side, its place, and whether it is mirrored.
        chance = torch.rand(self.config.batch, 4, generator=generator)[part]
        read = self.pool.map(self._read, [self.paths[i] for i in index.tolist()], chance.tolist())
        return (torch.stack(list(read)) - self.mean) / self.std

    def _read(self, path: Path, chance: list[float]) -> torch.Tensor:
        from PIL import Image

        share, x, y, mirrored = chance
        strength = min(self.config.augment, 1.0)
        with Image.open(path) as file:
            picture = file.convert("L" if self.channels == 1 else "RGB")
        side = min(picture.size) * (1 - 0.5 * strength * share)
        left, top = (
            (n - side) * (0.5 + strength * (place - 0.5)) for n, place in zip(picture.size, (x, y), strict=True)
        )
        box = (left, top, left + side, top + side)
        small = picture.resize((self.size, self.size), Image.Resampling.BICUBIC, box=box)
        pixels = torch.from_numpy(np.asarray(small, np.float32) / 255).view(self.size, self.size, -1).permute(2, 0, 1)
        return pixels.flip(-1) if strength and mirrored < 0.5 else pixels


def open_pictures(config: VitConfig, model: Any) -> Pictures:
    """The pictures that `--data` names, prepared for a model."""
    if config.data == DIGITS:
        return Digits(config)
    from timm.data import resolve_model_data_config

    return Folder(config, resolve_model_data_config(model))
