"""Clean latents of pictures, and the form in which a pipeline takes them."""

from __future__ import annotations

import inspect
import os
from typing import Any

import numpy as np
import torch
from PIL import Image

from visattn.given import said
from visattn.pipelines.patch.targets import DENOISERS

# Arguments of the packing that FLUX has, and what follows it: 2x2 latents are the channels of a token.
PACKS = ["latents", "batch_size", "num_channels_latents", "height", "width"]


def why_not(pipe: Any) -> str:
    """Why latents of a pipeline cannot be given, "" if they can."""
    pack = getattr(pipe, "_pack_latents", None)
    if pack is None:
        return ""
    if list(inspect.signature(pack).parameters) != PACKS:
        return "packs its latents in a way of its own"
    return ""


def encode(pipe: Any, pictures: list[Any], size: dict[str, int]) -> torch.Tensor:
    """Clean latents [N, C, H, W] of pictures; pixels where the pipeline draws those.

    Args:
        pipe: The pipeline.
        pictures: As its image processor takes them.
        size: `height` and `width` in pixels.

    Raises:
        ValueError: If one is no picture, or the name of a file and not its picture.
    """
    for picture in pictures:
        one = picture[0] if isinstance(picture, list | tuple) and len(picture) == 1 else picture
        flat = isinstance(one, np.ndarray | torch.Tensor) and one.ndim not in (3, 4)
        if not isinstance(one, Image.Image | np.ndarray | torch.Tensor | str | os.PathLike) or flat:
            raise ValueError(f"picture={said(picture)} must be one picture: of Pillow, or an array or tensor of pixels")
        if isinstance(picture, str | os.PathLike):
            raise ValueError(f"picture {str(picture)!r} is a name: open it first, with PIL.Image.open")
    model = next(getattr(pipe, name) for name in DENOISERS if getattr(pipe, name, None) is not None)
    processed = [pipe.image_processor.preprocess(picture, **size) for picture in pictures]
    pixels = torch.cat(processed).to(device=pipe._execution_device, dtype=model.dtype)
    vae = getattr(pipe, "vae", None)
    if vae is None:
        return pixels
    # A VAE of clips takes a picture for one frame.
    clips = any(isinstance(each, torch.nn.Conv3d) for each in vae.modules())
    pixels = pixels.to(vae.dtype).unsqueeze(2) if clips else pixels.to(vae.dtype)
    with torch.no_grad():
        encoded = vae.encode(pixels)
    found = encoded.latent_dist.mode() if hasattr(encoded, "latent_dist") else encoded.latent
    return _scaled(found.squeeze(2) if clips else found, vae.config).to(model.dtype)


def _scaled(latents: torch.Tensor, config: Any) -> torch.Tensor:
    """As denoisers see them: without the mean of latents, in their deviation."""
    mean, deviation = (getattr(config, name, None) for name in ("latents_mean", "latents_std"))
    scale = getattr(config, "scaling_factor", None) or 1.0
    if mean is None or deviation is None:
        return (latents - (getattr(config, "shift_factor", None) or 0.0)) * scale
    mean, deviation = (torch.tensor(each, device="cpu").to(latents).view(1, -1, 1, 1) for each in (mean, deviation))
    return (latents - mean) * scale / deviation


def packed(pipe: Any, latents: torch.Tensor) -> torch.Tensor:
    """Latents [N, C, H, W] as the pipeline takes them: tokens [N, S, 4 C] where it packs them."""
    return pipe._pack_latents(latents, *latents.shape) if hasattr(pipe, "_pack_latents") else latents


def unpacked(latents: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    """The opposite, to [N, *shape[1:]]."""
    if latents.ndim == 4:
        return latents
    _, channels, height, width = shape
    found = latents.unflatten(1, (height // 2, width // 2)).unflatten(3, (channels, 2, 2))
    return found.permute(0, 3, 1, 4, 2, 5).reshape(len(latents), channels, height, width)
