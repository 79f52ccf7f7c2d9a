"""Image model families that edit, or whose masks and sizes come in forms of their own."""

from __future__ import annotations

from typing import Any

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

FAMILIES = (JOY_IMAGE, JOY_IMAGE_PLUS, LUMINA_NEXT, TRANSFORMER_2D, AMUSED)
