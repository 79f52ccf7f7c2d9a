"""Tiny random FLUX and the models that follow it: position ids tell where the image is."""

import diffusers
import torch

from tests.support.tiny import noise, seeded


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


def flux2(height=6, width=8, text=5, reference=None):
    model = seeded(
        diffusers.Flux2Transformer2DModel,
        patch_size=1,
        in_channels=4,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        timestep_guidance_channels=32,
        axes_dims_rope=(4, 4, 4, 4),
    )
    ids = flux_ids(height, width)
    if reference is not None:
        ids = torch.cat([ids, flux_ids(*reference, image=10)])
    ids = torch.nn.functional.pad(ids, (0, 1))[None]
    inputs = {
        "hidden_states": noise(1, ids.shape[1], 4),
        "encoder_hidden_states": noise(1, text, 32, seed=2),
        "timestep": torch.tensor([0.5]),
        "guidance": torch.tensor([1.0]),
        "img_ids": ids,
        "txt_ids": torch.zeros(1, text, 4),
    }
    return model, inputs


def chroma(height=6, width=8, text=5):
    model = seeded(
        diffusers.ChromaTransformer2DModel,
        patch_size=1,
        in_channels=4,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        axes_dims_rope=(4, 4, 8),
        approximator_num_channels=8,
        approximator_hidden_dim=16,
        approximator_layers=1,
    )
    inputs = flux_inputs(height, width, text, batch=1)
    del inputs["pooled_projections"]
    return model, inputs


def bria(height=6, width=8, text=5):
    model = seeded(
        diffusers.BriaTransformer2DModel,
        patch_size=1,
        in_channels=4,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=None,
        axes_dims_rope=[4, 4, 8],
    )
    inputs = flux_inputs(height, width, text, batch=1)
    del inputs["pooled_projections"]
    return model, inputs


def longcat():
    model = seeded(
        diffusers.LongCatImageTransformer2DModel,
        in_channels=4,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        axes_dims_rope=[4, 4, 8],
    )
    inputs = flux_inputs(batch=1, reference=(2, 3))
    # The text has positions of its own, and the image begins behind it.
    inputs["img_ids"] = inputs["img_ids"] + torch.tensor([1, 5, 5])
    del inputs["pooled_projections"]
    return model, inputs


def ovis():
    model = seeded(
        diffusers.OvisImageTransformer2DModel,
        in_channels=4,
        out_channels=4,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        axes_dims_rope=(4, 4, 8),
    )
    inputs = flux_inputs(batch=1)
    del inputs["pooled_projections"]
    return model, inputs


def bria_fibo():
    model = seeded(
        diffusers.BriaFiboTransformer2DModel,
        in_channels=4,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        axes_dims_rope=[4, 4, 8],
        text_encoder_dim=16,
    )
    inputs = flux_inputs(batch=1, reference=(2, 3))
    del inputs["pooled_projections"]
    inputs["text_encoder_layers"] = [noise(1, 5, 16, seed=4), noise(1, 5, 16, seed=5)]
    return model, inputs
