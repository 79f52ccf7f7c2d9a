"""LPIPS where its package and weights are there; nothing is downloaded for it."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from pathlib import Path

import torch

# The backbone's file in torch hub's cache, which the lpips package would otherwise download.
ALEXNET = "alexnet-owt-7be5be79.pth"
# Below this side AlexNet's last feature maps are empty.
SMALLEST = 32


def find_lpips() -> tuple[Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None, str]:
    """The LPIPS distance (Zhang et al. 2018, AlexNet), or None, and a sentence that says which.

    Returns:
        A function of pictures [B, 1 or 3, H, W] with values 0 to 1 to distances [B], or None; and the sentence.
    """
    if importlib.util.find_spec("lpips") is None:
        return None, "left out: the package lpips is not installed"
    weights = Path(torch.hub.get_dir()) / "checkpoints" / ALEXNET
    if not weights.is_file():
        return None, f"left out: torch hub's cache has no {ALEXNET}, and nothing is downloaded"
    net = importlib.import_module("lpips").LPIPS(net="alex", verbose=False).eval()

    def distance(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        pictures = [_fit(x) for x in (a, b)]
        with torch.no_grad():
            return net(*pictures, normalize=True).flatten()

    return distance, "AlexNet, package lpips; pictures below 32 pixels are enlarged"


def _fit(pictures: torch.Tensor) -> torch.Tensor:
    """Pictures as LPIPS takes them: three channels, sides large enough."""
    color = pictures.float().expand(-1, 3, -1, -1)
    factor = -(-SMALLEST // min(color.shape[2:]))
    return color.repeat_interleave(factor, 2).repeat_interleave(factor, 3)
