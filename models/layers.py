"""Attention layers for the blocks of timm's CNNs, as their `attn_layer`: strips, maps of groups of channels, Gaussians.

timm.create_model("resnet18", block_args={"attn_layer": visattn.models.layers.ELA})
timm.create_model("resnet18", block_args={"attn_layer": functools.partial(GAAM, heads=8)})
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from visattn.given import real, switch
from visattn.operands import widened
from visattn.patterns.values import whole_number


class ELA(nn.Module):
    """Efficient Local Attention: x times a gate per row and one per column, each from the means over the other axis.

    Source: Xu and Wan, "ELA: Efficient Local Attention for Deep Convolutional Neural Networks" (2024), section 3.2:
    both axes share one convolution and one norm. Its four sizes are `kernel_size=5, norm_groups=32` (T), the defaults
    (B), `kernel_size=5, groups=channels // 8` (S) and `groups=channels // 8` (L). timm's own "ela" is another layer: a
    convolution and a norm for each axis, the norm over all channels, and a SiLU before the gates.

    Args:
        channels: Of the input and output.
        kernel_size: Of the convolution along an axis, odd.
        groups: Of the convolution; None for one per channel.
        norm_groups: Of the norm.
        device: Where parameters are.
        dtype: What they are.

    Raises:
        ValueError: If groups do not divide the channels, or the kernel is even.
    """

    def __init__(
        self,
        channels: int,
        kernel_size: int = 7,
        groups: int | None = None,
        norm_groups: int = 16,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        options = {"device": device, "dtype": dtype}
        channels, kernel_size = whole_number(channels, "channels", 1), whole_number(kernel_size, "kernel_size", 1)
        groups = channels if groups is None else groups
        for name, number in (("groups", groups), ("norm_groups", norm_groups)):
            if channels % whole_number(number, name, 1):
                raise ValueError(f"{name}={number} must divide the {channels} channels of the layer")
        if kernel_size % 2 != 1:
            raise ValueError(f"kernel_size={kernel_size} must be odd")
        self.conv = nn.Conv1d(
            channels, channels, kernel_size, padding=kernel_size // 2, groups=groups, bias=False, **options
        )
        self.gn = nn.GroupNorm(norm_groups, channels, **options)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[B, channels, H, W] alike."""
        rows, columns = (self.gn(self.conv(x.mean(axis))).sigmoid() for axis in (3, 2))
        return x * rows[:, :, :, None] * columns[:, :, None]


class Subspace(nn.Module):
    """One group of channels x: x + x A with a map A over positions; the part of `ULSAM` under its official names."""

    def __init__(self, channels: int, device: Any = None, dtype: Any = None) -> None:
        super().__init__()
        options = {"device": device, "dtype": dtype}
        self.conv_dws = nn.Conv2d(channels, channels, 1, groups=channels, **options)
        self.bn_dws = nn.BatchNorm2d(channels, momentum=0.9, **options)
        self.maxpool = nn.MaxPool2d(3, stride=1, padding=1)
        self.conv_point = nn.Conv2d(channels, 1, 1, **options)
        self.bn_point = nn.BatchNorm2d(1, momentum=0.9, **options)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[B, channels, H, W] alike."""
        y = self.maxpool(self.bn_dws(self.conv_dws(x)).relu())
        y = self.bn_point(self.conv_point(y)).relu()
        return x + x * y.flatten(2).softmax(2).view_as(y)


class ULSAM(nn.Module):
    """A spatial attention map for each group of channels, added to its input.

    Source: Saini et al., "ULSAM: Ultra-Lightweight Subspace Attention Module for Compact Convolutional Neural Networks"
    (WACV 2020), section 3, under the names of its released code.

    Args:
        channels: Of the input and output.
        groups: Into so many the channels are cut; the paper finds 4 good.
        device: Where parameters are.
        dtype: What they are.

    Raises:
        ValueError: If the groups do not divide the channels.
    """

    def __init__(self, channels: int, groups: int = 4, device: Any = None, dtype: Any = None) -> None:
        super().__init__()
        if whole_number(channels, "channels", 1) % whole_number(groups, "groups", 1):
            raise ValueError(f"groups={groups} must divide the {channels} channels of the layer")
        self.subspaces = nn.ModuleList(Subspace(channels // groups, device, dtype) for _ in range(groups))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[B, channels, H, W] alike."""
        parts = x.chunk(len(self.subspaces), 1)
        return torch.cat([space(part) for space, part in zip(self.subspaces, parts, strict=True)], 1)


