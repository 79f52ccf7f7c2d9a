"""FIT as the denoiser of a diffusion model: its latents also read the time and what is asked for.

Paper: Chen and Li, "FIT: Far-reaching Interleaved Transformers" (2023), https://arxiv.org/abs/2305.12689, section 3.
The released code is TensorFlow's; with its weights under the names here outputs are equal (`tests/models/test_fit.py`).
"""

from __future__ import annotations

from typing import Any

import torch
from timm.layers import Mlp, PatchEmbed, trunc_normal_
from torch import nn

from visattn.models.backbones.fit import Cross, Local, Stage, latent_places, layer_counts
from visattn.models.backbones.functional import from_groups, to_groups
from visattn.models.backbones.pyramid import drop_paths, init_weights

__all__ = ["FITDenoiser"]


class TimeEmbedding(nn.Module):
    """Times from 0 to 1 to `4 * dim` channels: sines and cosines of them, normed, through two layers."""

    def __init__(self, dim: int, **dd: Any) -> None:
        super().__init__()
        self.dim = dim
        self.dense0 = nn.Linear(dim, 4 * dim, **dd)
        self.dense1 = nn.Linear(4 * dim, 4 * dim, **dd)

    def forward(self, time: torch.Tensor) -> torch.Tensor:
        """[B] -> [B, 4 * dim]."""
        number = torch.arange(0, self.dim, 2, device=time.device, dtype=time.dtype)
        angles = 1000 * time[:, None] / 10000 ** (number / self.dim)
        x = torch.cat([angles.sin(), angles.cos()], 1)
        x = (x - x.mean(1, keepdim=True)) / x.std(1, correction=0, keepdim=True)
        return self.dense1(nn.functional.silu(self.dense0(x)))


