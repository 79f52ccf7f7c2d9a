"""Video model families whose clip stands beside its history, sound or several texts."""

from __future__ import annotations

import math
from typing import Any

import torch

from visattn.pipelines.families import raster
from visattn.pipelines.families.base import Args, Family, Seen, patches
from visattn.runtime.where import REST


def _latents(config: Any, args: Args) -> Seen:
    return Seen(patches(config, tuple(args["hidden_states"].shape[-3:])))


def _frames_first(config: Any, args: Args) -> Seen:
    """Latents [B, F, C, H, W]."""
    _, frames, _, height, width = args["hidden_states"].shape
    return Seen(patches(config, (frames, height, width)))


def _channels_last(config: Any, args: Args) -> Seen:
    """Latents [B, F, H, W, C]."""
    return Seen(patches(config, tuple(args["hidden_states"].shape[1:4])))


def _each_frame(config: Any, args: Args) -> Seen:
    """Latte: a batch of frames attends within each of them."""
    return Seen(patches(config, tuple(args["hidden_states"].shape[-2:])))


def _anyflow_far(config: Any, args: Args) -> Seen:
    """A chunk, which sees the chunks before it in a cache and is padded to whole blocks of 128 tokens."""
    if args.get("kv_cache") is None or args["kv_cache_flag"].get("is_cache_step"):
        return Seen(why="its chunks see each other through a mask of blocks")
    frames, _, *sides = args["hidden_states"].shape[1:]
    grid = patches(config, (frames, *sides))
    return Seen(grid, REST, -math.prod(grid) % 128)


def _easyanimate(config: Any, args: Args) -> Seen:
    """Frames are not patchified; the tokens of T5 follow those of the other text encoder."""
    frames, height, width = args["hidden_states"].shape[-3:]
    texts = [args.get(name) for name in ("encoder_hidden_states", "encoder_hidden_states_t5")]
    before = sum(text.shape[1] for text in texts if text is not None)
    return Seen((frames, height // config.patch_size, width // config.patch_size), before)


def _motif(config: Any, args: Args) -> Seen:
    """Image tokens and text follow; decoder layers are followed by the tokens of the encoder instead."""
    return _latents(config, args)._replace(suffix=REST)


def _history(config: Any, args: Args) -> Seen:
    """Helios: frames of the past, in three resolutions, are tokens before the clip."""
    return _latents(config, args)._replace(prefix=REST)


def _framepack(config: Any, args: Args) -> Seen:
    """Frames of the past in three resolutions stand before the clip, and count where their indices are given too."""
    before = 0
    for name, scale in (("latents_clean", 1), ("latents_history_2x", 2), ("latents_history_4x", 4)):
        if args.get(name) is None or args.get(f"indices_{name}") is None:
            continue
        frames, height, width = args[name].shape[-3:]
        if scale == 1:
            before += frames * (height // 2) * (width // 2)
        else:
            # The latents are padded to whole patches.
            before += -(-frames // scale) * -(-height // (2 * scale)) * -(-width // (2 * scale))
    return _latents(config, args)._replace(prefix=before, suffix=REST)


def _minimax(config: Any, args: Args) -> Seen:
    return Seen(ids=args["position_ids"])


def _read_last_clip(config: Any, ids: torch.Tensor, seen: Seen) -> Seen:
    """Rows of position_ids [tokens, (time, y, x)]: text, conditions, sound and, in the end, the clip.

    Frames are not evenly spaced in time.
    """
    clip = raster.blocks(ids)[-1]
    return seen._replace(grid=clip.grid, prefix=clip.start)


ALLEGRO = Family(
    name="Allegro",
    classes=("AllegroTransformer3DModel",),
    dims=3,
    sites=("transformer_blocks.*.attn1",),
    seen=_latents,
)

ANYFLOW = Family(
    name="AnyFlow",
    classes=("AnyFlowTransformer3DModel",),
    dims=3,
    sites=("blocks.*.attn1",),
    seen=_frames_first,
)

ANYFLOW_FAR = Family(
    name="AnyFlow FAR",
    classes=("AnyFlowFARTransformer3DModel",),
    dims=3,
    sites=("blocks.*.attn1",),
    seen=_anyflow_far,
    wider=True,
    tokens="grid of a chunk, padding (keys: cached chunks before them)",
)

EASYANIMATE = Family(
    name="EasyAnimate",
    classes=("EasyAnimateTransformer3DModel",),
    dims=3,
    sites=("transformer_blocks.*.attn1",),
    seen=_easyanimate,
    tokens="text, grid",
)

FRAMEPACK = Family(
    name="HunyuanVideo FramePack",
    classes=("HunyuanVideoFramepackTransformer3DModel",),
    dims=3,
    sites=("transformer_blocks.*.attn", "single_transformer_blocks.*.attn"),
    seen=_framepack,
    tokens="history, grid, image, text",
)

HELIOS = Family(
    name="Helios",
    classes=("HeliosTransformer3DModel",),
    dims=3,
    sites=("blocks.*.attn1",),
    seen=_history,
    tokens="history, grid",
)

KANDINSKY6 = Family(
    name="Kandinsky 6 (video)",
    classes=("Kandinsky6Transformer3DModel",),
    dims=3,
    # Sound has self-attention in the same blocks.
    sites=("visual_transformer_blocks.*.video_dec_block.self_attention",),
    seen=_channels_last,
)

LATTE = Family(
    name="Latte",
    classes=("LatteTransformer3DModel",),
    dims=2,
    # Attention over frames stands beside it, in temporal_transformer_blocks.
    sites=("transformer_blocks.*.attn1",),
    seen=_each_frame,
    tokens="grid of each frame",
)

MINIMAX_H3 = Family(
    name="MiniMax-H3 (video)",
    classes=("MiniMaxH3Transformer3DModel",),
    dims=3,
    # The refiner of the text has paths with the same end.
    sites=("transformer_blocks.*.attn",),
    seen=_minimax,
    read=_read_last_clip,
    tokens="text, conditions, sound, grid",
)

MOTIF = Family(
    name="Motif-Video",
    classes=("MotifVideoTransformer3DModel",),
    dims=3,
    sites=("transformer_blocks.*.attn", "single_transformer_blocks.*.attn"),
    seen=_motif,
    tokens="grid, image, text",
)

FAMILIES = (ALLEGRO, ANYFLOW, ANYFLOW_FAR, EASYANIMATE, FRAMEPACK, HELIOS, KANDINSKY6, LATTE, MINIMAX_H3, MOTIF)
