"""MoH-ViT: TransNeXt with mixture-of-head attention.

Paper: "MoH: Multi-Head Attention as Mixture-of-Head Attention" (2024), https://arxiv.org/abs/2410.11842, section 4.1.
Official code: https://github.com/SkyworkAI/MoH (Apache 2.0); weights: the repositories MoH-ViT-{S-80,S-75,B-75,B-50}
of Chat-UniVi on Hugging Face. They have the names used here: load them with `checkpoint_path=`.
"""

# Stages are attributes with computed names (the official keys): a type checker knows only "Tensor or Module" of them.
# pyright: reportCallIssue=false, reportArgumentType=false, reportAssignmentType=false

import math
from typing import Any

import torch
from timm.layers import DropPath
from timm.models import generate_default_cfgs, register_model
from torch import nn
from torch.nn import functional as F

from visattn.models.backbones.factory import build, cfg
from visattn.models.backbones.functional import unscripted
from visattn.models.backbones.moh import AggregatedAttention, HeadGates, MoHAttention
from visattn.models.backbones.numbered import NumberedPyramid
from visattn.models.backbones.pyramid import drop_paths
from visattn.models.backbones.stages import Blocks

__all__ = ["MoHViT"]


class Depthwise(nn.Module):
    """A 3 x 3 depthwise convolution, under its official name `dwconv.dwconv`."""

    def __init__(self, dim: int, **dd: Any) -> None:
        super().__init__()
        self.dwconv = nn.Conv2d(dim, dim, 3, padding=1, groups=dim, **dd)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map [B, H, W, dim] to the same shape."""
        return self.dwconv(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


class GatedMlp(nn.Module):
    """A gated linear unit whose gate sees the 3 x 3 neighbours (TransNeXt, section 3.3)."""

    def __init__(self, dim: int, hidden: int, **dd: Any) -> None:
        super().__init__()
        hidden = int(2 * hidden / 3)
        self.fc1 = nn.Linear(dim, 2 * hidden, **dd)
        self.dwconv = Depthwise(hidden, **dd)
        self.fc2 = nn.Linear(hidden, dim, **dd)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map [B, H, W, dim] to the same shape."""
        gate, value = self.fc1(x).chunk(2, dim=-1)
        return self.fc2(F.gelu(self.dwconv(gate)) * value)


class Block(nn.Module):
    """Attention and a gated MLP, each behind a norm."""

    def __init__(self, dim: int, attn: nn.Module, mlp_ratio: float, drop_path: float, eps: float, **dd: Any) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=eps, **dd)
        self.attn = attn
        self.norm2 = nn.LayerNorm(dim, eps=eps, **dd)
        self.mlp = GatedMlp(dim, int(dim * mlp_ratio), **dd)
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map [B, H, W, dim] to the same shape."""
        x = x + self.drop_path(self.attn(self.norm1(x)))
        return x + self.drop_path(self.mlp(self.norm2(x)))


class OverlapEmbed(nn.Module):
    """A strided convolution with overlap, and a norm: image or map [B, H, W, C] to a map [B, H', W', dim]."""

    def __init__(self, channels: int, dim: int, kernel: int, stride: int, **dd: Any) -> None:
        super().__init__()
        self.proj = nn.Conv2d(channels, dim, kernel, stride=stride, padding=kernel // 2, **dd)
        self.norm = nn.LayerNorm(dim, **dd)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Image or map to map."""
        return self.norm(self.proj(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1))


