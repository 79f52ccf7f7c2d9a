"""Image model families whose text stands in one piece before or after the grid of the latents."""

from __future__ import annotations

from typing import Any

import torch

from visattn.pipelines.families import raster
from visattn.pipelines.families.base import REST, Args, Family, Seen, patches

# Learned tokens that AuraFlow puts before the text.
REGISTERS = 8


def _text_then_latents(config: Any, args: Args) -> Seen:
    grid = patches(config, tuple(args["hidden_states"].shape[-2:]))
    return Seen(grid, args["encoder_hidden_states"].shape[1])


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
    if grid is None:
        return Seen(why="the position ids of its image tokens are not those of a grid in raster order")
    return seen._replace(grid=grid)


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
    seen=_text_then_latents,
    mask_row=-1,
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

FAMILIES = (COGVIEW, GLM_IMAGE, AURAFLOW, ERNIE, HUNYUAN_IMAGE, KREA2)
