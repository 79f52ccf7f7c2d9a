"""Tiny random models of every diffusers family, with inputs, built from configurations: nothing is downloaded."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import diffusers
import torch


def seeded(make, *args, **kwargs):
    """Build a model with reproducible random weights, none of them zero."""
    generator = torch.Generator().manual_seed(0)
    model = make(*args, **kwargs).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            # Output layers that start at zero would hide every difference.
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)
    return model


def noise(*shape, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


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


def flux_ids(height, width, image=0):
    ids = torch.zeros(height, width, 3)
    ids[..., 0] = image
    ids[..., 1] += torch.arange(height)[:, None]
    ids[..., 2] += torch.arange(width)
    return ids.reshape(-1, 3)


def flux(height=6, width=8, text=5, batch=2, head_dim=16, reference=None, single=2):
    axes = {16: [4, 4, 8], 32: [8, 12, 12]}[head_dim]
    model = seeded(
        diffusers.FluxTransformer2DModel,
        patch_size=1,
        in_channels=4,
        num_layers=1,
        num_single_layers=single,
        attention_head_dim=head_dim,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=32,
        axes_dims_rope=axes,
    )
    return model, flux_inputs(height, width, text, batch, reference)


def flux_inputs(height=6, width=8, text=5, batch=2, reference=None):
    ids = flux_ids(height, width)
    if reference is not None:
        ids = torch.cat([ids, flux_ids(*reference, image=1)])
    return {
        "hidden_states": noise(batch, len(ids), 4),
        "encoder_hidden_states": noise(batch, text, 32, seed=2),
        "pooled_projections": noise(batch, 32, seed=3),
        "timestep": torch.tensor([0.5] * batch),
        "img_ids": ids,
        "txt_ids": torch.zeros(text, 3),
    }


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


# Builder, number of attention modules, and a sparse pattern for each family.
FAMILIES = {
    "dit": (dit, 3, "na(window=3x3)"),
    "flux": (flux, 3, "na(window=3x3)"),
    "sd15": (sd15, 4, "na(window=3x3)"),
    "sdxl": (sdxl, 8, "na(window=3x3)"),
    "wan": (wan, 2, "na(window=3x3x3)"),
}


def run(model, inputs, **options):
    """The sample that a model predicts."""
    with torch.no_grad():
        return model(**{**inputs, **options}, return_dict=False)[0]


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
