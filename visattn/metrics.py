"""How near two pictures are: PSNR and SSIM."""

from __future__ import annotations

import torch
from torch.nn import functional as F

# Wang et al., "Image Quality Assessment: From Error Visibility to Structural Similarity" (2004), section III-B.
SSIM_SIGMA, SSIM_SIDE = 1.5, 11
SSIM_K1, SSIM_K2 = 0.01, 0.03


def _pair(a: torch.Tensor, b: torch.Tensor, smallest: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    if a.shape != b.shape or a.ndim != 4 or min(a.shape[2:]) < smallest:
        raise ValueError(
            f"pictures {list(a.shape)} and {list(b.shape)} must both be [batch, channels, height, width] with sides of "
            f"at least {smallest}"
        )
    return a.to(torch.float64), b.to(torch.float64)


def psnr(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Peak signal-to-noise ratio in dB, infinite for equal pictures.

    Args:
        a: Pictures [B, C, H, W] with values 0 to 1; frames of a video count as pictures.
        b: The same.

    Returns:
        [B], float64.

    Raises:
        ValueError: If the shapes are not equal or not of four axes.
    """
    a, b = _pair(a, b)
    return -10 * torch.log10((a - b).square().mean((1, 2, 3)))


def ssim(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Structural similarity, 1 for equal pictures: Gaussian windows of 11 x 11 inside the picture, mean over channels.

    Args:
        a: Pictures [B, C, H, W] with values 0 to 1, sides of at least 11.
        b: The same.

    Returns:
        [B], float64.

    Raises:
        ValueError: If the shapes are not equal, not of four axes, or too small.
    """
    a, b = _pair(a, b, SSIM_SIDE)
    place = torch.arange(SSIM_SIDE, dtype=a.dtype, device=a.device) - SSIM_SIDE // 2
    weight = torch.exp(-0.5 * (place / SSIM_SIGMA) ** 2)
    weight = weight / weight.sum()

    def mean(x: torch.Tensor) -> torch.Tensor:
        flat = x.reshape(-1, 1, *x.shape[2:])
        return F.conv2d(F.conv2d(flat, weight.view(1, 1, -1, 1)), weight.view(1, 1, 1, -1))

    mean_a, mean_b = mean(a), mean(b)
    var_a, var_b = mean(a * a) - mean_a**2, mean(b * b) - mean_b**2
    covariance = mean(a * b) - mean_a * mean_b
    c1, c2 = SSIM_K1**2, SSIM_K2**2
    luminance = (2 * mean_a * mean_b + c1) / (mean_a**2 + mean_b**2 + c1)
    structure = (2 * covariance + c2) / (var_a + var_b + c2)
    return (luminance * structure).reshape(len(a), -1).mean(1)
