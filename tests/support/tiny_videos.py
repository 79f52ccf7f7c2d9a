"""Tiny random video models and their inputs."""

import diffusers
import torch

from tests.support.tiny import noise, seeded


def wan(frames=3, height=12, width=8, batch=1, head_dim=12, layers=2):
    model = seeded(
        diffusers.WanTransformer3DModel,
        patch_size=(1, 2, 2),
        num_attention_heads=2,
        attention_head_dim=head_dim,
        in_channels=4,
        out_channels=4,
        text_dim=16,
        freq_dim=256,
        ffn_dim=32,
        num_layers=layers,
        cross_attn_norm=True,
        qk_norm="rms_norm_across_heads",
        rope_max_seq_len=32,
    )
    return model, wan_inputs(frames, height, width, batch)


def wan_inputs(frames=3, height=12, width=8, batch=1):
    return {
        "hidden_states": noise(batch, 4, frames, height, width),
        "timestep": torch.tensor([5] * batch),
        "encoder_hidden_states": noise(batch, 7, 16, seed=2),
    }


def skyreels():
    model, inputs = wan()
    options = {name: value for name, value in model.config.items() if not name.startswith("_")}
    return seeded(diffusers.SkyReelsV2Transformer3DModel, **options), inputs


def chronoedit():
    model, inputs = wan()
    options = {name: value for name, value in model.config.items() if not name.startswith("_")}
    return seeded(diffusers.ChronoEditTransformer3DModel, **options), inputs


def consisid():
    model, inputs = cogvideox()
    names = ("num_attention_heads", "attention_head_dim", "in_channels", "out_channels", "time_embed_dim")
    names += ("text_embed_dim", "num_layers", "sample_width", "sample_height", "sample_frames", "patch_size")
    options = {name: model.config[name] for name in (*names, "max_text_seq_length")}
    return seeded(diffusers.ConsisIDTransformer3DModel, **options), inputs


def hunyuan_video(valid=(4, 7)):
    model = seeded(
        diffusers.HunyuanVideoTransformer3DModel,
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=10,
        num_layers=1,
        num_single_layers=2,
        num_refiner_layers=1,
        patch_size=1,
        patch_size_t=1,
        guidance_embeds=True,
        text_embed_dim=16,
        pooled_projection_dim=8,
        rope_axes_dim=(2, 4, 4),
        image_condition_type=None,
    )
    batch = len(valid)
    inputs = {
        "hidden_states": noise(batch, 4, 3, 4, 6),
        "timestep": torch.tensor([5] * batch),
        "encoder_hidden_states": noise(batch, 7, 16, seed=2),
        "encoder_attention_mask": torch.tensor([[1] * n + [0] * (7 - n) for n in valid]),
        "pooled_projections": noise(batch, 8, seed=3),
        "guidance": torch.tensor([6.0] * batch),
    }
    return model, inputs


def hunyuan_video15():
    model = seeded(
        diffusers.HunyuanVideo15Transformer3DModel,
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=16,
        num_layers=2,
        num_refiner_layers=1,
        patch_size=1,
        patch_size_t=1,
        text_embed_dim=16,
        text_embed_2_dim=8,
        image_embed_dim=12,
        rope_axes_dim=(4, 6, 6),
        target_size=16,
        task_type="t2v",
    )
    inputs = {
        "hidden_states": noise(1, 4, 3, 4, 6),
        "timestep": torch.tensor([5.0]),
        "encoder_hidden_states": noise(1, 7, 16, seed=2),
        "encoder_attention_mask": torch.tensor([[1] * 4 + [0] * 3]),
        "encoder_hidden_states_2": noise(1, 5, 8, seed=3),
        "encoder_attention_mask_2": torch.tensor([[1] * 2 + [0] * 3]),
        "image_embeds": torch.zeros(1, 3, 12),
    }
    return model, inputs


def cogvideox():
    model = seeded(
        diffusers.CogVideoXTransformer3DModel,
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        out_channels=4,
        time_embed_dim=2,
        text_embed_dim=8,
        num_layers=2,
        sample_width=8,
        sample_height=8,
        sample_frames=9,
        patch_size=2,
        temporal_compression_ratio=4,
        max_text_seq_length=8,
    )
    inputs = {
        "hidden_states": noise(1, 3, 4, 8, 8),
        "encoder_hidden_states": noise(1, 8, 8, seed=2),
        "timestep": torch.tensor([5]),
    }
    return model, inputs


def mochi():
    model = seeded(
        diffusers.MochiTransformer3DModel,
        patch_size=2,
        num_attention_heads=2,
        attention_head_dim=8,
        num_layers=2,
        pooled_projection_dim=16,
        in_channels=4,
        out_channels=4,
        text_embed_dim=16,
        time_embed_dim=4,
        max_sequence_length=16,
    )
    inputs = {
        "hidden_states": noise(2, 4, 3, 8, 8),
        "encoder_hidden_states": noise(2, 7, 16, seed=2),
        "encoder_attention_mask": torch.tensor([[1] * 4 + [0] * 3, [1] * 7]).bool(),
        "timestep": torch.tensor([5, 5]),
    }
    return model, inputs


