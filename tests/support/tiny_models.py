"""Tiny random models of every diffusers family, with inputs, built from configurations: nothing is downloaded."""

import inspect

import torch

from tests.support.tiny import noise, seeded
from tests.support.tiny_clips import CLIPS
from tests.support.tiny_control import CONTROLNETS
from tests.support.tiny_edits import EDITS
from tests.support.tiny_flux import (
    bria,
    bria_fibo,
    chroma,
    flux,
    flux2,
    flux_ids,
    flux_inputs,
    longcat,
    ovis,
)
from tests.support.tiny_images import (
    dit,
    hidream,
    hunyuan_dit,
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
from tests.support.tiny_text_images import TEXT_IMAGES
from tests.support.tiny_unets import OTHER_UNETS, VIDEO_UNETS
from tests.support.tiny_videos import (
    chronoedit,
    cogvideox,
    consisid,
    cosmos,
    hunyuan_video,
    hunyuan_video15,
    kandinsky5,
    ltx,
    ltx2,
    mochi,
    skyreels,
    wan,
    wan_animate,
    wan_inputs,
    wan_vace,
)
from tests.support.tiny_worlds import WORLDS

__all__ = [
    "FAMILIES",
    "bria",
    "bria_fibo",
    "chroma",
    "chronoedit",
    "cogvideox",
    "consisid",
    "cosmos",
    "dit",
    "flux",
    "flux2",
    "flux_ids",
    "flux_inputs",
    "hidream",
    "hunyuan_dit",
    "hunyuan_video",
    "hunyuan_video15",
    "kandinsky5",
    "longcat",
    "ltx",
    "ltx2",
    "lumina2",
    "mochi",
    "noise",
    "ovis",
    "pixart",
    "prior_transformer",
    "qwen",
    "run",
    "sana",
    "sd3",
    "sd15",
    "sdxl",
    "seeded",
    "skyreels",
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
    "hunyuan_dit": (hunyuan_dit, 2, "na(window=3x3)"),
    "longcat": (longcat, 2, "na(window=3x3)"),
    "ovis": (ovis, 2, "na(window=3x3)"),
    "bria_fibo": (bria_fibo, 2, "na(window=3x3)"),
    "skyreels": (skyreels, 2, "na(window=3x3x3)"),
    "chronoedit": (chronoedit, 2, "na(window=3x3x3)"),
    "consisid": (consisid, 2, "na(window=3x3x3)"),
    **TEXT_IMAGES,
    **CLIPS,
    **WORLDS,
    **EDITS,
    **VIDEO_UNETS,
    **OTHER_UNETS,
    **CONTROLNETS,
}


def run(model, inputs, **options):
    """The sample that a model predicts."""
    if "return_dict" in inspect.signature(type(getattr(model, "_orig_mod", model)).forward).parameters:
        options["return_dict"] = False
    with torch.no_grad():
        sample = model(**{**inputs, **options})
    sample = list(sample.values()) if isinstance(sample, dict) else sample[0]
    # ControlNets give one for each block, of different sizes.
    return torch.cat([part.flatten() for part in sample]) if isinstance(sample, list | tuple) else sample
