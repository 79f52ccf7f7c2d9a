"""Neighborhood Attention Transformer (NAT) and its dilated form (DiNAT).

Papers: "Neighborhood Attention Transformer" (CVPR 2023), https://arxiv.org/abs/2204.07143;
"Dilated Neighborhood Attention Transformer", https://arxiv.org/abs/2209.15001.
Official code and weights: https://github.com/SHI-Labs/Neighborhood-Attention-Transformer (MIT). They ran on
releases of NATTEN with a relative position bias, which NATTEN has dropped since 0.20.
"""

from typing import TYPE_CHECKING, Any

import torch
from timm.layers import DropPath, Mlp, trunc_normal_
from timm.models import generate_default_cfgs, register_model
from torch import nn

from visattn.models.backbones.factory import build, cfg
from visattn.models.backbones.functional import neighborhood, pad_grid
from visattn.models.backbones.leveled import LeveledPyramid
from visattn.models.backbones.pyramid import channels_of_head, drop_paths
from visattn.models.backbones.stages import Blocks, Level, Levels

__all__ = ["NAT"]


class NeighborhoodAttention(nn.Module):
    """Multi-head neighborhood attention with a relative position bias; maps in and out are [B, H, W, dim].

    A map smaller than window * dilation is padded with zeros at the bottom and right first, and the padding is
    attended, as in the official modules.
    """

    def __init__(self, dim: int, num_heads: int, window: int, dilation: int, **dd: Any) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.window = window
        self.dilation = dilation
        self.head_dim = channels_of_head(dim, num_heads)
        self.scale = self.head_dim**-0.5
        self.rpb = nn.Parameter(torch.empty(num_heads, 2 * window - 1, 2 * window - 1, **dd))
        self.qkv = nn.Linear(dim, 3 * dim, **dd)
        self.proj = nn.Linear(dim, dim, **dd)
        trunc_normal_(self.rpb, std=0.02)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Attention of a map [B, H, W, dim]."""
        _, height, width, dim = x.shape
        x = pad_grid(x, self.window * self.dilation)
        batch, rows, columns, _ = x.shape
        qkv = self.qkv(x).reshape(batch, rows * columns, 3, self.num_heads, self.head_dim)
        q, k, v = qkv.unbind(2)
        x = neighborhood(q, k, v, self.rpb, rows, columns, self.window, self.dilation, self.scale)
        return self.proj(x.reshape(batch, rows, columns, dim)[:, :height, :width])


class Block(nn.Module):
    """Neighborhood attention and an MLP, each behind a norm and scaled per channel if `layer_scale` is given."""

    def __init__(
        self,
        dim: int,
        num_heads: int,
        window: int,
        dilation: int,
        mlp_ratio: float,
        drop_path: float,
        layer_scale: float | None,
        **dd: Any,
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, **dd)
        self.attn = NeighborhoodAttention(dim, num_heads, window, dilation, **dd)
        self.norm2 = nn.LayerNorm(dim, **dd)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), **dd)
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()
        self.gamma1 = self.gamma2 = None
        if layer_scale is not None:
            self.gamma1 = nn.Parameter(torch.full((dim,), layer_scale, **dd))
            self.gamma2 = nn.Parameter(torch.full((dim,), layer_scale, **dd))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map [B, H, W, dim] to the same shape."""
        y = self.attn(self.norm1(x))
        if self.gamma1 is not None:
            y = y * self.gamma1
        x = x + self.drop_path(y)
        y = self.mlp(self.norm2(x))
        if self.gamma2 is not None:
            y = y * self.gamma2
        return x + self.drop_path(y)


