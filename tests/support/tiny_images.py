"""Tiny random image models and their inputs."""

import diffusers
import torch

from tests.support.tiny import noise, seeded


def dit(height=16, width=16, batch=2):
    model = seeded(
        diffusers.DiTTransformer2DModel,
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=1,
        out_channels=1,
        num_layers=3,
        sample_size=16,
        patch_size=2,
        num_embeds_ada_norm=10,
        norm_type="ada_norm_zero",
    )
    inputs = {
        "hidden_states": noise(batch, 1, height, width),
        "timestep": torch.tensor([5] * batch),
        "class_labels": torch.tensor([1] * batch),
    }
    return model, inputs


def sd15(height=12, width=10, batch=2):
    model = seeded(
        diffusers.UNet2DConditionModel,
        block_out_channels=(4, 8),
        layers_per_block=1,
        sample_size=16,
        in_channels=4,
        out_channels=4,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=8,
        norm_num_groups=2,
        attention_head_dim=2,
    )
    inputs = {
        "sample": noise(batch, 4, height, width),
        "timestep": torch.tensor(5),
        "encoder_hidden_states": noise(batch, 7, 8, seed=2),
    }
    return model, inputs


def sdxl(height=16, width=14, batch=1):
    model = seeded(
        diffusers.UNet2DConditionModel,
        block_out_channels=(4, 8),
        layers_per_block=1,
        sample_size=16,
        in_channels=4,
        out_channels=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=(2, 4),
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        transformer_layers_per_block=(1, 2),
        projection_class_embeddings_input_dim=80,
        cross_attention_dim=64,
        norm_num_groups=2,
    )
    inputs = {
        "sample": noise(batch, 4, height, width),
        "timestep": torch.tensor(5),
        "encoder_hidden_states": noise(batch, 7, 64, seed=2),
        "added_cond_kwargs": {"text_embeds": noise(batch, 32, seed=3), "time_ids": noise(batch, 6, seed=4)},
    }
    return model, inputs


def sd3(batch=2, text=5):
    model = seeded(
        diffusers.SD3Transformer2DModel,
        sample_size=32,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=3,
        attention_head_dim=8,
        num_attention_heads=4,
        caption_projection_dim=32,
        joint_attention_dim=32,
        pooled_projection_dim=64,
        pos_embed_max_size=96,
        dual_attention_layers=(0, 1),
        qk_norm="rms_norm",
    )
    inputs = {
        "hidden_states": noise(batch, 4, 12, 16),
        "encoder_hidden_states": noise(batch, text, 32, seed=2),
        "pooled_projections": noise(batch, 64, seed=3),
        "timestep": torch.tensor([5] * batch),
    }
    return model, inputs


def pixart(batch=2):
    model = seeded(
        diffusers.PixArtTransformer2DModel,
        sample_size=8,
        patch_size=2,
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        cross_attention_dim=8,
        caption_channels=None,
        norm_type="ada_norm_single",
        use_additional_conditions=False,
    )
    inputs = {
        "hidden_states": noise(batch, 4, 12, 16),
        "encoder_hidden_states": noise(batch, 7, 8, seed=2),
        "encoder_attention_mask": torch.tensor([[1] * 4 + [0] * 3, [1] * 7])[:batch],
        "timestep": torch.tensor([5] * batch),
        "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
    }
    return model, inputs


def qwen(references=(), padded=False):
    model = seeded(
        diffusers.QwenImageTransformer2DModel,
        patch_size=2,
        in_channels=16,
        out_channels=4,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=4,
        joint_attention_dim=16,
        axes_dims_rope=(8, 4, 4),
    )
    shapes = [(1, 6, 8), *references]
    mask = torch.ones(2, 7, dtype=torch.long)
    if padded:
        mask[0, 4:] = 0
    inputs = {
        "hidden_states": noise(2, sum(f * h * w for f, h, w in shapes), 16),
        "encoder_hidden_states": noise(2, 7, 16, seed=2),
        "encoder_hidden_states_mask": mask if padded else None,
        "timestep": torch.tensor([0.5, 0.5]),
        "img_shapes": [shapes] * 2,
    }
    return model, inputs


