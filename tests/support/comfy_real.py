"""Tiny models inside a real ComfyUI, sampled with its own sampler: dense, patched, masked dense, and dense again.

`python -m tests.support.comfy_real CHECKOUT` prints a line of JSON for each kind of model.
"""

import json
import sys

# What ComfyUI's parsers of arguments may see.
FOLDER = sys.argv[1] if __name__ == "__main__" else ""

STEPS = 3
# Kind -> shape of the latents, pattern, and size of the text: tokens, channels, those that count (all without one).
KINDS = {
    "wan": ((1, 16, 3, 12, 16), "na(window=3x3x3)", (7, 32)),
    "flux": ((1, 16, 12, 16), "na(window=3)", (7, 32)),
    "unet": ((1, 4, 10, 12), "na(window=3)", (7, 32)),
    "mmdit": ((1, 16, 12, 16), "na(window=3)", (7, 32)),
    "qwen": ((1, 16, 1, 12, 16), "na(window=3)", (7, 32)),
    "hunyuan": ((1, 16, 3, 12, 16), "na(window=3x3x3)", (7, 32)),
    "hunyuan_image": ((1, 64, 12, 16), "na(window=3)", (7, 32)),
    "chroma": ((1, 16, 12, 16), "na(window=3)", (7, 32)),
    "aura": ((1, 4, 12, 16), "na(window=3)", (7, 32)),
    "lumina": ((1, 16, 12, 16), "na(window=3)", (7, 32, 7)),
}


def built(kind):
    """A model patcher of ComfyUI with random weights."""
    import torch
    from comfy import supported_models as known
    from comfy.model_patcher import ModelPatcher

    axes = {"axes_dim": [4, 6, 6], "theta": 10000, "qkv_bias": True}
    wan = {"image_model": "wan2.1", "model_type": "t2v", "dim": 32, "ffn_dim": 64, "freq_dim": 32, "text_dim": 32}
    flux = {"in_channels": 16, "out_channels": 16, "context_in_dim": 32, "hidden_size": 32, "mlp_ratio": 2.0}
    flux |= {"num_heads": 2, "depth": 1, "depth_single_blocks": 1, "patch_size": 2, "vec_in_dim": 8, **axes}
    unet = {"image_size": 32, "in_channels": 4, "out_channels": 4, "model_channels": 32, "num_res_blocks": [1, 1]}
    unet |= {"channel_mult": [1, 2], "transformer_depth": [1, 1], "transformer_depth_middle": 1, "context_dim": 32}
    unet |= {"transformer_depth_output": [1, 1, 1, 1], "num_heads": 2, "num_head_channels": -1}
    unet |= {"use_spatial_transformer": True, "use_linear_in_transformer": False, "adm_in_channels": None}
    mmdit = {"in_channels": 16, "depth": 2, "patch_size": 2, "pos_embed_max_size": 32, "num_patches": 1024}
    mmdit |= {"adm_in_channels": 8, "context_embedder_config": _linear(32, 128), "qk_norm": "rms"}
    qwen = {"image_model": "qwen_image", "in_channels": 64, "out_channels": 16, "num_layers": 2, "patch_size": 2}
    qwen |= {"attention_head_dim": 16, "num_attention_heads": 2, "joint_attention_dim": 32, "axes_dims_rope": (4, 6, 6)}
    hunyuan = {
        "image_model": "hunyuan_video",
        **flux,
        "patch_size": [1, 2, 2],
        "guidance_embed": False,
        "byt5": False,
        "meanflow": False,
    }
    image = {**hunyuan, "patch_size": [1, 1], "in_channels": 64, "out_channels": 64, "vec_in_dim": None}
    image |= {"axes_dim": [8, 8]}
    chroma = {name: value for name, value in flux.items() if name != "vec_in_dim"}
    chroma |= {"in_channels": 64, "out_channels": 64, "in_dim": 64, "out_dim": 32, "hidden_dim": 32, "n_layers": 1}
    aura = {"cond_seq_dim": 32, "dim": 32, "n_layers": 3, "n_double_layers": 1, "n_heads": 2, "global_conddim": 32}
    lumina = {"image_model": "lumina2", "patch_size": 2, "in_channels": 16, "dim": 32, "n_layers": 2, "n_heads": 2}
    lumina |= {"n_refiner_layers": 1, "n_kv_heads": 1, "qk_norm": True, "cap_feat_dim": 32, "axes_dims": [4, 6, 6]}
    lumina |= {"axes_lens": [300, 512, 512]}
    classes = {
        "hunyuan_image": (known.HunyuanImage21, image),
        "chroma": (known.Chroma, {"image_model": "chroma", **chroma}),
        "aura": (known.AuraFlow, {**aura, "max_seq": 256}),
        "lumina": (known.Lumina2, lumina),
        "wan": (known.WAN21_T2V, {**wan, "num_heads": 2, "num_layers": 2}),
        "flux": (known.Flux, {"image_model": "flux", "guidance_embed": True, **flux}),
        "unet": (known.SD15, unet),
        "mmdit": (known.SD3, mmdit),
        "qwen": (known.QwenImage, qwen),
        "hunyuan": (known.HunyuanVideo, hunyuan),
    }
    found, config = classes[kind]
    torch.manual_seed(0)
    settings = found(config)
    settings.set_inference_dtype(torch.float32, None)
    model = settings.get_model({})
    for weights in model.diffusion_model.parameters():
        torch.nn.init.normal_(weights, std=0.15)
    for name, values in model.diffusion_model.named_buffers():
        if name == "pos_embed":
            # Comes from a checkpoint as weights do.
            torch.nn.init.normal_(values)
    cpu = torch.device("cpu")
    return ModelPatcher(model.eval(), load_device=cpu, offload_device=cpu)