class Stem(nn.Module):
    """Two strided convolutions and a norm: image [B, C, H, W] to a map [B, H / 4, W / 4, dim]."""

    def __init__(self, in_chans: int, dim: int, **dd: Any) -> None:
        super().__init__()
        self.proj = nn.Sequential(
            nn.Conv2d(in_chans, dim // 2, 3, stride=2, padding=1, **dd),
            nn.Conv2d(dim // 2, dim, 3, stride=2, padding=1, **dd),
        )
        self.norm = nn.LayerNorm(dim, **dd)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Image to map."""
        return self.norm(self.proj(x).permute(0, 2, 3, 1))


class Downsample(nn.Module):
    """A strided convolution and a norm: half the sides, twice the channels."""

    def __init__(self, dim: int, **dd: Any) -> None:
        super().__init__()
        self.reduction = nn.Conv2d(dim, 2 * dim, 3, stride=2, padding=1, bias=False, **dd)
        self.norm = nn.LayerNorm(2 * dim, **dd)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map [B, H, W, dim] to [B, H / 2, W / 2, 2 dim]."""
        return self.norm(self.reduction(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1))


class NAT(LeveledPyramid):
    """NAT, and DiNAT if dilations are given.

    Args:
        embed_dim: Channels of the first stage; they double at each stage.
        depths: Blocks per stage.
        num_heads: Heads per stage.
        mlp_ratio: Hidden channels of the MLP over channels.
        kernel_size: Window per axis.
        dilations: Dilation of each block of each stage, 1 everywhere if None.
        layer_scale: First value of the per-channel factors on attention and MLP, None for no factors.
        drop_path_rate: Chance to skip the last block in training; earlier blocks have less.
        in_chans: Channels of the image.
        num_classes: Classes of the head, 0 for none.
        global_pool: "avg", "max", "avgmax", "catavgmax", or "" for none.
        drop_rate: Dropout before the head.
        device: Where the weights are made.
        dtype: Of the weights.

    Raises:
        ValueError: If the heads do not divide the channels of a stage, or a block has no dilation.
    """

    stages_name = "levels"
    if TYPE_CHECKING:  # as in `LeveledPyramid`
        levels: Levels

    def __init__(
        self,
        embed_dim: int = 64,
        depths: tuple[int, ...] = (3, 4, 6, 5),
        num_heads: tuple[int, ...] = (2, 4, 8, 16),
        mlp_ratio: float = 3.0,
        kernel_size: int = 7,
        dilations: tuple[tuple[int, ...], ...] | None = None,
        layer_scale: float | None = None,
        drop_path_rate: float = 0.2,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        dims = tuple(embed_dim * 2**i for i in range(len(depths)))
        self.patch_embed = self._stem(in_chans, embed_dim, **dd)
        levels = Levels()
        dilations = dilations or tuple((1,) * depth for depth in depths)
        if [len(steps) for steps in dilations] != list(depths):
            raise ValueError(f"dilations {dilations} must have a number for each block of the depths {depths}")
        for i, rates in enumerate(drop_paths(drop_path_rate, depths)):
            blocks = Blocks(
                *(
                    Block(dims[i], num_heads[i], kernel_size, step, mlp_ratio, rate, layer_scale, **dd)
                    for step, rate in zip(dilations[i], rates, strict=True)
                )
            )
            levels.append(Level(blocks, nn.Identity() if i == len(dims) - 1 else self._step(dims[i], **dd)))
        self.add_module(self.stages_name, levels)
        modules = tuple(f"{self.stages_name}.{i}.blocks" for i in range(len(dims)))
        norm = nn.LayerNorm(dims[-1], **dd)
        self._finish(dims, modules, num_classes, in_chans, global_pool, drop_rate, norm, **dd)

    def _stem(self, in_chans: int, dim: int, **dd: Any) -> nn.Module:
        return Stem(in_chans, dim, **dd)

    def _step(self, dim: int, **dd: Any) -> nn.Module:
        return Downsample(dim, **dd)

    def forward_stages(self, x: torch.Tensor, take: list[int]) -> list[torch.Tensor]:
        """See `Pyramid.forward_stages`."""
        return self.levels(self.patch_embed(x), take)


def _cfg(url: str = "", paper: str = "arXiv:2209.15001", **more: Any) -> dict[str, Any]:
    origin = "https://github.com/SHI-Labs/Neighborhood-Attention-Transformer"
    url = f"https://shi-labs.com/projects/{url}" if url else ""
    return cfg("mit", paper, origin, "patch_embed.proj.0", url, **more)


def _nat_cfg(size: str) -> dict[str, Any]:
    return _cfg(f"nat/checkpoints/CLS/nat_{size}.pth", "arXiv:2204.07143")


def _dinat_cfg(size: str) -> dict[str, Any]:
    return _cfg(f"dinat/checkpoints/imagenet1k/dinat_{size}_in1k_224.pth")


default_cfgs = generate_default_cfgs(
    {
        "nat_mini.in1k": _nat_cfg("mini"),
        "nat_tiny.in1k": _nat_cfg("tiny"),
        "nat_small.in1k": _nat_cfg("small"),
        "nat_base.in1k": _nat_cfg("base"),
        "dinat_mini.in1k": _dinat_cfg("mini"),
        "dinat_tiny.in1k": _dinat_cfg("tiny"),
        "dinat_small.in1k": _dinat_cfg("small"),
        "dinat_base.in1k": _dinat_cfg("base"),
        "dinat_large.in22k_ft_in1k": _cfg("dinat/checkpoints/imagenet1k/dinat_large_in22k_in1k_224.pth"),
        "dinat_large.in22k": _cfg("dinat/checkpoints/imagenet22k/dinat_large_in22k_224.pth", num_classes=21841),
    }
)

_DEEP = (3, 4, 18, 5)


def alternating(depths: tuple[int, ...]) -> tuple[tuple[int, ...], ...]:
    """1 and the stage's dilation in turn; the largest whose window of 7 fits the stage's map at 224 pixels."""
    return tuple(tuple(d if j % 2 else 1 for j in range(depth)) for depth, d in zip(depths, (8, 4, 2, 1), strict=True))


_MINI: dict[str, Any] = {"embed_dim": 64, "depths": (3, 4, 6, 5), "num_heads": (2, 4, 8, 16), "mlp_ratio": 3}
_TINY: dict[str, Any] = {"embed_dim": 64, "depths": _DEEP, "num_heads": (2, 4, 8, 16), "mlp_ratio": 3}
_SMALL: dict[str, Any] = {
    "embed_dim": 96,
    "depths": _DEEP,
    "num_heads": (3, 6, 12, 24),
    "mlp_ratio": 2,
    "drop_path_rate": 0.3,
}
_BASE: dict[str, Any] = {
    "embed_dim": 128,
    "depths": _DEEP,
    "num_heads": (4, 8, 16, 32),
    "mlp_ratio": 2,
    "drop_path_rate": 0.5,
}
_LARGE: dict[str, Any] = {
    "embed_dim": 192,
    "depths": _DEEP,
    "num_heads": (6, 12, 24, 48),
    "mlp_ratio": 2,
    "drop_path_rate": 0.35,
}


@register_model
def nat_mini(pretrained: bool = False, **kwargs: Any) -> NAT:
    """NAT-Mini, 20 M parameters."""
    return build(NAT, "nat_mini", pretrained, **{**_MINI, **kwargs})


@register_model
def nat_tiny(pretrained: bool = False, **kwargs: Any) -> NAT:
    """NAT-Tiny, 28 M parameters."""
    return build(NAT, "nat_tiny", pretrained, **{**_TINY, **kwargs})


@register_model
def nat_small(pretrained: bool = False, **kwargs: Any) -> NAT:
    """NAT-Small, 51 M parameters."""
    return build(NAT, "nat_small", pretrained, **{**_SMALL, "layer_scale": 1e-5, **kwargs})


@register_model
def nat_base(pretrained: bool = False, **kwargs: Any) -> NAT:
    """NAT-Base, 90 M parameters."""
    return build(NAT, "nat_base", pretrained, **{**_BASE, "layer_scale": 1e-5, **kwargs})


@register_model
def dinat_mini(pretrained: bool = False, **kwargs: Any) -> NAT:
    """DiNAT-Mini, 20 M parameters."""
    return build(NAT, "dinat_mini", pretrained, **{**_MINI, "dilations": alternating(_MINI["depths"]), **kwargs})


@register_model
def dinat_tiny(pretrained: bool = False, **kwargs: Any) -> NAT:
    """DiNAT-Tiny, 28 M parameters."""
    return build(NAT, "dinat_tiny", pretrained, **{**_TINY, "dilations": alternating(_DEEP), **kwargs})


@register_model
def dinat_small(pretrained: bool = False, **kwargs: Any) -> NAT:
    """DiNAT-Small, 51 M parameters."""
    return build(NAT, "dinat_small", pretrained, **{**_SMALL, "dilations": alternating(_DEEP), **kwargs})


@register_model
def dinat_base(pretrained: bool = False, **kwargs: Any) -> NAT:
    """DiNAT-Base, 90 M parameters."""
    return build(
        NAT, "dinat_base", pretrained, **{**_BASE, "layer_scale": 1e-5, "dilations": alternating(_DEEP), **kwargs}
    )


@register_model
def dinat_large(pretrained: bool = False, **kwargs: Any) -> NAT:
    """DiNAT-Large, 200 M parameters."""
    return build(NAT, "dinat_large", pretrained, **{**_LARGE, "dilations": alternating(_DEEP), **kwargs})
