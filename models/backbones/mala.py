"""Attention and blocks of MAViT: magnitude-aware linear attention or softmax attention, both rotary and gated.

Paper: "Rectifying Magnitude Neglect in Linear Attention" (ICCV 2025), https://arxiv.org/abs/2507.00698. Written from
its equations.
"""

from collections.abc import Callable
from typing import Any

import torch
from timm.layers import DropPath
from timm.models import checkpoint
from torch import nn
from torch.nn import functional as F

from visattn.models.backbones.functional import magnitude_aware, rotary_table, rotate
from visattn.models.backbones.pyramid import channels_of_head
from visattn.models.backbones.stages import Blocks


class RoPE(nn.Module):
    """Rotary position embedding of a map: rows turn the first half of a head's channels, columns the second."""

    angle: torch.Tensor

    def __init__(self, dim: int, num_heads: int, device: Any = None) -> None:
        super().__init__()
        # The official files have each frequency twice, once for either channel of a pair.
        channels = channels_of_head(dim, num_heads)
        if channels % 4:
            raise ValueError(f"heads of {channels} channels have no rotary positions: make it a multiple of 4")
        frequencies = 10000 ** -torch.linspace(0, 1, channels // 4, device=device)
        self.register_buffer("angle", frequencies.repeat_interleave(2))

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> nn.Module:
        """Move the frequencies but never round them: in bfloat16, row 55 would be up to a tenth of a radian off."""
        exact = self.angle
        super()._apply(fn, recurse)
        if not exact.is_meta:
            self.angle = exact.to(self.angle.device)
        return self

    def forward(self, height: int, width: int) -> torch.Tensor:
        """Sines and cosines [2, height * width, 1, channels of a head / 2], one for each pair of channels."""
        return rotary_table(self.angle, height, width)


class LayerNorm2d(nn.Module):
    """Layer norm over the channels of a map [B, dim, H, W], under its official name `norm.norm`."""

    def __init__(self, dim: int, **dd: Any) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim, eps=1e-6, **dd)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Norm of a map."""
        return self.norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class GatedAttention(nn.Module):
    """Attention with rotary positions, plus a depthwise convolution of the values, times a gate without activation.

    Paper, section 3; `linear` is equations 7 to 9, otherwise softmax attention.
    """

    def __init__(self, dim: int, num_heads: int, linear: bool, **dd: Any) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.linear = linear
        self.qkvo = nn.Conv2d(dim, 4 * dim, 1, **dd)
        self.lepe = nn.Conv2d(dim, dim, 5, padding=2, groups=dim, **dd)
        self.proj = nn.Conv2d(dim, dim, 1, **dd)

    def forward(self, x: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
        """Attention of a map [B, dim, H, W] with the positions of `RoPE`."""
        batch, dim, height, width = x.shape
        q, k, v, gate = self.qkvo(x).chunk(4, dim=1)
        local = self.lepe(v)
        q, k, v = self._heads(q), self._heads(k), self._heads(v)
        if self.linear:
            y = magnitude_aware(q, k, v, table)
        else:
            q, k, v = rotate(q, table).transpose(1, 2), rotate(k, table).transpose(1, 2), v.transpose(1, 2)
            y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2)
        y = y.reshape(batch, height * width, dim).transpose(1, 2).reshape(batch, dim, height, width)
        return self.proj((y + local) * gate)

    def _heads(self, x: torch.Tensor) -> torch.Tensor:
        """[B, dim, H, W] to [B, H * W, heads, channels of a head]."""
        batch, dim, height, width = x.shape
        return x.reshape(batch, self.num_heads, dim // self.num_heads, height * width).permute(0, 3, 1, 2)


class FeedForward(nn.Module):
    """An MLP of 1 x 1 convolutions with a depthwise convolution added to its hidden channels."""

    def __init__(self, dim: int, hidden: int, **dd: Any) -> None:
        super().__init__()
        self.fc1 = nn.Conv2d(dim, hidden, 1, **dd)
        self.fc2 = nn.Conv2d(hidden, dim, 1, **dd)
        self.dwconv = nn.Conv2d(hidden, hidden, 3, padding=1, groups=hidden, **dd)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map [B, dim, H, W] to the same shape."""
        x = F.gelu(self.fc1(x))
        return self.fc2(x + self.dwconv(x))


class Block(nn.Module):
    """A depthwise convolution for positions, attention and an MLP, the last two behind a norm and scaled."""

    def __init__(
        self,
        dim: int,
        num_heads: int,
        linear: bool,
        hidden: int,
        drop_path: float,
        layer_scale: float | None,
        **dd: Any,
    ) -> None:
        super().__init__()
        self.norm1 = LayerNorm2d(dim, **dd)
        self.attn = GatedAttention(dim, num_heads, linear, **dd)
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()
        self.norm2 = LayerNorm2d(dim, **dd)
        self.ffn = FeedForward(dim, hidden, **dd)
        self.pos = nn.Conv2d(dim, dim, 3, padding=1, groups=dim, **dd)
        self.gamma_1 = self.gamma_2 = None
        if layer_scale is not None:
            self.gamma_1 = nn.Parameter(torch.full((1, dim, 1, 1), layer_scale, **dd))
            self.gamma_2 = nn.Parameter(torch.full((1, dim, 1, 1), layer_scale, **dd))

    def forward(self, x: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
        """Map [B, dim, H, W] to the same shape."""
        x = x + self.pos(x)
        y = self.attn(self.norm1(x), table)
        if self.gamma_1 is not None:
            y = y * self.gamma_1
        x = x + self.drop_path(y)
        y = self.ffn(self.norm2(x))
        if self.gamma_2 is not None:
            y = y * self.gamma_2
        return x + self.drop_path(y)


class RotaryBlocks(Blocks):
    """The blocks of a stage, with the positions of its map."""

    def forward(self, x: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
        """Run every block."""
        for block in self:
            if self.grad_checkpointing and not torch.jit.is_scripting():
                x = checkpoint(block, x, table)
            else:
                x = block(x, table)
        return x
