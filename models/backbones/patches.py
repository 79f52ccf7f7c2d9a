"""Patch embeddings without padding, and positions that fit any map: what Agent-PVT and Flowformer share."""

from typing import Any

import torch
from torch import nn

from visattn.models.backbones.functional import pad_grid, resize


class Patches(nn.Module):
    """Tokens of `patch` x `patch` pixels or tokens, without those left over at the bottom and right.

    A map smaller than one patch is padded with zeros to one.
    """

    def __init__(self, channels: int, dim: int, patch: int, norm: bool, **dd: Any) -> None:
        super().__init__()
        self.patch = patch
        self.proj = nn.Conv2d(channels, dim, patch, stride=patch, **dd)
        self.norm = nn.LayerNorm(dim, **dd) if norm else nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map [B, H, W, channels] to [B, H / patch, W / patch, dim]."""
        x = pad_grid(x, self.patch).permute(0, 3, 1, 2)
        return self.norm(self.proj(x).permute(0, 2, 3, 1))


class Place(nn.Module):
    """Adds a position embedding, resampled to the map. It has no weights: their official names are the model's."""

    def forward(self, x: torch.Tensor, position: torch.Tensor, side: int) -> torch.Tensor:
        """Map [B, H, W, dim] plus a position embedding [1, side * side, dim]."""
        _, height, width, dim = x.shape
        position = position.transpose(1, 2).reshape(1, dim, side, side)
        return x + resize(position, height, width).permute(0, 2, 3, 1)
