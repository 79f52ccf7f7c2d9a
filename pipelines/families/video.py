"""Video model families."""

from __future__ import annotations

from typing import Any

from visattn.pipelines.families.base import REST, Args, Family, Seen, patches


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


def _sizes_given(config: Any, args: Args) -> Seen:
    """LTX: latents come packed, with the sizes beside them."""
    sizes = tuple(args[name] for name in ("num_frames", "height", "width") if args.get(name) is not None)
    if len(sizes) < 3:
        return Seen(why="num_frames, height and width are not among the arguments of its forward")
    return Seen(sizes)


def _kandinsky(config: Any, args: Args) -> Seen:
    """Latents [B, F, H, W, C]."""
    if (args.get("sparse_params") or {}).get("to_fractal"):
        return Seen(why="its own sparse attention (NABLA) has put the tokens in fractal order")
    return Seen(patches(config, tuple(args["hidden_states"].shape[1:4])))


WAN = Family(
    name="Wan 2.1 and 2.2",
    classes=("WanTransformer3DModel", "WanVACETransformer3DModel", "WanAnimateTransformer3DModel"),
    dims=3,
    sites=("vace_blocks.*.attn1", "blocks.*.attn1"),
    seen=_latents,
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
    name="CogVideoX",
    classes=("CogVideoXTransformer3DModel",),
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
    seen=_sizes_given,
)

LTX2 = Family(
    name="LTX-2 (video)",
    classes=("LTX2VideoTransformer3DModel",),
    dims=3,
    sites=("transformer_blocks.*.attn1",),
    seen=_sizes_given,
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

FAMILIES = (WAN, HUNYUAN, HUNYUAN15, COGVIDEOX, MOCHI, LTX, LTX2, COSMOS, KANDINSKY5)
