"""Image model families."""

from __future__ import annotations

import math
from typing import Any

import torch

from visattn.pipelines.families import raster
from visattn.pipelines.families.base import Args, Family, Seen, patches
from visattn.runtime.where import REST, Sample


def _latents(config: Any, args: Args) -> Seen:
    return Seen(patches(config, tuple(args["hidden_states"].shape[-2:])))


def _latents_then_text(config: Any, args: Args) -> Seen:
    return _latents(config, args)._replace(suffix=args["encoder_hidden_states"].shape[1])


def position_ids(config: Any, args: Args) -> Seen:
    """FLUX and what follows it: img_ids tell the grid, which stands behind the text."""
    return Seen((), args["encoder_hidden_states"].shape[1], 0, args["img_ids"])


def _flux2(config: Any, args: Args) -> Seen:
    if args.get("kv_cache_mode") == "extract":
        # Reference tokens come first there, between text and image.
        return Seen(why="FLUX.2 is filling its cache of reference images, whose tokens come before the grid")
    return position_ids(config, args)


def _read_position_ids(config: Any, ids: torch.Tensor, seen: Seen) -> Seen:
    """Rows of img_ids [tokens, (image, y, x, ...)]; reference images have another first number and follow."""
    if ids.ndim == 3:
        if bool((ids != ids[:1]).any()):
            return Seen(why="the position ids of its samples differ, and its model uses those of the first for all")
        ids = ids[0]
    ids = ids.detach().cpu()
    others = (ids[:, 0] != ids[0, 0]).nonzero()
    tokens = int(others[0]) if len(others) else len(ids)
    grid = raster.whole(ids[:tokens, 1:3])
    if grid is None or len(others) != len(ids) - tokens:
        return Seen(why=f"the position ids of its {tokens} image tokens are not those of a grid in raster order")
    return seen._replace(grid=grid, suffix=len(ids) - tokens)


def _qwen(config: Any, args: Args) -> Seen:
    """img_shapes: (frames, height, width) of the image and of each reference image, per sample."""
    shapes = args["img_shapes"]
    first = shapes[0] if isinstance(shapes[0], list) else shapes
    if isinstance(shapes[0], list) and any(shape != first for shape in shapes):
        return Seen(why="the sizes of its samples differ, and its model uses those of the first for all")
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
    if any(latent.shape[1] != 1 for latent in x):
        return Seen(why="its images have several frames")
    patch = args.get("patch_size", 2)
    grids = [(latent.shape[2] // patch, latent.shape[3] // patch) for latent in x]
    if any(grid != grids[0] for grid in grids):
        return Seen(samples=tuple(Sample(grid) for grid in grids))
    return Seen(grids[0], 0, REST)


def _lumina2(config: Any, args: Args) -> Seen:
    return Seen(_latents(config, args).grid, 0, 0, args["encoder_attention_mask"])


def _read_caption_lengths(config: Any, mask: torch.Tensor, seen: Seen) -> Seen:
    """Valid caption tokens come right before the image, sample by sample."""
    lengths = [int(n) for n in mask.sum(1).tolist()]
    if len(set(lengths)) == 1:
        return seen._replace(prefix=lengths[0])
    return seen._replace(samples=tuple(Sample(seen.grid, length) for length in lengths))


def _hidream(config: Any, args: Args) -> Seen:
    """Image tokens first (padded if not square), then text that differs from block to block."""
    if args.get("hidden_states_masks") is not None:
        return Seen((), 0, REST, args["img_ids"])
    return Seen(patches(config, tuple(args["hidden_states"].shape[-2:])), 0, REST)


def _read_padded_ids(config: Any, ids: torch.Tensor, seen: Seen) -> Seen:
    """Rows of img_ids [B, tokens, (0, y, x)], a grid and padding in each sample."""
    ids = ids.detach().cpu()
    found = [raster.largest(sample[:, 1:]) for sample in (ids if bool((ids != ids[:1]).any()) else ids[:1])]
    if any(block.start for block in found):
        return Seen(why="the position ids of its image tokens do not begin with those of a grid in raster order")
    if len({block.grid for block in found}) == 1:
        return seen._replace(grid=found[0].grid)
    return Seen(samples=tuple(Sample(block.grid) for block in found))


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

HUNYUAN_DIT = Family(
    name="Hunyuan-DiT",
    classes=("HunyuanDiT2DModel", "HunyuanDiT2DControlNetModel"),
    dims=2,
    sites=("blocks.*.attn1",),
    seen=_latents,
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
    name="FLUX.1, LongCat-Image, Ovis-Image",
    classes=("FluxTransformer2DModel", "LongCatImageTransformer2DModel", "OvisImageTransformer2DModel"),
    dims=2,
    sites=("transformer_blocks.*.attn", "single_transformer_blocks.*.attn"),
    seen=position_ids,
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
    seen=position_ids,
    read=_read_position_ids,
    # The mask is a product over queries and keys; image tokens, which come last, are always valid.
    mask_row=-1,
    tokens="text, grid",
)

BRIA = Family(
    name="Bria 3, FIBO",
    classes=("BriaTransformer2DModel", "BriaFiboTransformer2DModel"),
    dims=2,
    sites=("transformer_blocks.*.attn", "single_transformer_blocks.*.attn"),
    seen=position_ids,
    read=_read_position_ids,
    mask_row=-1,
    tokens="text, grid, reference images",
)

QWEN = Family(
    name="Qwen-Image",
    classes=("QwenImageTransformer2DModel", "QwenImageControlNetModel"),
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
    read=_read_padded_ids,
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

FAMILIES = (DIT, PIXART, HUNYUAN_DIT, SD3, FLUX, FLUX2, CHROMA, BRIA, QWEN, Z_IMAGE, LUMINA2, HIDREAM, SANA)