def _linear(inside, outside):
    return {"target": "torch.nn.Linear", "params": {"in_features": inside, "out_features": outside}}


def sampled(patcher, shape, text):
    """What ComfyUI's sampler makes of a model, with guidance."""
    import comfy.sample
    import torch

    noise = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    given = ("euler", "simple", *conditioned(text), torch.zeros(shape))
    return comfy.sample.sample(patcher, noise, STEPS, 2.0, *given, seed=3, disable_pbar=True)


def conditioned(text):
    """A prompt and a negative one of random text [tokens, channels, those that count], as nodes hand them on."""
    import torch

    make = torch.Generator().manual_seed(2)
    tokens, channels, *some = text
    pooled = {"pooled_output": torch.randn(1, 8, generator=make), "guidance": 3.5}
    if some:
        pooled["attention_mask"] = (torch.arange(tokens) < some[0]).long()[None]
    return tuple([[torch.randn(1, tokens, channels, generator=make), dict(pooled)]] for _ in range(2))


def masked(patcher, pattern, layouts):
    """A clone whose attention along the grids is dense with the pattern's mask."""
    import visattn

    masks = {layout.length: visattn.dense_mask(visattn.parse(pattern), layout) for layout in layouts}

    def attend(func, q, k, v, heads, *args, **kwargs):
        at = 2 if kwargs.get("skip_reshape") else 1
        found = masks.get(q.shape[at]) if q.shape[at] == k.shape[at] else None
        if found is not None:
            kwargs = {**kwargs, "mask": found}
            args = ()
        return func(q, k, v, heads, *args, **kwargs)

    made = patcher.clone()
    made.model_options.setdefault("transformer_options", {})["optimized_attention_override"] = attend
    return made


def compared(kind):
    """What the four samplings of a kind of model say."""
    import torch

    from visattn.clients.comfy.patch import patch, run_of

    shape, pattern, text = KINDS[kind]
    patcher = built(kind)
    stock = sampled(patcher, shape, text)
    sparse = patch(patcher, pattern, backend="tiles", strict=True)
    found = sampled(sparse, shape, text)
    report = run_of(sparse).report()
    layouts = {call.problem.layout for site in report.sites for call in site.calls}
    wanted = sampled(masked(patcher, pattern, layouts), shape, text)
    again = sampled(patcher, shape, text)
    return {
        "kind": kind,
        "layouts": sorted(map(str, layouts)),
        "hits": report.hits,
        "off": float((found - wanted).abs().max() / wanted.abs().max()),
        "change": float((wanted - stock).abs().max() / wanted.abs().max()),
        "undone": torch.equal(again, stock),
    }


def main():
    """Every kind that is named after the checkout, or all."""
    names = sys.argv[2:] or list(KINDS)
    sys.argv[1:] = ["--cpu", "--use-pytorch-cross-attention"]
    sys.path.insert(0, FOLDER)
    import comfy.options

    comfy.options.enable_args_parsing()
    import comfy.samplers

    for name in names:
        print(json.dumps(compared(name)), flush=True)


if __name__ == "__main__":
    main()
