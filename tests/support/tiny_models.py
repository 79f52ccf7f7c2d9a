"""Tiny random models of every diffusers family, with inputs, built from configurations: nothing is downloaded."""

import torch

from tests.support.tiny import noise, seeded
from tests.support.tiny_images import (
    bria,
    chroma,
    dit,
    flux,
    flux2,
    flux_ids,
    flux_inputs,
    hidream,
    lumina2,
    pixart,
    prior_transformer,
    qwen,
    sana,
    sd3,
    sd15,
    sdxl,
    z_image,
)
from tests.support.tiny_videos import (
    cogvideox,
    cosmos,
    hunyuan_video,
    hunyuan_video15,
    kandinsky5,
    ltx,
    ltx2,
    mochi,
    wan,
    wan_animate,
    wan_inputs,
    wan_vace,
)

__all__ = [
    "FAMILIES",
    "bria",
    "chroma",
    "cogvideox",
    "cosmos",
    "dit",
    "flux",
    "flux2",
    "flux_ids",
    "flux_inputs",
    "hidream",
    "hunyuan_video",
    "hunyuan_video15",
    "kandinsky5",
    "ltx",
    "ltx2",
    "lumina2",
    "mochi",
    "noise",
    "pixart",
    "prior_transformer",
    "qwen",
    "run",
    "sana",
    "sd3",
    "sd15",
    "sdxl",
    "seeded",
    "wan",
    "wan_animate",
    "wan_inputs",
    "wan_vace",
    "z_image",
]

# Builder, number of calls of visual self-attention in a forward, and a sparse pattern for each family.
FAMILIES = {
    "dit": (dit, 3, "na(window=3x3)"),
    "pixart": (pixart, 2, "na(window=3x3)"),
    "sd15": (sd15, 4, "na(window=3x3)"),
    "sdxl": (sdxl, 8, "na(window=3x3)"),
    "sd3": (sd3, 5, "na(window=3x3)"),
    "flux": (flux, 3, "na(window=3x3)"),
    "flux2": (flux2, 2, "na(window=3x3)"),
    "chroma": (chroma, 2, "na(window=3x3)"),
    "bria": (bria, 2, "na(window=3x3)"),
    "qwen": (qwen, 2, "na(window=3x3)"),
    "z_image": (z_image, 3, "na(window=3x3)"),
    "lumina2": (lumina2, 3, "na(window=3x3)"),
    "hidream": (hidream, 2, "na(window=3x3)"),
    "wan": (wan, 2, "na(window=3x3x3)"),
    "wan_animate": (wan_animate, 2, "na(window=3x3x3)"),
    "wan_vace": (wan_vace, 3, "na(window=3x3x3)"),
    "hunyuan_video": (hunyuan_video, 3, "na(window=3x3x3)"),
    "hunyuan_video15": (hunyuan_video15, 2, "na(window=3x3x3)"),
    "cogvideox": (cogvideox, 2, "na(window=3x3x3)"),
    "mochi": (mochi, 2, "na(window=3x3x3)"),
    "ltx": (ltx, 2, "na(window=3x3x3)"),
    "ltx2": (ltx2, 2, "na(window=3x3x3)"),
    "cosmos": (cosmos, 2, "na(window=3x3x3)"),
    "kandinsky5": (kandinsky5, 2, "na(window=3x3x3)"),
}


def run(model, inputs, **options):
    """The sample that a model predicts."""
    with torch.no_grad():
        sample = model(**{**inputs, **options}, return_dict=False)[0]
    return torch.stack(sample) if isinstance(sample, list) else sample
