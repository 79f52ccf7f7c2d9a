"""The published denoisers of diffusers with random weights, and the arguments of one of their steps."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

NA_16, NA_32 = "na(window=16x16,stride=8x8)", "na(window=32x32,stride=8x8)"

# As published: stabilityai/stable-diffusion-xl-base-1.0, black-forest-labs/FLUX.1-dev, Wan-AI/Wan2.1-T2V-1.3B.
SDXL = {
    "in_channels": 4,
    "out_channels": 4,
    "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2, 10),
    "attention_head_dim": (5, 10, 20),
    "cross_attention_dim": 2048,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
FLUX = {
    "in_channels": 64,
    "num_layers": 19,
    "num_single_layers": 38,
    "attention_head_dim": 128,
    "num_attention_heads": 24,
    "joint_attention_dim": 4096,
    "pooled_projection_dim": 768,
    "guidance_embeds": True,
    "axes_dims_rope": (16, 56, 56),
}
WAN = {
    "num_attention_heads": 12,
    "attention_head_dim": 128,
    "in_channels": 16,
    "out_channels": 16,
    "text_dim": 4096,
    "freq_dim": 256,
    "ffn_dim": 8960,
    "num_layers": 30,
    "cross_attn_norm": True,
    "eps": 1e-6,
}
# The same with few and narrow layers.
TINY_SDXL = {"block_out_channels": (32, 64, 64), "transformer_layers_per_block": 1, "attention_head_dim": (2, 4, 4)}
TINY_SDXL |= {"cross_attention_dim": 32, "addition_time_embed_dim": 8, "projection_class_embeddings_input_dim": 80}
TINY_SDXL |= {"layers_per_block": 1}
TINY_FLUX = {"num_layers": 1, "num_single_layers": 2, "num_attention_heads": 2, "attention_head_dim": 16}
TINY_FLUX |= {"joint_attention_dim": 32, "pooled_projection_dim": 32, "axes_dims_rope": (4, 6, 6), "in_channels": 8}
TINY_WAN = {"num_attention_heads": 2, "attention_head_dim": 24, "text_dim": 32, "ffn_dim": 64, "num_layers": 2}


@dataclass(frozen=True)
class Model:
    """A denoiser at one size.

    Attributes:
        kind: Its class in diffusers.
        config: Its published configuration.
        tiny: What a small one has instead.
        grid: Of its latents: rows and columns, for videos frames before them.
        tiny_grid: Of a small one's.
        inputs: Makes the arguments of a step from the configuration and the grid of the latents.
        patterns: What is measured besides dense attention.
    """

    kind: str
    config: dict[str, Any]
    tiny: dict[str, Any]
    grid: tuple[int, ...]
    tiny_grid: tuple[int, ...]
    inputs: Callable[[Any, tuple[int, ...]], dict[str, Any]]
    patterns: tuple[str, ...]


def sdxl_inputs(config: Any, grid: tuple[int, ...]) -> dict[str, Any]:
    """Guided: two samples, 77 text tokens."""
    pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
    size = 8.0 * grid[0]
    return {
        "sample": torch.randn(2, config.in_channels, *grid),
        "timestep": torch.tensor(500.0),
        "encoder_hidden_states": torch.randn(2, 77, config.cross_attention_dim),
        "added_cond_kwargs": {
            "text_embeds": torch.randn(2, pooled),
            "time_ids": torch.tensor([[size, size, 0.0, 0.0, size, size]] * 2),
        },
    }


def flux_inputs(config: Any, grid: tuple[int, ...]) -> dict[str, Any]:
    """One sample, 512 text tokens."""
    rows, columns = (at.flatten() for at in torch.meshgrid(*map(torch.arange, grid), indexing="ij"))
    return {
        "hidden_states": torch.randn(1, len(rows), config.in_channels),
        "encoder_hidden_states": torch.randn(1, 512, config.joint_attention_dim),
        "pooled_projections": torch.randn(1, config.pooled_projection_dim),
        "timestep": torch.tensor([0.5]),
        "img_ids": torch.stack([rows * 0, rows, columns], 1).float(),
        "txt_ids": torch.zeros(512, 3),
        "guidance": torch.tensor([3.5]),
    }


def wan_inputs(config: Any, grid: tuple[int, ...]) -> dict[str, Any]:
    """One sample, 512 text tokens."""
    return {
        "hidden_states": torch.randn(1, config.in_channels, *grid),
        "timestep": torch.tensor([500]),
        "encoder_hidden_states": torch.randn(1, 512, config.text_dim),
    }


def _sdxl(side: int, tiny: int) -> Model:
    return Model("UNet2DConditionModel", SDXL, TINY_SDXL, (side, side), (tiny, tiny), sdxl_inputs, (NA_16,))


def _flux(side: int, tiny: int) -> Model:
    patterns = (NA_32, NA_16, "clear(radius=16)")
    return Model("FluxTransformer2DModel", FLUX, TINY_FLUX, (side, side), (tiny, tiny), flux_inputs, patterns)


MODELS = {
    "SDXL 1024": _sdxl(128, 16),
    "SDXL 2048": _sdxl(256, 32),
    "FLUX 64x64": _flux(64, 8),
    "FLUX 128x128": _flux(128, 16),
    "Wan 480p": Model(
        "WanTransformer3DModel",
        WAN,
        TINY_WAN,
        (21, 60, 104),
        (3, 8, 8),
        wan_inputs,
        ("radial(decay=0.2)", "na(window=13x15x15)"),
    ),
}


def build(model: Model, device: str, dtype: torch.dtype, tiny: bool) -> tuple[Any, dict[str, Any]]:
    """A model with random weights on a device, as `from_pretrained` would cast it, and the arguments of a step."""
    import diffusers

    kind = getattr(diffusers, model.kind)
    torch.manual_seed(0)
    with torch.device(device):
        made = kind(**(model.config | (model.tiny if tiny else {}))).eval().requires_grad_(False)
        inputs = model.inputs(made.config, model.tiny_grid if tiny else model.grid)
    exact = set(kind._keep_in_fp32_modules or ())
    for name, parameter in made.named_parameters():
        if not exact.intersection(name.split(".")):
            parameter.data = parameter.data.to(dtype)
    return made, {name: _cast(value, dtype, name) for name, value in inputs.items()}


def _cast(value: Any, dtype: torch.dtype, name: str) -> Any:
    """In the model's dtype, but for positions and timesteps."""
    if isinstance(value, dict):
        return {key: _cast(each, dtype, key) for key, each in value.items()}
    return value if name in ("timestep", "img_ids", "txt_ids", "time_ids") else value.to(dtype)
