"""UNets of images and videos, and their ControlNets."""

from __future__ import annotations

from typing import Any

from visattn.pipelines.families.base import Args, Family, Seen


def _sample(config: Any, args: Args) -> Seen:
    """Of videos too the last two axes: spatial attention runs frame by frame."""
    return Seen(tuple(args["sample"].shape[-2:]))


UNET = Family(
    name="Stable Diffusion UNet (1.5, 2.1, XL)",
    classes=("UNet2DConditionModel", "ControlNetModel", "ControlNetUnionModel", "UNetControlNetXSModel"),
    dims=2,
    sites=("down_blocks.*.attn1", "mid_block.*.attn1", "up_blocks.*.attn1"),
    seen=_sample,
    anchor="sample",
    levels="ceil",
    tokens="grid, halved from level to level",
)

VIDEO_UNET = Family(
    name="video UNet (AnimateDiff, Stable Video Diffusion, I2VGen-XL)",
    classes=(
        "UNetMotionModel",
        "SparseControlNetModel",
        "UNetSpatioTemporalConditionModel",
        "UNet3DConditionModel",
        "I2VGenXLUNet",
    ),
    dims=2,
    # Attention over frames stands beside it, in motion_modules, temp_attentions and temporal_transformer_blocks.
    sites=tuple(
        f"{block}.attentions.*.transformer_blocks.*.attn1" for block in ("down_blocks.*", "mid_block", "up_blocks.*")
    ),
    seen=_sample,
    anchor="sample",
    levels="ceil",
    tokens="grid of each frame, halved from level to level",
)

UNCONDITIONAL = Family(
    name="unconditional UNet (DDPM, DDIM)",
    classes=("UNet2DModel",),
    dims=2,
    sites=("down_blocks.*.attentions.*", "mid_block.attentions.*", "up_blocks.*.attentions.*"),
    seen=_sample,
    anchor="sample",
    levels="ceil",
    tokens="grid, halved from level to level",
)

AUDIOLDM2 = Family(
    name="AudioLDM 2",
    classes=("AudioLDM2UNet2DConditionModel",),
    dims=2,
    # Of the transformers of a layer, those without a text attend to themselves twice.
    sites=tuple(
        f"{block}.attentions.*.transformer_blocks.*.attn{i}"
        for block in ("down_blocks.*", "mid_block", "up_blocks.*")
        for i in (1, 2)
    ),
    seen=_sample,
    anchor="sample",
    levels="ceil",
    tokens="grid of time and frequency, halved from level to level",
)

KANDINSKY3 = Family(
    name="Kandinsky 3",
    classes=("Kandinsky3UNet",),
    dims=2,
    # Behind the first attention of a level stands that to the text.
    sites=("down_blocks.*.attentions.0.attention", "up_blocks.*.attentions.0.attention"),
    seen=_sample,
    anchor="sample",
    levels="floor",
    crossing=True,
    tokens="grid, halved from level to level",
)

CONTROLNET_XS = Family(
    name="ControlNet-XS adapter",
    classes=("ControlNetXSAdapter",),
    dims=2,
    sites=(),
    seen=_sample,
    nothing="its layers run inside of UNetControlNetXSModel, which is patched as a whole",
)

FAMILIES = (UNET, VIDEO_UNET, UNCONDITIONAL, AUDIOLDM2, KANDINSKY3, CONTROLNET_XS)
