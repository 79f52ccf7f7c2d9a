"""Clean latents of pictures, and the form in which a pipeline takes them."""

from __future__ import annotations

import inspect
from typing import Any

import torch

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
    vae = getattr(pipe, "vae", None)
    if (
        vae is None
        or getattr(vae.config, "latents_mean", None) is not None
        or not hasattr(vae.config, "scaling_factor")
    ):
        return "packs latents that are not scaled by one factor"
    return ""


def encode(pipe: Any, pictures: list[Any], size: dict[str, int]) -> torch.Tensor:
    """Clean latents [N, C, H, W] of pictures; pixels where the pipeline draws those.

    Args:
        pipe: The pipeline.
        pictures: As its image processor takes them.
        size: `height` and `width` in pixels.
    """
    model = next(getattr(pipe, name) for name in DENOISERS if getattr(pipe, name, None) is not None)
    processed = [pipe.image_processor.preprocess(picture, **size) for picture in pictures]
    pixels = torch.cat(processed).to(device=pipe._execution_device, dtype=model.dtype)
    vae = getattr(pipe, "vae", None)
    if vae is None:
        return pixels
    with torch.no_grad():
        encoded = vae.encode(pixels.to(vae.dtype))
    found = encoded.latent_dist.mean if hasattr(encoded, "latent_dist") else encoded.latent
    shift = getattr(vae.config, "shift_factor", None) or 0.0
    return ((found - shift) * vae.config.scaling_factor).to(model.dtype)


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