class Gaussians(nn.Module):
    """x times a product of Gaussians of what it is beside its mean along an axis; a head of `GAAM`."""

    def __init__(self, gaussians: int, axis: int, eps: float, device: Any = None, dtype: Any = None) -> None:
        super().__init__()
        self.axis, self.eps = axis, eps
        self.mean_offsets = nn.Parameter(torch.zeros(gaussians, device=device, dtype=dtype))
        self.c = nn.Parameter(torch.randn(gaussians, device=device, dtype=dtype).exp())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """As x."""
        wide = widened(x)
        mean, deviation = wide.mean(self.axis, keepdim=True), (wide.var(self.axis, keepdim=True) + self.eps).sqrt()
        weights = torch.ones_like(wide)
        for offset, c in zip(self.mean_offsets.to(wide.dtype), self.c.to(wide.dtype), strict=True):
            square = ((wide - mean - offset) / deviation) ** 2
            weights = weights * (-square / (2 * c**2)).exp() / (2 * math.pi * c**2).sqrt()
        weights = weights / weights.sum(self.axis, keepdim=True).clamp(min=self.eps)
        return (wide * weights).to(x.dtype)


class GAAM(nn.Module):
    """Multi-head Gaussian adaptive attention along an axis: by default the channels, cut in heads.

    Source: Ioannides et al., "Gaussian Adaptive Attention Is All You Need: Robust Contextual Representations Across
    Multiple Modalities" (2024), section 3, under the names of its released code. Weights along the axis sum to 1, so
    outputs are smaller than inputs by about the number of channels of a head; with `residual` the input is added, as in
    the paper's blocks. Computed in float32 at least.

    Args:
        channels: Of the input and output.
        heads: Into so many the axis is cut; the last head has what is left over.
        gaussians: Multiplied in each head.
        axis: The axis, 1 for channels of [B, C, H, W].
        residual: Whether the input is added.
        eps: Added to variances, and the least of the sums of weights.
        device: Where parameters are.
        dtype: What they are.

    Raises:
        ValueError: If there are no heads or Gaussians, or too few channels for the heads to have a variance.
    """

    def __init__(
        self,
        channels: int,
        heads: int = 4,
        gaussians: int = 5,
        axis: int = 1,
        residual: bool = True,
        eps: float = 1e-8,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        for name, value in (("channels", channels), ("heads", heads), ("gaussians", gaussians)):
            whole_number(value, name, 1)
        axis = whole_number(axis, "axis", -16, high=16)
        switch(residual, "residual")
        real(eps, "eps", "a number from 0 up, like 1e-8", lambda x: 0 <= x < math.inf)
        if axis == 1 and channels < 2 * heads:
            raise ValueError(f"heads={heads} of {channels} channels: each needs two or more, give fewer")
        self.axis, self.residual = axis, residual
        self.attention_heads = nn.ModuleList(Gaussians(gaussians, axis, eps, device, dtype) for _ in range(heads))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """As x, of at least two values of the axis for each head."""
        length, heads = x.shape[self.axis], len(self.attention_heads)
        sizes = [length // heads] * (heads - 1)
        if length < 2 * heads:
            raise ValueError(f"axis {self.axis} of {list(x.shape)} is too short for {heads} heads of two values each")
        parts = x.split([*sizes, length - sum(sizes)], self.axis)
        out = torch.cat([head(part) for head, part in zip(self.attention_heads, parts, strict=True)], self.axis)
        return x + out if self.residual else out
