"""Image model families."""

from __future__ import annotations

from typing import Any

import torch

from visattn.pipelines.families.base import Args, Family, Seen, patches


def _latents(config: Any, args: Args) -> Seen:
    return Seen(patches(config, tuple(args["hidden_states"].shape[-2:])))


def _unet(config: Any, args: Args) -> Seen:
    return Seen(tuple(args["sample"].shape[-2:]))


def _position_ids(config: Any, args: Args) -> Seen:
    return Seen((), args["encoder_hidden_states"].shape[1], 0, args["img_ids"])


def _read_flux_ids(ids: torch.Tensor, seen: Seen) -> Seen:
    """Rows of img_ids [tokens, (image, y, x)]; reference images (Kontext) have image > 0 and follow."""
    ids = ids[0] if ids.ndim == 3 else ids
    target = ids[ids[:, 0] == ids[0, 0]]
    grid = (int(target[:, 1].max() - target[:, 1].min()) + 1, int(target[:, 2].max() - target[:, 2].min()) + 1)
    return Seen(grid, seen.prefix, len(ids) - len(target))


DIT = Family(
    name="DiT",
    classes=("DiTTransformer2DModel",),
    dims=2,
    sites=("transformer_blocks.*.attn1",),
    seen=_latents,
)

UNET = Family(
    name="Stable Diffusion UNet (1.5, 2.1, XL)",
    classes=("UNet2DConditionModel",),
    dims=2,
    sites=("down_blocks.*.attn1", "mid_block.*.attn1", "up_blocks.*.attn1"),
    seen=_unet,
    anchor="sample",
    levels=True,
    tokens="grid, halved from level to level",
)

FLUX = Family(
    name="FLUX.1",
    classes=("FluxTransformer2DModel",),
    dims=2,
    sites=("transformer_blocks.*.attn", "single_transformer_blocks.*.attn"),
    seen=_position_ids,
    read=_read_flux_ids,
    tokens="text, grid, reference images",
)

FAMILIES = (DIT, UNET, FLUX)
