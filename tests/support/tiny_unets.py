"""Tiny random UNets of videos and their inputs."""

import diffusers
import torch

from tests.support.tiny import noise, seeded

COMMON = {"block_out_channels": (4, 8), "layers_per_block": 1, "cross_attention_dim": 8}


def motion(frames=5):
    model = seeded(
        diffusers.UNetMotionModel,
        **COMMON,
        down_block_types=("CrossAttnDownBlockMotion", "DownBlockMotion"),
        up_block_types=("UpBlockMotion", "CrossAttnUpBlockMotion"),
        norm_num_groups=2,
        num_attention_heads=2,
        motion_num_attention_heads=2,
        use_motion_mid_block=False,
    )
    inputs = {
        "sample": noise(1, 4, frames, 12, 10),
        "timestep": torch.tensor(5),
        "encoder_hidden_states": noise(frames, 7, 8, seed=2),
    }
    return model, inputs


def svd(frames=5):
    model = seeded(
        diffusers.UNetSpatioTemporalConditionModel,
        **{**COMMON, "block_out_channels": (32, 64)},
        in_channels=4,
        down_block_types=("CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"),
        up_block_types=("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"),
        num_attention_heads=(2, 2),
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=24,
    )
    inputs = {
        "sample": noise(1, frames, 4, 12, 10),
        "timestep": torch.tensor(5),
        "encoder_hidden_states": noise(1, 1, 8, seed=2),
        "added_time_ids": torch.tensor([[6.0, 127.0, 0.02]]),
    }
    return model, inputs


def unet3d(frames=5):
    model = seeded(
        diffusers.UNet3DConditionModel,
        **COMMON,
        down_block_types=("CrossAttnDownBlock3D", "DownBlock3D"),
        up_block_types=("UpBlock3D", "CrossAttnUpBlock3D"),
        norm_num_groups=2,
        attention_head_dim=2,
    )
    inputs = {
        "sample": noise(1, 4, frames, 12, 10),
        "timestep": torch.tensor(5),
        "encoder_hidden_states": noise(1, 7, 8, seed=2),
    }
    return model, inputs


def i2vgen(frames=5):
    model = seeded(
        diffusers.I2VGenXLUNet,
        **COMMON,
        down_block_types=("CrossAttnDownBlock3D", "DownBlock3D"),
        up_block_types=("UpBlock3D", "CrossAttnUpBlock3D"),
        norm_num_groups=2,
        attention_head_dim=2,
        num_attention_heads=None,
    )
    inputs = {
        "sample": noise(1, 4, frames, 12, 10),
        "timestep": torch.tensor(5),
        "fps": torch.tensor([8]),
        "image_latents": noise(1, 4, frames, 12, 10, seed=3),
        "image_embeddings": noise(1, 8, seed=4)[:, None],
        "encoder_hidden_states": noise(1, 7, 8, seed=2),
    }
    return model, inputs


def unconditional():
    model = seeded(
        diffusers.UNet2DModel,
        sample_size=(12, 20),
        in_channels=4,
        out_channels=4,
        block_out_channels=(4, 8, 8),
        layers_per_block=1,
        down_block_types=("AttnDownBlock2D", "AttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D", "UpBlock2D"),
        norm_num_groups=2,
        attention_head_dim=4,
    )
    return model, {"sample": noise(2, 4, 12, 20), "timestep": torch.tensor(5)}


def audioldm2():
    from diffusers.pipelines.audioldm2.modeling_audioldm2 import AudioLDM2UNet2DConditionModel

    model = seeded(
        AudioLDM2UNet2DConditionModel,
        block_out_channels=(4, 8),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        norm_num_groups=2,
        attention_head_dim=2,
        # Transformers without a text, with one, and with another.
        cross_attention_dim=((None, 8, 12), (None, 8, 12)),
    )
    inputs = {
        "sample": noise(2, 4, 12, 10),
        "timestep": torch.tensor(5),
        "encoder_hidden_states": noise(2, 5, 8, seed=2),
        "encoder_hidden_states_1": noise(2, 3, 12, seed=3),
    }
    return model, inputs


def kandinsky3():
    import diffusers

    model = seeded(
        diffusers.Kandinsky3UNet,
        in_channels=4,
        time_embedding_dim=16,
        groups=2,
        attention_head_dim=8,
        layers_per_block=2,
        block_out_channels=(16, 16, 16, 16),
        cross_attention_dim=16,
        encoder_hid_dim=8,
    )
    inputs = {
        "sample": noise(2, 4, 24, 16),
        "timestep": torch.tensor(5),
        "encoder_hidden_states": noise(2, 5, 8, seed=2),
        "encoder_attention_mask": torch.tensor([[1, 1, 1, 0, 0], [1] * 5]),
    }
    return model, inputs


OTHER_UNETS = {
    "kandinsky3": (kandinsky3, 6, "na(window=3x3)"),
    "unconditional": (unconditional, 3, "na(window=3x3)"),
    "audioldm2": (audioldm2, 16, "na(window=3x3)"),
}
VIDEO_UNETS = {
    "motion": (motion, 4, "na(window=3x3)"),
    "svd": (svd, 4, "na(window=3x3)"),
    "unet3d": (unet3d, 4, "na(window=3x3)"),
    "i2vgen": (i2vgen, 4, "na(window=3x3)"),
}
