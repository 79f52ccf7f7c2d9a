"""Video model families."""

from __future__ import annotations

import math
from typing import Any

import torch

from visattn.pipelines.families import raster
from visattn.pipelines.families.base import Args, Family, Seen, patches
from visattn.runtime.where import REST, Sample


def _latents(config: Any, args: Args) -> Seen:
    return Seen(patches(config, tuple(args["hidden_states"].shape[-3:])))


def _latents_then_text(config: Any, args: Args) -> Seen:
    return _latents(config, args)._replace(suffix=args["encoder_hidden_states"].shape[1])


def _latents_then_rest(config: Any, args: Args) -> Seen:
    return _latents(config, args)._replace(suffix=REST)


def _frames_first(config: Any, args: Args) -> Seen:
    """CogVideoX: latents [B, F, C, H, W] after the text."""
    _, frames, _, height, width = args["hidden_states"].shape
    return Seen(patches(config, (frames, height, width)), args["encoder_hidden_states"].shape[1])


def _mochi(config: Any, args: Args) -> Seen:
    """Frames are not patchified; each sample is followed by the valid tokens of its own text."""
    frames, height, width = args["hidden_states"].shape[-3:]
    size = config.patch_size
    return Seen((frames, height // size, width // size), 0, REST)


def _animate(config: Any, args: Args) -> Seen:
    """Wan Animate: the first frame is the reference image."""
    frames, *sizes = _latents(config, args).grid
    return Seen((frames - 1, *sizes), math.prod(sizes))


def _vace(config: Any, args: Args) -> Seen:
    return _latents(config, args)._replace(ids=args.get("control_hidden_states"))


def _read_references(config: Any, control: torch.Tensor, seen: Seen) -> Seen:
    """The control channels [B, C, F, H, W] tell which frames are references; these stand before the clip.

    Of a reference's channels only the first, the latents of its image, are set: the second half of the latents and the
    mask are zero, as they are in no frame of a clip.
    """
    frames, *sizes = seen.grid
    blank = (control[:, config.in_channels :] == 0).flatten(3).all(3).all(1)
    if not frames or blank.shape[1] // config.patch_size[0] != frames:
        return seen
    before = [int(n) // config.patch_size[0] for n in blank.cumprod(1).sum(1).tolist()]
    # Control that is zero from end to end is none, rather than references without a clip.
    found = [0 if n == frames else n for n in before]
    samples = [Sample((frames - n, *sizes), n * math.prod(sizes)) for n in found]
    if len(set(samples)) == 1:
        return seen._replace(grid=samples[0].grid, prefix=samples[0].prefix)
    return seen._replace(samples=tuple(samples))


def _coordinates(config: Any, args: Args) -> Seen:
    """LTX: latents come packed, with coordinates or sizes beside them."""
    given = [args.get(name) for name in ("num_frames", "height", "width")]
    sizes = tuple(n for n in given if n is not None)
    if args.get("video_coords") is not None:
        # Beside coordinates, sizes are not needed: some pipelines pass 1x1x1.
        return Seen(sizes if len(sizes) == 3 and sizes != (1, 1, 1) else (), ids=args["video_coords"])
    if len(sizes) < 3:
        return Seen(why="num_frames, height and width are not among the arguments of its forward")
    return Seen(sizes)


def _read_coordinates(coordinates: torch.Tensor, seen: Seen, last: bool) -> Seen:
    """video_coords: [B, (time, y, x), tokens], or with a start and an end of each token, [B, 3, tokens, 2].

    Conditions and references have grids of their own, before or after the largest, which is the video.
    """
    if bool((coordinates != coordinates[:1]).any()):
        return Seen(why="the coordinates of its samples differ")
    rows = coordinates[0].detach().cpu().transpose(0, 1)
    starts, ends = (rows, None) if rows.ndim == 2 else (rows[..., 0], rows[..., 1])
    tokens, known = len(starts), math.prod(seen.grid)
    if seen.grid and raster.whole(starts[:known], ends if ends is None else ends[:known]) == seen.grid:
        return seen._replace(suffix=tokens - known)
    video = raster.largest(starts, ends, last)
    return seen._replace(grid=video.grid, prefix=video.start, suffix=tokens - video.start - video.tokens)


def _read_video_last(config: Any, coordinates: torch.Tensor, seen: Seen) -> Seen:
    return _read_coordinates(coordinates, seen, True)


def _read_video_first(config: Any, coordinates: torch.Tensor, seen: Seen) -> Seen:
    return _read_coordinates(coordinates, seen, False)


def _kandinsky(config: Any, args: Args) -> Seen:
    """Latents [B, F, H, W, C]."""
    if (args.get("sparse_params") or {}).get("to_fractal"):
        return Seen(why="its own sparse attention (NABLA) has put the tokens in fractal order")
    return Seen(patches(config, tuple(args["hidden_states"].shape[1:4])))


WAN = Family(
    name="Wan 2.1 and 2.2, SkyReels-V2, ChronoEdit",
    # In SkyReels' autoregressive mode the mask hides later frames, which leaves the call dense.
    classes=("WanTransformer3DModel", "SkyReelsV2Transformer3DModel", "ChronoEditTransformer3DModel"),
    dims=3,
    sites=("blocks.*.attn1",),
    seen=_latents,
)

WAN_VACE = Family(
    name="Wan VACE",
    classes=("WanVACETransformer3DModel",),
    dims=3,
    sites=("vace_blocks.*.attn1", "blocks.*.attn1"),
    seen=_vace,
    read=_read_references,
    tokens="reference images, grid",
)

WAN_ANIMATE = Family(
    name="Wan Animate",
    classes=("WanAnimateTransformer3DModel",),
    dims=3,
    sites=("blocks.*.attn1",),
    seen=_animate,
    tokens="reference image, grid",
)

HUNYUAN = Family(
    name="HunyuanVideo",
    classes=("HunyuanVideoTransformer3DModel",),
    dims=3,
    sites=("transformer_blocks.*.attn", "single_transformer_blocks.*.attn"),
    seen=_latents_then_text,
    tokens="grid, text",
)

HUNYUAN15 = Family(
    name="HunyuanVideo 1.5",
    classes=("HunyuanVideo15Transformer3DModel",),
    dims=3,
    sites=("transformer_blocks.*.attn",),
    seen=_latents_then_rest,
    # The mask is a product over queries and keys; video tokens, which come first, are always valid.
    mask_row=0,
    tokens="grid, image, texts, padding",
)

COGVIDEOX = Family(
    name="CogVideoX, ConsisID",
    classes=("CogVideoXTransformer3DModel", "ConsisIDTransformer3DModel"),
    dims=3,
    sites=("transformer_blocks.*.attn1",),
    seen=_frames_first,
    tokens="text, grid",
)

MOCHI = Family(
    name="Mochi",
    classes=("MochiTransformer3DModel",),
    dims=3,
    sites=("transformer_blocks.*.attn1",),
    seen=_mochi,
    tokens="grid, text",
)

LTX = Family(
    name="LTX-Video",
    classes=("LTXVideoTransformer3DModel",),
    dims=3,
    sites=("transformer_blocks.*.attn1",),
    seen=_coordinates,
    read=_read_video_last,
    tokens="conditions, grid",
)

LTX2 = Family(
    name="LTX-2 (video)",
    classes=("LTX2VideoTransformer3DModel",),
    dims=3,
    sites=("transformer_blocks.*.attn1",),
    seen=_coordinates,
    read=_read_video_first,
    tokens="grid, conditions and references",
)

COSMOS = Family(
    name="Cosmos",
    classes=("CosmosTransformer3DModel",),
    dims=3,
    sites=("transformer_blocks.*.attn1",),
    seen=_latents,
)

KANDINSKY5 = Family(
    name="Kandinsky 5",
    classes=("Kandinsky5Transformer3DModel",),
    dims=3,
    sites=("visual_transformer_blocks.*.self_attention",),
    seen=_kandinsky,
)

FAMILIES = (WAN, WAN_VACE, WAN_ANIMATE, HUNYUAN, HUNYUAN15, COGVIDEOX, MOCHI, LTX, LTX2, COSMOS, KANDINSKY5)
