"""Image model families."""

from __future__ import annotations

import math
from typing import Any

import torch

from visattn.pipelines.families.base import REST, Args, Family, Seen, patches


def _latents(config: Any, args: Args) -> Seen:
    return Seen(patches(config, tuple(args["hidden_states"].shape[-2:])))


def _latents_then_text(config: Any, args: Args) -> Seen:
    return _latents(config, args)._replace(suffix=args["encoder_hidden_states"].shape[1])


def _unet(config: Any, args: Args) -> Seen:
    return Seen(tuple(args["sample"].shape[-2:]))


def _position_ids(config: Any, args: Args) -> Seen:
    return Seen((), args["encoder_hidden_states"].shape[1], 0, args["img_ids"])


def _flux2(config: Any, args: Args) -> Seen:
    if args.get("kv_cache_mode") == "extract":
        # Reference tokens come first there, between text and image.
        return Seen(why="FLUX.2 is filling its cache of reference images, whose tokens come before the grid")
    return _position_ids(config, args)


def _read_position_ids(ids: torch.Tensor, seen: Seen) -> Seen:
    """Rows of img_ids [tokens, (image, y, x, ...)]; reference images have another first number and follow."""
    ids = ids[0] if ids.ndim == 3 else ids
    target = ids[ids[:, 0] == ids[0, 0]]
    grid = (_positions(target[:, 1]), _positions(target[:, 2]))
    return seen._replace(grid=grid, suffix=len(ids) - len(target))


def _positions(values: torch.Tensor) -> int:
    """Number of evenly spaced positions among values that start at the lowest; the distance need not be 1."""
    low, high = values.amin(), values.amax()
    if low == high:
        return 1
    return round(float((high - low) / (values[values > low].amin() - low))) + 1


def _qwen(config: Any, args: Args) -> Seen:
    """img_shapes: (frames, height, width) of the image and of each reference image, per sample."""
    shapes = args["img_shapes"]
    first = shapes[0] if isinstance(shapes[0], list) else shapes
    (frames, height, width), *references = first
    if frames != 1:
        return Seen(why=f"its image has {frames} frames")
    text = args["encoder_hidden_states"].shape[1]
    return Seen((height, width), text, sum(math.prod(shape) for shape in references))


def _z_image(config: Any, args: Args) -> Seen:
    """x: one latent [C, F, H, W] per sample; its tokens and the caption's are padded to multiples of 32."""
    x = args["x"]
    if isinstance(x[0], list | tuple):
        return Seen(why="omni sequences hold several images")
    sizes = [tuple(latent.shape[1:]) for latent in x]
    if sizes[0][0] != 1 or any(size != sizes[0] for size in sizes):
        return Seen(why="the images of a batch differ in size or have several frames")
    patch = args.get("patch_size", 2)
    return Seen((sizes[0][1] // patch, sizes[0][2] // patch), 0, REST)


def _lumina2(config: Any, args: Args) -> Seen:
    return Seen(_latents(config, args).grid, 0, 0, args["encoder_attention_mask"])


def _read_caption_lengths(mask: torch.Tensor, seen: Seen) -> Seen:
    """Valid caption tokens come right before the image, sample by sample."""
    lengths = [int(n) for n in mask.sum(1).tolist()]
    if len(set(lengths)) == 1:
        return seen._replace(prefix=lengths[0])
    return seen._replace(prefixes=tuple(lengths))


def _hidream(config: Any, args: Args) -> Seen:
    """Image tokens first (padded if not square), then text that differs from block to block."""
    if args.get("img_sizes") is not None:
        height, width = (int(n) for n in args["img_sizes"][0])
        return Seen((height, width), 0, REST)
    return Seen(patches(config, tuple(args["hidden_states"].shape[-2:])), 0, REST)


DIT = Family(
    name="DiT",
    classes=("DiTTransformer2DModel",),
    dims=2,
    sites=("transformer_blocks.*.attn1",),
    seen=_latents,
)

PIXART = Family(
    name="PixArt-alpha and sigma",
    classes=("PixArtTransformer2DModel",),
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

SD3 = Family(
    name="Stable Diffusion 3 and 3.5",
    classes=("SD3Transformer2DModel",),
    dims=2,
    sites=("transformer_blocks.*.attn*",),
    seen=_latents_then_text,
    tokens="grid, text (attn2: grid)",
)

FLUX = Family(
    name="FLUX.1",
    classes=("FluxTransformer2DModel",),
    dims=2,
    sites=("transformer_blocks.*.attn", "single_transformer_blocks.*.attn"),
    seen=_position_ids,
    read=_read_position_ids,
    tokens="text, grid, reference images",
)

FLUX2 = Family(
    name="FLUX.2",
    classes=("Flux2Transformer2DModel",),
    dims=2,
    sites=("transformer_blocks.*.attn", "single_transformer_blocks.*.attn"),
    seen=_flux2,
    read=_read_position_ids,
    tokens="text, grid, reference images",
)

CHROMA = Family(
    name="Chroma",
    classes=("ChromaTransformer2DModel",),
    dims=2,
    sites=("transformer_blocks.*.attn", "single_transformer_blocks.*.attn"),
    seen=_position_ids,
    read=_read_position_ids,
    # The mask is a product over queries and keys; image tokens, which come last, are always valid.
    mask_row=-1,
    tokens="text, grid",
)

BRIA = Family(
    name="Bria 3",
    classes=("BriaTransformer2DModel",),
    dims=2,
    sites=("transformer_blocks.*.attn", "single_transformer_blocks.*.attn"),
    seen=_position_ids,
    read=_read_position_ids,
    mask_row=-1,
    tokens="text, grid",
)

QWEN = Family(
    name="Qwen-Image",
    classes=("QwenImageTransformer2DModel",),
    dims=2,
    sites=("transformer_blocks.*.attn",),
    seen=_qwen,
    tokens="text, grid, reference images",
)

Z_IMAGE = Family(
    name="Z-Image",
    classes=("ZImageTransformer2DModel",),
    dims=2,
    sites=("noise_refiner.*.attention", "layers.*.attention"),
    seen=_z_image,
    anchor="x",
    tokens="grid, padding, text",
)

LUMINA2 = Family(
    name="Lumina 2",
    classes=("Lumina2Transformer2DModel",),
    dims=2,
    sites=("noise_refiner.*.attn", "layers.*.attn"),
    seen=_lumina2,
    read=_read_caption_lengths,
    tokens="text, grid",
)

HIDREAM = Family(
    name="HiDream",
    classes=("HiDreamImageTransformer2DModel",),
    dims=2,
    sites=("double_stream_blocks.*.attn1", "single_stream_blocks.*.attn1"),
    seen=_hidream,
    tokens="grid, padding, text",
)

SANA = Family(
    name="Sana",
    classes=("SanaTransformer2DModel",),
    dims=2,
    sites=(),
    seen=_latents,
    nothing="its self-attention is linear already, and cross-attention to the prompt has nothing to make sparse",
)

FAMILIES = (DIT, PIXART, UNET, SD3, FLUX, FLUX2, CHROMA, BRIA, QWEN, Z_IMAGE, LUMINA2, HIDREAM, SANA)
