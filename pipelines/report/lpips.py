"""LPIPS where its package and weights are there; nothing is downloaded for it."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

# The backbone's file in torch hub's cache, which the packages would otherwise download.
ALEXNET = "alexnet-owt-7be5be79.pth"
# Below this side AlexNet's last feature maps are empty.
SMALLEST = 32


def find_lpips() -> tuple[Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None, str]:
    """The LPIPS distance (Zhang et al. 2018, AlexNet), or None, and a sentence that says which.

    Returns:
        A function of pictures [B, 1 or 3, H, W] with values 0 to 1 to distances [B], or None; and the sentence.
    """
    packages = [name for name in NETS if importlib.util.find_spec(name) is not None]
    if not packages:
        return None, f"left out: neither the package {' nor '.join(NETS)} is installed"
    if importlib.util.find_spec("torchvision") is None:
        return None, "left out: the package torchvision, which has AlexNet, is not installed"
    weights = Path(torch.hub.get_dir()) / "checkpoints" / ALEXNET
    if not weights.is_file():
        return None, f"left out: torch hub's cache has no {ALEXNET}, and nothing is downloaded"
    net = NETS[packages[0]]()

    def distance(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        pictures = [_fit(x) for x in (a, b)]
        with torch.no_grad():
            return net(*pictures, normalize=True).flatten()

    return distance, f"AlexNet, package {packages[0]}; pictures below 32 pixels are enlarged"


def _lpips() -> Any:
    return importlib.import_module("lpips").LPIPS(net="alex", verbose=False).eval()


def _torchmetrics() -> Any:
    return importlib.import_module("torchmetrics.image.lpip").LearnedPerceptualImagePatchSimilarity("alex").net.eval()


# Networks by the package that brings them with the weights of their last layers; called alike.
NETS: dict[str, Callable[[], Any]] = {"lpips": _lpips, "torchmetrics": _torchmetrics}


def _fit(pictures: torch.Tensor) -> torch.Tensor:
    """Pictures as LPIPS takes them: three channels, sides large enough."""
    color = pictures.float().expand(-1, 3, -1, -1)
    factor = -(-SMALLEST // min(color.shape[2:]))
    return color.repeat_interleave(factor, 2).repeat_interleave(factor, 3)
