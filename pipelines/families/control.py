"""ControlNets that find their tokens in another way than their base model."""

from __future__ import annotations

from typing import Any

from visattn.pipelines.families import image, video
from visattn.pipelines.families.base import Args, Family, Seen, patches


def _flux(config: Any, args: Args) -> Seen:
    """A ControlNet for several kinds of control (union) puts a token for the kind before the text."""
    seen = image.position_ids(config, args)
    return seen if config.num_mode is None else seen._replace(prefix=seen.prefix + 1)


def _sd3(config: Any, args: Args) -> Seen:
    """Latents may come as tokens, and there may be no text; the control is as large as the latents."""
    latents = args["hidden_states"] if args["hidden_states"].ndim == 4 else args["controlnet_cond"]
    text = 0 if config.joint_attention_dim is None else args["encoder_hidden_states"].shape[1]
    return Seen(patches(config, tuple(latents.shape[-2:])), 0, text)


def _cosmos(config: Any, args: Args) -> Seen:
    return Seen(patches(config, tuple(args["controls_latents"].shape[-3:])))


FLUX = Family(
    name="ControlNet of FLUX.1",
    classes=("FluxControlNetModel",),
    dims=2,
    sites=image.FLUX.sites,
    seen=_flux,
    read=image.FLUX.read,
    tokens="mode, text, grid, reference images",
)

SD3 = Family(
    name="ControlNet of Stable Diffusion 3",
    classes=("SD3ControlNetModel",),
    dims=2,
    sites=image.SD3.sites,
    seen=_sd3,
    tokens="grid, text if it has any",
)

Z_IMAGE = Family(
    name="ControlNet of Z-Image",
    classes=("ZImageControlNetModel",),
    dims=2,
    sites=("control_noise_refiner.*.attention", "noise_refiner.*.attention", "control_layers.*.attention"),
    seen=image.Z_IMAGE.seen,
    anchor="x",
    tokens=image.Z_IMAGE.tokens,
)

COSMOS = Family(
    name="ControlNet of Cosmos",
    classes=("CosmosControlNetModel",),
    dims=3,
    sites=("control_blocks.*.attn1",),
    seen=_cosmos,
    anchor="controls_latents",
    tokens=video.COSMOS.tokens,
)

SANA = Family(
    name="ControlNet of Sana",
    classes=("SanaControlNetModel",),
    dims=2,
    sites=(),
    seen=image.SANA.seen,
    nothing=image.SANA.nothing,
)

FAMILIES = (FLUX, SD3, Z_IMAGE, COSMOS, SANA)