class ConditionedStage(Stage):
    """A stage of FIT whose latents read the conditions before its global layers."""

    def __init__(self, local: int, dims: tuple[int, int], heads: tuple[int, int], *more: Any, **dd: Any) -> None:
        super().__init__(local, dims, heads, *more, **dd)
        self.l2c_cross_attn = Cross(dims[1], dims[1], heads[1], **dd)

    def forward(
        self, x: torch.Tensor, latents: torch.Tensor, groups: int, conditions: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """As `Stage`, with conditions [B, N, latent_dim]."""
        x = self.x_network(x)
        latents = self.l2x_cross_attn(latents, x)
        shape = latents.shape
        latents = latents.reshape(shape[0] // groups, groups * shape[1], shape[2])
        latents = self.l_network(self.l2c_cross_attn(latents, conditions)).reshape(shape)
        return self.x2l_cross_attn(x, latents), latents


class FITDenoiser(nn.Module):
    """Predicts a picture from a noisy one, its time and conditions: one of classes, or several tokens of text.

    Pictures of whole groups (`patch_size` times `group` pixels) of any size work: the latents' positions are resampled.

    Args:
        img_size: Side of the pictures that positions are made for.
        patch_size: Side of a patch.
        in_chans: Channels of the noisy picture.
        out_chans: Channels of the prediction, None for as many.
        cond_dim: Channels of a condition.
        layers: Local layers in parentheses, then global ones, again and again: "(2)4(2)4(2)".
        embed_dim: Channels of tokens.
        latent_dim: Channels of latents, a multiple of 8.
        num_heads: Heads of tokens, and of latents.
        group: Patches per axis of a group.
        latents: Of each group.
        mlp_ratio: Hidden channels of the MLPs over channels.
        self_cond: Whether latents start from those of an earlier prediction.
        drop_path_rate: Chance to skip the last layer in training; earlier layers have less.
        drop_rate: Dropout of the MLPs.
        device: Where the weights are made.
        dtype: Of the weights.

    Raises:
        ValueError: If the layers are written otherwise or end with global ones, or sizes do not fit.
    """

    def __init__(
        self,
        img_size: int = 64,
        patch_size: int = 4,
        in_chans: int = 3,
        out_chans: int | None = None,
        cond_dim: int = 768,
        layers: str = "(2)4(2)4(2)",
        embed_dim: int = 384,
        latent_dim: int = 768,
        num_heads: tuple[int, int] = (6, 12),
        group: int = 4,
        latents: int = 16,
        mlp_ratio: float = 4.0,
        self_cond: bool = False,
        drop_path_rate: float = 0.0,
        drop_rate: float = 0.0,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        counts = layer_counts(layers)
        if img_size % (patch_size * group):
            raise ValueError(f"img_size {img_size} must be a multiple of a group's {patch_size * group} pixels")
        if latent_dim % 8:
            raise ValueError(f"latent_dim {latent_dim} must be a multiple of 8: a quarter of it are sines and cosines")
        self.group, self.latents, self.patch_size = group, latents, patch_size
        self.side = img_size // (patch_size * group)
        self.stem = PatchEmbed(
            img_size, patch_size, in_chans, embed_dim, strict_img_size=False, output_fmt="NHWC", **dd
        )
        self.stem_ln = nn.LayerNorm(embed_dim, eps=1e-6, **dd)
        self.time_emb = TimeEmbedding(latent_dim // 4, **dd)
        self.cond_proj = nn.Linear(cond_dim, latent_dim, **dd)
        self.x_pos_emb = nn.Parameter(torch.empty(group * group, embed_dim, **dd))
        self.latent_pos_emb = nn.Parameter(torch.empty(self.side * self.side, latents, latent_dim, **dd))
        rates = drop_paths(drop_path_rate, tuple(map(sum, counts)))
        shared = (embed_dim, latent_dim), num_heads, mlp_ratio
        self.stages = nn.ModuleList(
            ConditionedStage(local, *shared, own, drop_rate, **dd)
            for (local, _), own in zip(counts[:-1], rates[:-1], strict=True)
        )
        self.last = Local(embed_dim, num_heads[0], mlp_ratio, rates[-1], drop_rate, **dd)
        self.x_output_ln = nn.LayerNorm(embed_dim, eps=1e-6, **dd)
        self.out_chans = in_chans if out_chans is None else out_chans
        self.x_output_linear = nn.Linear(embed_dim, self.out_chans * patch_size**2, **dd)
        if self_cond:
            self.latent_prev_norm = nn.LayerNorm(latent_dim, eps=1e-6, **dd)
            self.latent_prev_mlp = Mlp(latent_dim, int(latent_dim * mlp_ratio), drop=drop_rate, **dd)
            self.latent_prev_ln = nn.LayerNorm(latent_dim, eps=1e-6, **dd)
        self.self_cond = self_cond
        for table in (self.x_pos_emb, self.latent_pos_emb):
            trunc_normal_(table, std=0.02)
        self.apply(init_weights)
        if self_cond:
            nn.init.zeros_(self.latent_prev_ln.weight)

    def forward(
        self,
        x: torch.Tensor,
        time: torch.Tensor,
        cond: torch.Tensor,
        latents_prev: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The prediction and the latents.

        Args:
            x: Noisy pictures [B, in_chans, H, W].
            time: Times [B] from 0 to 1.
            cond: One condition [B, cond_dim], or several [B, N, cond_dim].
            latents_prev: With `self_cond`, latents of an earlier prediction; None for none.

        Returns:
            Pictures [B, out_chans, H, W] and latents [B, groups, latents, latent_dim].

        Raises:
            ValueError: If the picture has no whole groups, or there are earlier latents without `self_cond`.
        """
        x = self.stem_ln(self.stem(x))
        batch, height, width = x.shape[0], x.shape[1], x.shape[2]
        rows, columns = height // self.group, width // self.group
        x = to_groups(x, self.group) + self.x_pos_emb
        latents = latent_places(self.latent_pos_emb, self.side, rows, columns)[None].expand(batch, -1, -1, -1)
        if self.self_cond:
            before = latents.new_zeros(latents.shape) if latents_prev is None else latents_prev
            latents = latents + self.latent_prev_ln(before + self.latent_prev_mlp(self.latent_prev_norm(before)))
        elif latents_prev is not None:
            raise ValueError("latents_prev is for a model with self_cond=True: leave it out")
        conditions = self.cond_proj(cond if cond.ndim == 3 else cond[:, None])
        conditions = torch.cat([self.time_emb(time)[:, None], conditions], 1)
        latents = latents.flatten(0, 1)
        for stage in self.stages:
            x, latents = stage(x, latents, rows * columns, conditions)
        x, _ = self.last(x, latents, rows * columns)
        x = self.x_output_linear(self.x_output_ln(from_groups(x, self.group, height, width)))
        x = x.reshape(batch, height, width, self.out_chans, self.patch_size, self.patch_size)
        pictures = x.permute(0, 3, 1, 4, 2, 5).flatten(4, 5).flatten(2, 3)
        return pictures, latents.unflatten(0, (batch, -1))
