"""Model families whose queries are those of the image or video, while keys are also those of the text."""

from __future__ import annotations

import math
from typing import Any

from visattn.pipelines.families.base import Args, Family, Seen, patches
from visattn.runtime.where import REST


def _prx(config: Any, args: Args) -> Seen:
    return Seen(patches(config, tuple(args["hidden_states"].shape[-2:])), args["encoder_hidden_states"].shape[1])


def _nucleus(config: Any, args: Args) -> Seen:
    """img_shapes: (frames, height, width) of the image, or a list of it for each sample. Keys of text may be cached."""
    shapes = args["img_shapes"]
    first = shapes[0] if isinstance(shapes, list) else shapes
    if isinstance(shapes, list) and any(shape != first for shape in shapes):
        return Seen(why="the sizes of its samples differ, and its model uses those of the first for all")
    frames, height, width = first
    return Seen((height, width), 0, REST) if frames == 1 else Seen(why=f"its image has {frames} frames")


def _cascade(config: Any, args: Args) -> Seen:
    """Keys of CLIP follow those of the image: pooled text, and text and image where both are given."""
    pooled, text, image = (args.get(name) for name in ("clip_text_pooled", "clip_text", "clip_img"))
    assert pooled is not None
    after = pooled.shape[1] * config.clip_seq
    if text is not None and image is not None:
        after += text.shape[1] + config.clip_seq * (1 if image.ndim == 2 else image.shape[1])
    return Seen(patches(config, tuple(args["sample"].shape[-2:])), 0, after)


def _cosmos3(config: Any, args: Args) -> Seen:
    """Text, which asks causally and for itself; then video, sound and actions, packed without a batch."""
    shapes, before = args["vision_token_shapes"], args["und_len"]
    if len(shapes) != 1:
        return Seen(why=f"its forward has {len(shapes)} images or videos")
    grid = tuple(shapes[0])
    return Seen(grid, before, args["sequence_length"] - before - math.prod(grid))


def _qwen21(config: Any, args: Args) -> Seen:
    """Text and reference images, one slot of the text for 2 x 2 of their tokens, then the image."""
    *references, (frames, height, width) = args["img_shapes"][0]
    if frames != 1:
        return Seen(why=f"its image has {frames} frames")
    tokens = sum(math.prod(shape) for shape in references)
    return Seen((height, width), args["encoder_hidden_states"].shape[1] - tokens // 4 + tokens)


PRX = Family(
    name="PRX",
    classes=("PRXTransformer2DModel",),
    dims=2,
    sites=("blocks.*.attention",),
    seen=_prx,
    wider=True,
    tokens="grid (keys: text, grid)",
)

NUCLEUS = Family(
    name="Nucleus-Image",
    classes=("NucleusMoEImageTransformer2DModel",),
    dims=2,
    sites=("transformer_blocks.*.attn",),
    seen=_nucleus,
    wider=True,
    tokens="grid (keys: grid, text)",
)

STABLE_CASCADE = Family(
    name="Stable Cascade",
    classes=("StableCascadeUNet",),
    dims=2,
    sites=("down_blocks.*.attention", "up_blocks.*.attention"),
    seen=_cascade,
    anchor="sample",
    levels="floor",
    wider=True,
    tokens="grid, halved from level to level (keys: grid, CLIP)",
)

COSMOS3 = Family(
    name="Cosmos 3",
    classes=("Cosmos3OmniTransformer",),
    dims=3,
    sites=("layers.*.self_attn",),
    seen=_cosmos3,
    anchor="vision_tokens",
    wider=True,
    pieces=True,
    tokens="grid, sound, actions (keys: text before them)",
)

QWEN21 = Family(
    name="Qwen-Image 2.1",
    classes=("QwenImage21Transformer2DModel",),
    dims=2,
    sites=("transformer_blocks.*.attn",),
    seen=_qwen21,
    wider=True,
    pieces=True,
    tokens="grid (keys: text, reference images, grid)",
)

FAMILIES = (PRX, NUCLEUS, STABLE_CASCADE, COSMOS3, QWEN21)
