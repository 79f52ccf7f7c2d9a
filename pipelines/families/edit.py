"""Image model families that edit, or whose masks and sizes come in forms of their own."""

from __future__ import annotations

import math
from typing import Any

import torch

from visattn.pipelines.families.base import Args, Family, Seen, patches
from visattn.runtime.where import REST, Sample


def _joy(config: Any, args: Args) -> Seen:
    """Latents [B, C, F, H, W] or [B, images, C, F, H, W]: the last image is the target, and its tokens come first."""
    latents, text = args["hidden_states"], args["encoder_hidden_states"].shape[1]
    frames, height, width = patches(config, tuple(latents.shape[-3:]))
    if frames != 1:
        return Seen(why=f"its image has {frames} frames")
    others = (latents.shape[1] - 1 if latents.ndim == 6 else 0) * height * width
    return Seen((height, width), 0, others + text)


def _of_samples(grids: list[tuple[int, ...]]) -> Seen:
    """Each sample begins with its grid."""
    if len(set(grids)) == 1:
        return Seen(grids[0], 0, REST)
    return Seen(samples=tuple(Sample(grid) for grid in grids))


def _joy_plus(config: Any, args: Args) -> Seen:
    """shape_list: (frames, height, width) in tokens of the target and of each reference image, per sample."""
    targets = [shapes[0] for shapes in args["shape_list"]]
    if any(frames != 1 for frames, *_ in targets):
        return Seen(why="its target has several frames")
    return _of_samples([tuple(sizes) for _, *sizes in targets])


def _lumina(config: Any, args: Args) -> Seen:
    """A list of latents holds images of several sizes, which its model pads."""
    latents = args["hidden_states"]
    if isinstance(latents, list | tuple):
        return _of_samples([patches(config, tuple(each.shape[-2:])) for each in latents])
    return Seen(patches(config, tuple(latents.shape[-2:])))


def _blocks(config: Any, args: Args) -> Seen:
    """Latents [B, C, H, W], or a vector for each entry of a code book [B, tokens]."""
    latents = args["hidden_states"]
    if latents.ndim == 2:
        return Seen((config.sample_size, config.sample_size))
    return Seen(patches(config, tuple(latents.shape[-2:])))


def _codes(config: Any, args: Args) -> Seen:
    """Indices into a code book [B, H, W], halved before the transformer if its first block is to."""
    step = 2 if config.downsample else 1
    return Seen(tuple(n // step for n in args["input_ids"].shape[-2:]))


def _fibo2(config: Any, args: Args) -> Seen:
    """The gist of the text comes first, unless the samples have gists of different length, see `_gist`."""
    grid = patches(config, tuple(args["hidden_states"].shape[-2:]))
    images = [patches(config, tuple(latents.shape[-2:])) for latents in args.get("context_latents") or ()]
    after, mask = sum(math.prod(image) for image in images), args.get("encoder_attention_mask")
    if mask is not None:
        return Seen(grid, 0, after, ids=mask)
    return Seen(grid, _gist_tokens(config, args["encoder_hidden_states"].shape[2]), after)


def _gist(config: Any, ids: torch.Tensor, seen: Seen) -> Seen:
    """From the mask of valid text tokens [B, text]."""
    gists = {_gist_tokens(config, length) for length in ids.sum(1).tolist()}
    return seen._replace(prefix=gists.pop()) if len(gists) == 1 else seen._replace(prefix=0, suffix=REST)


def _gist_tokens(config: Any, text: int) -> int:
    """Tokens that stand for so many of a text: in proportion between two bounds, in whole steps."""
    low, high, shortest = config.min_num_gist_tokens, config.max_num_gist_tokens, config.gist_min_text_len
    share = (text - shortest) / (config.gist_max_text_len - shortest)
    tokens = low + min(1.0, max(0.0, share)) * (high - low)
    return max(low, min(high, math.ceil(tokens / config.gist_step) * config.gist_step))


def _omnigen(config: Any, args: Args) -> Seen:
    """Text with images in it and a token of the time, whose number the length of the sequence tells."""
    return Seen(patches(config, tuple(args["hidden_states"].shape[-2:])), REST)


JOY_IMAGE = Family(
    name="JoyImage-Edit",
    classes=("JoyImageEditTransformer3DModel",),
    dims=2,
    sites=("double_blocks.*.attn",),
    seen=_joy,
    tokens="grid, reference images, text",
)

JOY_IMAGE_PLUS = Family(
    name="JoyImage-Edit Plus",
    classes=("JoyImageEditPlusTransformer3DModel",),
    dims=2,
    sites=("double_blocks.*.attn",),
    seen=_joy_plus,
    tokens="grid, reference images, padding, text",
)

LUMINA_NEXT = Family(
    name="Lumina-Next",
    classes=("LuminaNextDiT2DModel",),
    dims=2,
    sites=("layers.*.attn1",),
    seen=_lumina,
)

TRANSFORMER_2D = Family(
    name="blocks of VQ-Diffusion",
    classes=("Transformer2DModel",),
    dims=2,
    sites=("transformer_blocks.*.attn1",),
    seen=_blocks,
)

AMUSED = Family(
    name="aMUSEd",
    classes=("UVit2DModel",),
    dims=2,
    sites=("transformer_layers.*.attn1",),
    seen=_codes,
    anchor="input_ids",
)

FIBO2 = Family(
    name="Bria FIBO 2",
    classes=("BriaFibo2Transformer2DModel",),
    dims=2,
    sites=("noise_refiner.*.attention", "layers.*.attention"),
    seen=_fibo2,
    read=_gist,
    early=True,
    tokens="gist of the text, grid, reference images; the gist last where samples differ in its length",
)

OMNIGEN = Family(
    name="OmniGen",
    classes=("OmniGenTransformer2DModel",),
    dims=2,
    sites=("layers.*.self_attn",),
    seen=_omnigen,
    mask_row=-1,
    apart=True,
    crossing=True,
    tokens="padding, text and images (causal), time, grid",
)

FAMILIES = (JOY_IMAGE, JOY_IMAGE_PLUS, LUMINA_NEXT, TRANSFORMER_2D, AMUSED, FIBO2, OMNIGEN)
