"""Tiny random ControlNets and their inputs."""

import diffusers
import torch

from tests.support.tiny import noise, seeded
from tests.support.tiny_flux import flux
from tests.support.tiny_images import hunyuan_dit, qwen, sd3, sd15, sdxl, z_image
from tests.support.tiny_videos import cosmos


def controlnet():
    unet, inputs = sd15()
    model = seeded(
        lambda: diffusers.ControlNetModel.from_unet(
            unet, conditioning_channels=3, conditioning_embedding_out_channels=(16, 32)
        )
    )
    return model, inputs | {"controlnet_cond": noise(2, 3, 24, 20, seed=5)}


def controlnet_union():
    _, inputs = sdxl()
    model = seeded(
        lambda: diffusers.ControlNetUnionModel(
            block_out_channels=(64, 64),
            layers_per_block=1,
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            attention_head_dim=(2, 4),
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=8,
            transformer_layers_per_block=(1, 2),
            projection_class_embeddings_input_dim=80,
            cross_attention_dim=64,
            norm_num_groups=2,
            conditioning_embedding_out_channels=(16, 32),
            num_trans_channel=64,
            num_trans_head=2,
            num_proj_channel=64,
        )
    )
    inputs |= {
        "controlnet_cond": [noise(1, 3, 32, 28, seed=5)],
        "control_type": torch.tensor([[1, 0, 0, 0, 0, 0]]),
        "control_type_idx": [0],
    }
    return model, inputs


def controlnet_xs():
    base, inputs = sd15()
    options = {name: value for name, value in base.config.items() if not name.startswith("_")}
    unet = diffusers.UNet2DConditionModel(**{**options, "layers_per_block": 2})
    model = seeded(
        lambda: diffusers.UNetControlNetXSModel.from_unet(
            unet,
            size_ratio=1.0,
            ctrl_optional_kwargs={"conditioning_embedding_out_channels": (16, 32)},
        )
    )
    return model, inputs | {"controlnet_cond": noise(2, 3, 24, 20, seed=5)}


def flux_control(modes=None):
    base, inputs = flux()
    options = {
        name: value for name, value in base.config.items() if not name.startswith("_") and name != "out_channels"
    }
    model = seeded(diffusers.FluxControlNetModel, **options, num_mode=modes)
    inputs |= {"controlnet_cond": noise(2, 48, 4, seed=5)}
    return model, inputs | ({} if modes is None else {"controlnet_mode": torch.tensor([[1], [1]])})


def flux_control_union():
    return flux_control(modes=3)


def sd3_control():
    base, inputs = sd3()
    model = seeded(lambda: diffusers.SD3ControlNetModel.from_transformer(base, 2, load_weights_from_transformer=False))
    return model, inputs | {"controlnet_cond": noise(2, 5, 12, 16, seed=5)}


def qwen_control():
    base, inputs = qwen()
    model = seeded(
        lambda: diffusers.QwenImageControlNetModel.from_transformer(base, 1, 16, 4, load_weights_from_transformer=False)
    )
    return model, inputs | {"controlnet_cond": noise(2, 48, 16, seed=5)}


def z_image_control(transformer=None):
    base, inputs = z_image()
    control = seeded(
        diffusers.ZImageControlNetModel,
        control_layers_places=[0],
        control_refiner_layers_places=[0],
        control_in_dim=4,
        add_control_noise_refiner="control_noise_refiner",
        dim=32,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
    )
    model = diffusers.ZImageControlNetModel.from_transformer(control, base if transformer is None else transformer)
    return model, inputs | {"control_context": [noise(4, 1, 12, 16, seed=5)]}


def cosmos_control():
    _, inputs = cosmos()
    model = seeded(
        diffusers.CosmosControlNetModel,
        n_controlnet_blocks=2,
        in_channels=6,
        latent_channels=6,
        model_channels=32,
        num_attention_heads=2,
        attention_head_dim=16,
        mlp_ratio=2,
        text_embed_dim=16,
        adaln_lora_dim=4,
        patch_size=(1, 2, 2),
        max_size=(4, 32, 32),
    )
    latents = inputs.pop("hidden_states")
    return model, inputs | {
        "latents": latents,
        "controls_latents": noise(*latents.shape, seed=5),
        "condition_mask": torch.zeros(1, 1, *latents.shape[2:]),
    }


def hunyuan_dit_control():
    base, inputs = hunyuan_dit()
    names = ("num_attention_heads", "attention_head_dim", "in_channels", "patch_size", "sample_size", "hidden_size")
    names += ("mlp_ratio", "cross_attention_dim", "cross_attention_dim_t5", "pooled_projection_dim", "text_len")
    names += ("text_len_t5", "use_style_cond_and_image_meta_size")
    options = {name: base.config[name] for name in names}
    model = seeded(diffusers.HunyuanDiT2DControlNetModel, **options, transformer_num_layers=4)
    return model, inputs | {"controlnet_cond": noise(2, 4, 12, 16, seed=5)}


def sparse_control():
    model = seeded(
        diffusers.SparseControlNetModel,
        block_out_channels=(4, 8),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlockMotion", "DownBlockMotion"),
        cross_attention_dim=8,
        attention_head_dim=2,
        norm_num_groups=2,
        motion_num_attention_heads=2,
        conditioning_embedding_out_channels=(4, 8),
        concat_conditioning_mask=False,
    )
    inputs = {
        "sample": noise(1, 4, 5, 12, 10),
        "timestep": torch.tensor(5),
        "encoder_hidden_states": noise(5, 7, 8, seed=2),
        "controlnet_cond": noise(1, 4, 5, 12, 10, seed=3),
    }
    return model, inputs


# Builder, number of calls of visual self-attention in a forward, and a sparse pattern.
CONTROLNETS = {
    "controlnet": (controlnet, 2, "na(window=3x3)"),
    "controlnet_union": (controlnet_union, 3, "na(window=3x3)"),
    "controlnet_xs": (controlnet_xs, 9, "na(window=3x3)"),
    "flux_control": (flux_control, 3, "na(window=3x3)"),
    "flux_control_union": (flux_control_union, 3, "na(window=3x3)"),
    "sd3_control": (sd3_control, 4, "na(window=3x3)"),
    "qwen_control": (qwen_control, 1, "na(window=3x3)"),
    "z_image_control": (z_image_control, 3, "na(window=3x3)"),
    "cosmos_control": (cosmos_control, 2, "na(window=3x3x3)"),
    "hunyuan_dit_control": (hunyuan_dit_control, 1, "na(window=3x3)"),
    "sparse_control": (sparse_control, 2, "na(window=3x3)"),
}