class MoHViT(NumberedPyramid):
    """MoH-ViT.

    Any image works: pooling, position biases and scales follow the map.

    Args:
        img_size: Side of the images that distances in the position bias are scaled to.
        patch_size: Stride of the first convolution.
        embed_dims: Channels per stage.
        num_heads: Heads per stage.
        mlp_ratios: Hidden channels of the MLP over channels, per stage, before the gate takes a third.
        depths: Blocks per stage.
        sr_ratios: Tokens per pooled token and axis, per stage; 1 for plain attention.
        shared_head: Heads that every token uses, per stage.
        routed_head: Further heads that a token uses, per stage; 0 if all heads are shared.
        skip_heads: Whether the last stage computes heads only for the tokens that use them, on large maps.
        norm_eps: Epsilon of the norms in blocks and after stages.
        drop_path_rate: Chance to skip the last block in training; earlier blocks have less.
        in_chans: Channels of the image.
        num_classes: Classes of the head, 0 for none.
        global_pool: "avg", "max", "avgmax", "catavgmax", or "" for none.
        drop_rate: Dropout before the head.
        device: Where the weights are made.
        dtype: Of the weights.
    """

    parts = ("patch_embed", "block", "norm")

    def __init__(
        self,
        img_size: int = 224,
        patch_size: int = 4,
        embed_dims: tuple[int, ...] = (72, 144, 288, 576),
        num_heads: tuple[int, ...] = (3, 6, 12, 24),
        mlp_ratios: tuple[float, ...] = (8, 8, 4, 4),
        depths: tuple[int, ...] = (5, 5, 22, 5),
        sr_ratios: tuple[int, ...] = (8, 4, 2, 1),
        shared_head: tuple[int, ...] = (3, 6, 3, 8),
        routed_head: tuple[int, ...] = (0, 0, 6, 12),
        skip_heads: bool = True,
        norm_eps: float = 1e-6,
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
        channels = in_chans
        for i, rates in enumerate(drop_paths(drop_path_rate, depths)):
            dim, heads = embed_dims[i], (num_heads[i], shared_head[i], routed_head[i])
            side = img_size // 2 ** (i + 2)
            blocks = []
            for rate in rates:
                if sr_ratios[i] == 1:
                    attn: HeadGates = MoHAttention(dim, *heads, side, skip_heads, **dd)
                else:
                    attn = AggregatedAttention(dim, *heads, side, sr_ratios[i], **dd)
                blocks.append(Block(dim, attn, mlp_ratios[i], rate, norm_eps, **dd))
            kernel, stride = (3, 2) if i else (2 * patch_size - 1, patch_size)
            self.add_module(f"patch_embed{i + 1}", OverlapEmbed(channels, dim, kernel, stride, **dd))
            self.add_module(f"block{i + 1}", Blocks(*blocks))
            self.add_module(f"norm{i + 1}", nn.LayerNorm(dim, eps=norm_eps, **dd))
            channels = dim
        modules = tuple(f"norm{i + 1}" for i in range(len(depths)))
        norm = nn.Identity()  # each stage ends with its own
        self._finish(tuple(embed_dims), modules, num_classes, in_chans, global_pool, drop_rate, norm, **dd)
        self.apply(_init_conv)

    def stage1(self, x: torch.Tensor) -> torch.Tensor:
        """See `NumberedPyramid.stage1`."""
        return self.norm1(self.block1(self.patch_embed1(x)))

    def stage2(self, x: torch.Tensor) -> torch.Tensor:
        """See `NumberedPyramid.stage2`."""
        return self.norm2(self.block2(self.patch_embed2(x)))

    def stage3(self, x: torch.Tensor) -> torch.Tensor:
        """See `NumberedPyramid.stage3`."""
        return self.norm3(self.block3(self.patch_embed3(x)))

    def stage4(self, x: torch.Tensor) -> torch.Tensor:
        """See `NumberedPyramid.stage4`."""
        return self.norm4(self.block4(self.patch_embed4(x)))

    @unscripted
    def load_balancing_loss(self) -> torch.Tensor:
        """Mean over the routed layers of the last training forward; the paper adds 0.01 of it to the loss.

        Raises:
            ValueError: If there was no forward in training yet, or no head is routed.
        """
        losses = [m.balance.loss for m in self.modules() if isinstance(m, HeadGates) and m.balance.loss is not None]
        if not losses:
            raise ValueError("no load-balancing loss: run the model in training first; it needs routed heads")
        return torch.stack(losses).mean()


def _init_conv(module: nn.Module) -> None:
    if isinstance(module, nn.Conv2d):
        fan_out = module.kernel_size[0] * module.kernel_size[1] * module.out_channels // module.groups
        nn.init.normal_(module.weight, std=math.sqrt(2 / fan_out))
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def _cfg() -> dict[str, Any]:
    return cfg("apache-2.0", "arXiv:2410.11842", "https://github.com/SkyworkAI/MoH", "patch_embed1.proj")


default_cfgs = generate_default_cfgs(
    {f"moh_vit_{size}.in1k": _cfg() for size in ("small_80", "small_75", "base_75", "base_50")}
)

_BASE: dict[str, Any] = {"embed_dims": (96, 192, 384, 768), "num_heads": (4, 8, 16, 32), "depths": (5, 5, 23, 5)}


@register_model
def moh_vit_small_80(pretrained: bool = False, **kwargs: Any) -> MoHViT:
    """MoH-ViT-S, 49.9 M parameters, 80 % of the heads used."""
    return build(MoHViT, "moh_vit_small_80", pretrained, **kwargs)


@register_model
def moh_vit_small_75(pretrained: bool = False, **kwargs: Any) -> MoHViT:
    """MoH-ViT-S, 49.9 M parameters, 75 % of the heads used."""
    return build(MoHViT, "moh_vit_small_75", pretrained, **{"shared_head": (3, 6, 3, 4), **kwargs})


@register_model
def moh_vit_base_75(pretrained: bool = False, **kwargs: Any) -> MoHViT:
    """MoH-ViT-B, 90.0 M parameters, 75 % of the heads used."""
    size = {**_BASE, "shared_head": (4, 8, 4, 5), "routed_head": (0, 0, 8, 16)}
    return build(MoHViT, "moh_vit_base_75", pretrained, **{**size, **kwargs})


@register_model
def moh_vit_base_50(pretrained: bool = False, **kwargs: Any) -> MoHViT:
    """MoH-ViT-B, 90.0 M parameters, half of the heads used."""
    size = {**_BASE, "shared_head": (2, 2, 2, 4), "routed_head": (2, 4, 6, 8)}
    return build(MoHViT, "moh_vit_base_50", pretrained, **{**size, **kwargs})
