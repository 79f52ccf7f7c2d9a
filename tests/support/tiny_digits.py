"""A DiT so small that tests can train it."""

import torch
from diffusers import DiTTransformer2DModel


def tiny_transformer(seed=0, side=8, layers=2, classes=3):
    torch.manual_seed(seed)
    model = DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=1,
        out_channels=1,
        num_layers=layers,
        sample_size=side,
        patch_size=2,
        num_embeds_ada_norm=classes,
        norm_type="ada_norm_zero",
    )
    with torch.no_grad():
        for value in model.parameters():
            # Output layers that start at zero would hide every difference.
            value.add_(torch.randn(value.shape) * 0.05)
    return model.eval()