def ltx():
    model = seeded(
        diffusers.LTXVideoTransformer3DModel,
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=8,
        cross_attention_dim=16,
        num_layers=2,
        qk_norm="rms_norm_across_heads",
        caption_channels=16,
    )
    inputs = {
        "hidden_states": noise(1, 3 * 4 * 6, 4),
        "encoder_hidden_states": noise(1, 7, 16, seed=2),
        "encoder_attention_mask": torch.tensor([[1] * 4 + [0] * 3]),
        "timestep": torch.tensor([5]),
        "num_frames": 3,
        "height": 4,
        "width": 6,
    }
    return model, inputs


def ltx2():
    model = seeded(
        diffusers.LTX2VideoTransformer3DModel,
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=8,
        cross_attention_dim=16,
        audio_in_channels=4,
        audio_out_channels=4,
        audio_num_attention_heads=2,
        audio_attention_head_dim=4,
        audio_cross_attention_dim=8,
        num_layers=2,
        caption_channels=16,
    )
    inputs = {
        "hidden_states": noise(1, 3 * 4 * 6, 4),
        "audio_hidden_states": noise(1, 9, 4, seed=5),
        "encoder_hidden_states": noise(1, 7, 16, seed=2),
        "audio_encoder_hidden_states": noise(1, 7, 16, seed=3),
        "timestep": torch.tensor([[5.0]]),
        "encoder_attention_mask": torch.ones(1, 7),
        "audio_encoder_attention_mask": torch.ones(1, 7),
        "num_frames": 3,
        "height": 4,
        "width": 6,
        "audio_num_frames": 9,
    }
    return model, inputs


def cosmos():
    model = seeded(
        diffusers.CosmosTransformer3DModel,
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=16,
        num_layers=2,
        mlp_ratio=2,
        text_embed_dim=16,
        adaln_lora_dim=4,
        max_size=(4, 32, 32),
        patch_size=(1, 2, 2),
        concat_padding_mask=True,
    )
    inputs = {
        "hidden_states": noise(1, 4, 3, 8, 12),
        "timestep": torch.tensor([0.5]),
        "encoder_hidden_states": noise(1, 7, 16, seed=2),
        "padding_mask": torch.zeros(1, 1, 8, 12),
        "fps": 30,
    }
    return model, inputs


def kandinsky5():
    model = seeded(
        diffusers.Kandinsky5Transformer3DModel,
        in_visual_dim=4,
        in_text_dim=16,
        in_text_dim2=8,
        time_dim=8,
        out_visual_dim=4,
        patch_size=(1, 2, 2),
        model_dim=32,
        ff_dim=32,
        num_text_blocks=1,
        num_visual_blocks=2,
        axes_dims=(4, 6, 6),
    )
    inputs = {
        "hidden_states": noise(1, 3, 8, 12, 4),
        "encoder_hidden_states": noise(1, 7, 16, seed=2),
        "timestep": torch.tensor([5.0]),
        "pooled_projections": noise(1, 8, seed=3),
        "visual_rope_pos": [torch.arange(3), torch.arange(4), torch.arange(6)],
        "text_rope_pos": torch.arange(7),
    }
    return model, inputs


def wan_vace():
    model = seeded(
        diffusers.WanVACETransformer3DModel,
        patch_size=(1, 2, 2),
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=4,
        out_channels=4,
        text_dim=16,
        freq_dim=256,
        ffn_dim=32,
        num_layers=2,
        rope_max_seq_len=32,
        vace_layers=[0],
        vace_in_channels=8,
    )
    inputs = {
        **wan_inputs(),
        "control_hidden_states": noise(1, 8, 3, 12, 8, seed=4),
        "control_hidden_states_scale": torch.ones(1),
    }
    return model, inputs


def wan_animate():
    model = seeded(
        diffusers.WanAnimateTransformer3DModel,
        patch_size=(1, 2, 2),
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=12,
        latent_channels=4,
        out_channels=4,
        text_dim=16,
        freq_dim=256,
        ffn_dim=32,
        num_layers=2,
        image_dim=8,
        rope_max_seq_len=32,
        motion_encoder_channel_sizes={"4": 8, "8": 8, "16": 8},
        motion_encoder_size=16,
        motion_style_dim=8,
        motion_dim=4,
        motion_encoder_dim=8,
        face_encoder_hidden_dim=16,
        face_encoder_num_heads=2,
        inject_face_latents_blocks=2,
    )
    inputs = {
        **wan_inputs(),
        "hidden_states": noise(1, 12, 3, 12, 8),
        "encoder_hidden_states_image": noise(1, 5, 8, seed=3),
        "pose_hidden_states": noise(1, 4, 2, 12, 8, seed=4),
        "face_pixel_values": noise(1, 3, 5, 16, 16, seed=5),
    }
    return model, inputs
