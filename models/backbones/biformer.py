"""BiFormer: bi-level routing attention.

Paper: "BiFormer: Vision Transformer with Bi-Level Routing Attention" (CVPR 2023), https://arxiv.org/abs/2303.08810.
Official code: https://github.com/rayleizhu/BiFormer (MIT). Its weight files are behind short links and have the
names used here inside {"model": ...}: load them with `checkpoint_path=`.
"""

import itertools
from typing import Any

import torch
from timm.layers import DropPath
from timm.models import generate_default_cfgs, register_model
from torch import nn
from torch.nn import functional as F

from visattn.models.backbones.factory import build, cfg
from visattn.models.backbones.functional import pad_multiple, routed, unscripted
from visattn.models.backbones.pyramid import Pyramid, channels_of_head, drop_paths
from visattn.models.backbones.stages import Blocks

__all__ = ["BiFormer", "BiFormerSTL"]


class Projection(nn.Module):
    """The shared projection to queries, keys and values, under its official name `qkv.qkv`."""

    def __init__(self, dim: int, **dd: Any) -> None:
        super().__init__()
        self.qkv = nn.Linear(dim, 3 * dim, **dd)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., dim] to [..., 3 dim]."""
        return self.qkv(x)


class BiLevelRoutingAttention(nn.Module):
    """Each region of the map attends to its top-k regions; a depthwise convolution of the values is added.

    The map is padded with zeros at the bottom and right to whole regions; the padding counts in the region means
    and is attended, as in the official `auto_pad`. The softmax scale is dim**-0.5, not that of one head.

    Paper, section 3.2.
    """

    def __init__(self, dim: int, num_heads: int, regions: int, topk: int, side: int, **dd: Any) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.regions = regions
        self.topk = topk
        self.scale = dim**-0.5
        self.lepe = nn.Conv2d(dim, dim, side, padding=side // 2, groups=dim, **dd)
        self.qkv = Projection(dim, **dd)
        self.wo = nn.Linear(dim, dim, **dd)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Attention of a map [B, H, W, dim]."""
        _, height, width, dim = x.shape
        x = pad_multiple(x, self.regions)
        batch, rows, columns, _ = x.shape
        qkv = self.qkv(x)
        local = self.lepe(qkv[..., 2 * dim :].permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        q, k, v = qkv.reshape(batch, rows * columns, 3, self.num_heads, dim // self.num_heads).unbind(2)
        x = routed(q, k, v, rows, columns, self.regions, self.topk, self.scale)
        x = self.wo(x.reshape(batch, rows, columns, dim) + local)
        return x[:, :height, :width]


class FullAttention(nn.Module):
    """Plain attention of 8 heads with a depthwise convolution of its input added: the last stage."""

    def __init__(self, dim: int, side: int, num_heads: int = 8, **dd: Any) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.head_dim = channels_of_head(dim, num_heads)
        self.qkv = nn.Linear(dim, 3 * dim, bias=False, **dd)
        self.proj = nn.Linear(dim, dim, **dd)
        self.lepe = nn.Conv2d(dim, dim, side, padding=side // 2, groups=dim, **dd)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Attention of a map [B, H, W, dim]."""
        batch, height, width, dim = x.shape
        local = self.lepe(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        qkv = self.qkv(x).reshape(batch, height * width, 3, self.num_heads, self.head_dim)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(batch, height, width, dim)
        return self.proj(y + local)


class Block(nn.Module):
    """Attention and an MLP, after a depthwise convolution (`pos_embed`) where `local` is set."""

    def __init__(
        self,
        dim: int,
        num_heads: int,
        regions: int,
        topk: int,
        mlp_ratio: float,
        side: int,
        drop_path: float,
        local: bool,
        **dd: Any,
    ) -> None:
        super().__init__()
        self.local = local
        hidden = int(mlp_ratio * dim)
        if local:
            self.pos_embed = nn.Conv2d(dim, dim, 3, padding=1, groups=dim, **dd)
            # The official MLP has an empty place for a convolution here, which gives the names mlp.0 and mlp.3.
            layers = [nn.Linear(dim, hidden, **dd), nn.Identity(), nn.GELU(), nn.Linear(hidden, dim, **dd)]
        else:
            self.pos_embed = nn.Identity()
            layers = [nn.Linear(dim, hidden, **dd), nn.GELU(), nn.Linear(hidden, dim, **dd)]
        self.norm1 = nn.LayerNorm(dim, eps=1e-6, **dd)
        if topk > 0:
            self.attn = BiLevelRoutingAttention(dim, num_heads, regions, topk, side, **dd)
        elif topk == -2:
            self.attn = FullAttention(dim, side, **dd)
        else:
            raise ValueError(f"topk {topk} must be at least 1, or -2 for full attention")
        self.norm2 = nn.LayerNorm(dim, eps=1e-6, **dd)
        self.mlp = nn.Sequential(*layers)
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map [B, dim, H, W] to the same shape."""
        if self.local:
            x = x + self.pos_embed(x)
        x = x.permute(0, 2, 3, 1)
        x = x + self.drop_path(self.attn(self.norm1(x)))
        x = x + self.drop_path(self.mlp(self.norm2(x)))
        return x.permute(0, 3, 1, 2)


class BiFormer(Pyramid):
    """BiFormer.

    Args:
        depth: Blocks per stage.
        embed_dim: Channels per stage.
        mlp_ratios: Hidden channels of the MLP over channels, per stage.
        n_win: Regions per axis.
        topks: Regions that a region attends to, per stage; -2 for full attention.
        head_dim: Channels per head.
        side_dwconv: Side of the depthwise convolution on the values.
        drop_path_rate: Chance to skip the last block in training; earlier blocks have less.
        in_chans: Channels of the image.
        num_classes: Classes of the head, 0 for none.
        global_pool: "avg", "max", "avgmax", "catavgmax", or "" for none.
        drop_rate: Dropout before the head.
        device: Where the weights are made.
        dtype: Of the weights.

    Raises:
        ValueError: If a stage's channels are no multiple of a head's, or `topks` has other numbers.
    """

    output_fmt = "NCHW"
    # Whether a block starts with its own convolution.
    local = True

    def __init__(
        self,
        depth: tuple[int, ...] = (2, 2, 8, 2),
        embed_dim: tuple[int, ...] = (64, 128, 256, 512),
        mlp_ratios: tuple[float, ...] = (3, 3, 3, 3),
        n_win: int = 7,
        topks: tuple[int, ...] = (1, 4, 16, -2),
        head_dim: int = 32,
        side_dwconv: int = 5,
        drop_path_rate: float = 0.0,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        dims = tuple(embed_dim)
        steps = [self._stem(in_chans, dims[0], **dd)]
        steps += [self._step(a, b, **dd) for a, b in itertools.pairwise(dims)]
        self.downsample_layers = nn.ModuleList(steps)
        self.stages = nn.ModuleList()
        for i, rates in enumerate(drop_paths(drop_path_rate, depth)):
            if dims[i] % head_dim:
                raise ValueError(f"embed_dim {dims[i]} must be a multiple of head_dim {head_dim}")
            heads = dims[i] // head_dim
            blocks = (
                Block(dims[i], heads, n_win, topks[i], mlp_ratios[i], side_dwconv, rate, self.local, **dd)
                for rate in rates
            )
            self.stages.append(self._stage(Blocks(*blocks)))
        modules = tuple(f"stages.{i}" for i in range(len(dims)))
        norm = nn.BatchNorm2d(dims[-1], **dd)
        self._finish(dims, modules, num_classes, in_chans, global_pool, drop_rate, norm, **dd)

    def _stem(self, in_chans: int, dim: int, **dd: Any) -> nn.Module:
        return nn.Sequential(
            nn.Conv2d(in_chans, dim // 2, 3, stride=2, padding=1, **dd),
            nn.BatchNorm2d(dim // 2, **dd),
            nn.GELU(),
            nn.Conv2d(dim // 2, dim, 3, stride=2, padding=1, **dd),
            nn.BatchNorm2d(dim, **dd),
        )

    def _step(self, dim: int, out: int, **dd: Any) -> nn.Module:
        return nn.Sequential(nn.Conv2d(dim, out, 3, stride=2, padding=1, **dd), nn.BatchNorm2d(out, **dd))

    def _stage(self, blocks: Blocks) -> nn.Module:
        return blocks

    def forward_stages(self, x: torch.Tensor, take: list[int]) -> list[torch.Tensor]:
        """See `Pyramid.forward_stages`."""
        maps: list[torch.Tensor] = []
        for i, (step, stage) in enumerate(zip(self.downsample_layers, self.stages)):  # noqa: B905, TorchScript
            if i <= take[-1]:
                x = stage(step(x))
                if i in take:
                    maps.append(x)
        return maps

    def keep_stages(self, count: int) -> None:
        """See `Pyramid.keep_stages`."""
        self.downsample_layers = self.downsample_layers[:count]
        self.stages = self.stages[:count]

    @unscripted
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Parameters by depth, for layer-wise learning rates."""
        fine = [
            (r"^downsample_layers\.(\d+)", (0,)),
            (r"^stages\.(\d+)\.(?:blocks\.)?(\d+)", None),
            (r"^norm", (99999,)),
        ]
        whole = r"^(?:stages|downsample_layers)\.(\d+)"
        return {"stem": r"^downsample_layers\.0", "blocks": whole if coarse else fine}


class Stage(nn.Module):
    """A stage whose blocks have the official name `blocks`."""

    def __init__(self, blocks: Blocks) -> None:
        super().__init__()
        self.blocks = blocks

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Run the blocks."""
        return self.blocks(x)


class BiFormerSTL(BiFormer):
    """BiFormer in the layout of Swin-T: patches, merging of 2 x 2 patches, no convolution before the attention."""

    local = False

    def _stem(self, in_chans: int, dim: int, **dd: Any) -> nn.Module:
        return nn.Sequential(nn.Conv2d(in_chans, dim, 4, stride=4, **dd), nn.BatchNorm2d(dim, **dd))

    def _step(self, dim: int, out: int, **dd: Any) -> nn.Module:
        return nn.Sequential(nn.BatchNorm2d(dim, **dd), nn.Conv2d(dim, out, 2, stride=2, **dd))

    def _stage(self, blocks: Blocks) -> nn.Module:
        return Stage(blocks)


def _cfg() -> dict[str, Any]:
    origin = "https://github.com/rayleizhu/BiFormer"
    return cfg("mit", "arXiv:2303.08810", origin, "downsample_layers.0.0", min_input_size=(3, 32, 32))


default_cfgs = generate_default_cfgs({f"biformer_{size}.in1k": _cfg() for size in ("tiny", "small", "base", "stl")})


@register_model
def biformer_tiny(pretrained: bool = False, **kwargs: Any) -> BiFormer:
    """BiFormer-T, 13.1 M parameters."""
    return build(BiFormer, "biformer_tiny", pretrained, **kwargs)


@register_model
def biformer_small(pretrained: bool = False, **kwargs: Any) -> BiFormer:
    """BiFormer-S, 25.5 M parameters."""
    return build(BiFormer, "biformer_small", pretrained, **{"depth": (4, 4, 18, 4), **kwargs})


@register_model
def biformer_base(pretrained: bool = False, **kwargs: Any) -> BiFormer:
    """BiFormer-B, 56.8 M parameters."""
    size = {"depth": (4, 4, 18, 4), "embed_dim": (96, 192, 384, 768)}
    return build(BiFormer, "biformer_base", pretrained, **{**size, **kwargs})


@register_model
def biformer_stl(pretrained: bool = False, **kwargs: Any) -> BiFormer:
    """BiFormer-STL, 28.4 M parameters: Swin-T with bi-level routing attention."""
    size = {"depth": (2, 2, 6, 2), "embed_dim": (96, 192, 384, 768), "mlp_ratios": (4, 4, 4, 4)}
    return build(BiFormerSTL, "biformer_stl", pretrained, **{**size, **kwargs})
