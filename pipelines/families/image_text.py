"""Image model families whose text stands in one piece before or after the grid of the latents."""

from __future__ import annotations

from typing import Any

import torch

from visattn.pipelines.families import raster
from visattn.pipelines.families.base import Args, Family, Seen, patches
from visattn.runtime.where import REST

# Learned tokens that AuraFlow puts before the text.
REGISTERS = 8
# Where the positions of Ideogram 4's image tokens begin; those of its text are below.
IMAGE_POSITION = 65536
_NO_GRID = "the position ids of its image tokens are not those of a grid in raster order"


def _text_then_latents(config: Any, args: Args) -> Seen:
    grid = patches(config, tuple(args["hidden_states"].shape[-2:]))
    return Seen(grid, args["encoder_hidden_states"].shape[1])


def _glm(config: Any, args: Args) -> Seen:
    """While it edits, keys of the reference images, which are cached, come before those of text and image."""
    cache, seen = args.get("kv_caches"), _text_then_latents(config, args)
    return seen if cache is None or cache[0].mode != "read" else seen._replace(prefix=REST)


def _auraflow(config: Any, args: Args) -> Seen:
    seen = _text_then_latents(config, args)
    return seen._replace(prefix=seen.prefix + REGISTERS)


def _ernie(config: Any, args: Args) -> Seen:
    return Seen(patches(config, tuple(args["hidden_states"].shape[-2:])), 0, args["text_bth"].shape[1])


def _hunyuan(config: Any, args: Args) -> Seen:
    """The refiner's latents have frames; the text of glyphs, if there is any, joins that of the prompt."""
    return Seen(patches(config, tuple(args["hidden_states"].shape[2:])), 0, REST)


def _krea2(config: Any, args: Args) -> Seen:
    return Seen((), args["encoder_hidden_states"].shape[1], 0, args["position_ids"])


def _read_joint_ids(config: Any, ids: torch.Tensor, seen: Seen) -> Seen:
    """Rows of position_ids [text + tokens, (0, y, x)]; those of the text are zero."""
    grid = raster.whole(ids[int(seen.prefix) :, 1:])
    return Seen(why=_NO_GRID) if grid is None else seen._replace(grid=grid)


def _flux3(config: Any, args: Args) -> Seen:
    references = args.get("image_cond_hidden_states")
    after = 0 if references is None else references.shape[1]
    return Seen((), args["encoder_hidden_states"].shape[1], after, args["img_ids"])


def _read_image_ids(config: Any, ids: torch.Tensor, seen: Seen) -> Seen:
    """Rows of img_ids [tokens, (t, y, x, l)], y and x scaled."""
    grid = raster.whole(ids[:, 1:3])
    return Seen(why=_NO_GRID) if grid is None else seen._replace(grid=grid)


def _ideogram(config: Any, args: Args) -> Seen:
    return Seen(ids=args["position_ids"])


def _read_packed_ids(config: Any, ids: torch.Tensor, seen: Seen) -> Seen:
    """Rows of position_ids [B, padding + text + tokens, (t, y, x)]; all samples end with an image of one size."""
    ids = ids.detach().cpu()
    image = (ids >= IMAGE_POSITION).all(-1)
    tokens = int(image[0].sum())
    before = ids.shape[1] - tokens
    if bool(image[:, :before].any()) or not bool(image[:, before:].all()):
        return Seen(why="its samples do not all end with an image of one size")
    grids = ids[:, before:, 1:] - IMAGE_POSITION
    grid = raster.whole(grids[0]) if tokens and bool((grids == grids[:1]).all()) else None
    return Seen(why=_NO_GRID) if grid is None else seen._replace(grid=grid, prefix=before)


COGVIEW = Family(
    name="CogView 3+, 4",
    classes=("CogView3PlusTransformer2DModel", "CogView4Transformer2DModel"),
    dims=2,
    sites=("transformer_blocks.*.attn1",),
    seen=_text_then_latents,
    # A mask of text becomes a product over queries and keys; image tokens, which come last, are always valid.
    mask_row=-1,
    tokens="text, grid",
)

GLM_IMAGE = Family(
    name="GLM-Image",
    classes=("GlmImageTransformer2DModel",),
    dims=2,
    sites=("transformer_blocks.*.attn1",),
    seen=_glm,
    mask_row=-1,
    wider=True,
    tokens="text, grid",
)

AURAFLOW = Family(
    name="AuraFlow",
    classes=("AuraFlowTransformer2DModel",),
    dims=2,
    sites=("joint_transformer_blocks.*.attn", "single_transformer_blocks.*.attn"),
    seen=_auraflow,
    tokens="registers, text, grid",
)

ERNIE = Family(
    name="ERNIE-Image",
    classes=("ErnieImageTransformer2DModel",),
    dims=2,
    sites=("layers.*.self_attention",),
    seen=_ernie,
    tokens="grid, text",
)

HUNYUAN_IMAGE = Family(
    name="HunyuanImage and its refiner",
    classes=("HunyuanImageTransformer2DModel",),
    dims=0,
    sites=("transformer_blocks.*.attn", "single_transformer_blocks.*.attn"),
    seen=_hunyuan,
    tokens="grid (of one frame, or of several in the refiner), text",
)

KREA2 = Family(
    name="Krea 2",
    classes=("Krea2Transformer2DModel",),
    dims=2,
    # The fusion of the text has paths with the same end.
    sites=("transformer_blocks.*.attn",),
    seen=_krea2,
    read=_read_joint_ids,
    tokens="text, grid",
)

FLUX3 = Family(
    name="FLUX.3",
    classes=("Flux3Transformer2DModel",),
    dims=2,
    # Beside the blocks of the image are those of text and references, each alone.
    sites=("mode_blocks.image.*.attn", "single_transformer_blocks.*.attn"),
    seen=_flux3,
    read=_read_image_ids,
    tokens="text, grid, reference images (first blocks: grid)",
)

IDEOGRAM4 = Family(
    name="Ideogram 4",
    classes=("Ideogram4Transformer2DModel",),
    dims=2,
    sites=("layers.*.attention",),
    seen=_ideogram,
    read=_read_packed_ids,
    # Padding sees padding alone; what it gets is never used, and the image sees all other tokens.
    mask_row=-1,
    tokens="padding, text, grid",
)

FAMILIES = (COGVIEW, GLM_IMAGE, AURAFLOW, ERNIE, HUNYUAN_IMAGE, KREA2, FLUX3, IDEOGRAM4)
