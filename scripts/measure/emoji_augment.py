"""Real emoji in slightly different ways, so that an encoder learns what they show and not their pixels."""

from __future__ import annotations

import re

import torch
from torch.nn import functional as F

# Mirrored, these say something else: directions, writing, clocks, flags with an order.
ONE_WAY = re.compile(
    r"\b(left\w*|right\w*|arrows?|o.?clock|\w*-thirty|clock|flag|button|keycap|input|letters?|sign|"
    r"clockwise|counterclockwise|forward|reverse|play|hundred|soon|back|end|on|top|medal|calendar|speaking|abc)\b"
)
SCALE, SHIFT, TURN = 0.12, 0.08, 0.08  # share of the side, share of the side, radians
GAIN, TINT = 0.12, 0.15
WHITE = 0.97
SOFT, TINTED, NOISY = 0.4, 0.3, 0.4  # share of the pictures
NOISE = 0.05


def may_mirror(caption: str) -> bool:
    """Whether the mirrored picture still shows what the caption says."""
    return ONE_WAY.search(caption) is None


def augment(pictures: torch.Tensor, mirror: torch.Tensor, side: int, generator: torch.Generator) -> torch.Tensor:
    """Pictures moved, scaled, turned and mirrored a little, of other light, background, sharpness and noise.

    Args:
        pictures: [B, 3, H, W] with values 0 to 1, on white.
        mirror: [B] bool, which may be mirrored.
        side: Of the result, in pixels.
        generator: Of the pictures' device.

    Returns:
        [B, 3, side, side], values 0 to 1.
    """
    moved = _move(pictures, mirror, side, generator)
    return _light(_soften(_tint(moved, generator), generator), generator)


def _draw(count: int, of: torch.Tensor, generator: torch.Generator, *shape: int) -> torch.Tensor:
    """[count, *shape] from -1 to 1."""
    return torch.rand(count, *shape, generator=generator, device=of.device) * 2 - 1


def _chosen(share: float, of: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    return (torch.rand(len(of), generator=generator, device=of.device) < share)[:, None, None, None]


def _move(pictures: torch.Tensor, mirror: torch.Tensor, side: int, generator: torch.Generator) -> torch.Tensor:
    count = len(pictures)
    scale = 1 + SCALE * _draw(count, pictures, generator)
    angle = TURN * _draw(count, pictures, generator)
    shift = 2 * SHIFT * _draw(count, pictures, generator, 2)
    sign = torch.where(mirror & (_draw(count, pictures, generator) < 0), -1.0, 1.0)
    cos, sin = scale * angle.cos(), scale * angle.sin()
    rows = torch.stack([cos * sign, -sin, shift[:, 0], sin * sign, cos, shift[:, 1]], 1).view(count, 2, 3)
    grid = F.affine_grid(rows, [count, 3, side, side], align_corners=False)
    # White outside, as the pictures are on white: what is sampled is how far a pixel is from white.
    return 1 - F.grid_sample(1 - pictures, grid, mode="bilinear", padding_mode="zeros", align_corners=False)


def _tint(pictures: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Another light background: white of the emoji itself goes with it."""
    color = 1 - TINT * torch.rand(len(pictures), 3, 1, 1, generator=generator, device=pictures.device)
    white = pictures.amin(1, keepdim=True) > WHITE
    return torch.where(white & _chosen(TINTED, pictures, generator), color, pictures)


def _soften(pictures: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    half = F.interpolate(F.avg_pool2d(pictures, 2), pictures.shape[-2:], mode="bilinear", align_corners=False)
    return torch.where(_chosen(SOFT, pictures, generator), half, pictures)


def _light(pictures: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    count = len(pictures)
    contrast = 1 + GAIN * _draw(count, pictures, generator, 1, 1, 1)
    gain = 1 + GAIN / 2 * _draw(count, pictures, generator, 3, 1, 1)
    strength = NOISE * _chosen(NOISY, pictures, generator) * _draw(count, pictures, generator, 1, 1, 1).abs()
    noise = torch.randn(pictures.shape, generator=generator, device=pictures.device) * strength
    return (((pictures - 0.5) * contrast + 0.5) * gain + noise).clamp(0, 1)
