"""The digits data set as smooth pictures of any size, and the way back to 8x8.

scikit-learn's `load_digits`: 1797 handwritten digits, 8x8 pixels with values 0 to 16.
"""

import math
from typing import Any

import torch
from sklearn.datasets import load_digits
from torch.nn import functional as F

SOURCE_SIZE = 8
SOURCE_MAX = 16.0


def real_digits() -> tuple[torch.Tensor, torch.Tensor]:
    """Images [1797, 1, 8, 8] with values 0 to 1, and labels [1797] from 0 to 9."""
    data: Any = load_digits()
    images = torch.tensor(data.images, dtype=torch.float32)[:, None] / SOURCE_MAX
    return images, torch.tensor(data.target, dtype=torch.long)


def upscale(images: torch.Tensor, size: int, theta: torch.Tensor | None = None) -> torch.Tensor:
    """Upscales and moves digits in one bicubic resampling, with black around them.

    Args:
        images: [B, 1, 8, 8], values 0 to 1.
        size: Side of the result in pixels.
        theta: Affine maps [B, 2, 3] from output to input coordinates; identity by default.

    Returns:
        [B, 1, size, size] with values -1 to 1.
    """
    if theta is None:
        theta = torch.eye(2, 3, device=images.device).expand(len(images), 2, 3)
    grid = F.affine_grid(theta, [len(images), 1, size, size], align_corners=False)
    smooth = F.grid_sample(images, grid, mode="bicubic", padding_mode="zeros", align_corners=False)
    return smooth.clamp(0, 1) * 2 - 1


def downscale(images: torch.Tensor) -> torch.Tensor:
    """Inverse of `upscale`: [B, 1, H, W] with values -1 to 1 becomes [B, 1, 8, 8] with values 0 to 1."""
    small = F.interpolate(images, (SOURCE_SIZE, SOURCE_SIZE), mode="area")
    return (small.clamp(-1, 1) + 1) / 2


def jitter(batch: int, strength: float, generator: torch.Generator) -> torch.Tensor:
    """Random small rotations, scales and shifts [batch, 2, 3] that leave every digit readable.

    At strength 1: up to 8 degrees, 8 % of size, and 0.4 of a source pixel (5 % of the width) of shift.
    """
    angle, scale, dx, dy = (torch.rand(4, batch, generator=generator) * 2 - 1) * strength
    angle, scale = angle * math.radians(8), 1 + 0.08 * scale
    shift = 0.4 * 2 / SOURCE_SIZE
    cos, sin = scale * angle.cos(), scale * angle.sin()
    rows = [torch.stack([cos, -sin, shift * dx], -1), torch.stack([sin, cos, shift * dy], -1)]
    return torch.stack(rows, 1)


class DigitBatches:
    """Draws training batches; a batch depends only on the generator it is given.

    Args:
        device: Where the batches go.
        augment: Strength of `jitter`, 0 for none.
    """

    def __init__(self, device: torch.device | str = "cpu", augment: float = 1.0) -> None:
        self.images, self.labels = real_digits()
        self.device = torch.device(device)
        self.augment = augment

    def draw(self, batch: int, size: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
        """Images [batch, 1, size, size] with values -1 to 1 and labels [batch]; generator is on the CPU."""
        index = torch.randint(len(self.labels), (batch,), generator=generator)
        theta = jitter(batch, self.augment, generator)
        return upscale(self.images[index], size, theta).to(self.device), self.labels[index].to(self.device)