def hunyuan_dit():
    model = seeded(
        diffusers.HunyuanDiT2DModel,
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        patch_size=2,
        sample_size=8,
        hidden_size=16,
        num_layers=2,
        mlp_ratio=2.0,
        cross_attention_dim=8,
        cross_attention_dim_t5=8,
        pooled_projection_dim=4,
        text_len=4,
        text_len_t5=4,
        use_style_cond_and_image_meta_size=False,
    )
    inputs = {
        "hidden_states": noise(2, 4, 12, 16),
        "timestep": torch.tensor([5.0, 5.0]),
        "encoder_hidden_states": noise(2, 4, 8, seed=2),
        "text_embedding_mask": torch.ones(2, 4),
        "encoder_hidden_states_t5": noise(2, 4, 8, seed=3),
        "text_embedding_mask_t5": torch.ones(2, 4),
        "image_rotary_emb": diffusers.models.embeddings.get_2d_rotary_pos_embed(8, ((0, 0), (6, 8)), (6, 8)),
    }
    return model, inputs


def z_image():
    model = seeded(
        diffusers.ZImageTransformer2DModel,
        in_channels=4,
        dim=32,
        n_layers=2,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=16,
        axes_dims=[8, 4, 4],
        axes_lens=[256, 32, 32],
    )
    inputs = {"x": [noise(4, 1, 12, 16)], "t": torch.tensor([0.5]), "cap_feats": [noise(7, 16, seed=2)]}
    return model, inputs


def lumina2(lengths=(5, 5)):
    model = seeded(
        diffusers.Lumina2Transformer2DModel,
        sample_size=16,
        patch_size=2,
        in_channels=4,
        hidden_size=24,
        num_layers=2,
        num_refiner_layers=1,
        num_attention_heads=3,
        num_kv_heads=1,
        multiple_of=2,
        scaling_factor=1.0,
        axes_dim_rope=(4, 2, 2),
        axes_lens=(64, 32, 32),
        cap_feat_dim=8,
    )
    inputs = {
        "hidden_states": noise(len(lengths), 4, 12, 16),
        "encoder_hidden_states": noise(len(lengths), 7, 8, seed=2),
        "encoder_attention_mask": torch.tensor([[True] * n + [False] * (7 - n) for n in lengths]),
        "timestep": torch.tensor([0.5] * len(lengths)),
    }
    return model, inputs


def hidream():
    model = seeded(
        diffusers.HiDreamImageTransformer2DModel,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        caption_channels=[8, 4],
        text_emb_dim=8,
        num_routed_experts=2,
        num_activated_experts=2,
        axes_dims_rope=(4, 2, 2),
        max_resolution=(32, 32),
        llama_layers=(0, 1),
        force_inference_output=True,
    )
    inputs = {
        "hidden_states": noise(1, 4, 12, 12),
        "encoder_hidden_states_t5": noise(1, 6, 8, seed=2),
        "encoder_hidden_states_llama3": noise(2, 1, 6, 4, seed=3),
        "pooled_embeds": noise(1, 8, seed=4),
        "timesteps": torch.tensor([5]),
    }
    return model, inputs


def sana():
    return seeded(
        diffusers.SanaTransformer2DModel,
        patch_size=1,
        in_channels=4,
        out_channels=4,
        num_layers=1,
        attention_head_dim=4,
        num_attention_heads=2,
        num_cross_attention_heads=2,
        cross_attention_head_dim=4,
        cross_attention_dim=8,
        caption_channels=8,
        sample_size=32,
    )


def prior_transformer():
    """A model of a class that visattn does not know: 11 tokens with self-attention."""
    model = seeded(
        diffusers.PriorTransformer,
        num_attention_heads=2,
        attention_head_dim=4,
        num_layers=2,
        embedding_dim=8,
        num_embeddings=7,
        additional_embeddings=4,
    )
    inputs = {
        "hidden_states": noise(1, 8),
        "timestep": torch.tensor(5),
        "proj_embedding": noise(1, 8, seed=2),
        "encoder_hidden_states": noise(1, 7, 8, seed=3),
    }
    return model, inputs
