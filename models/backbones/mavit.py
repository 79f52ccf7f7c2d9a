"""MAViT: magnitude-aware linear attention in the first two stages, softmax attention in the others.

Paper: "Rectifying Magnitude Neglect in Linear Attention" (ICCV 2025), https://arxiv.org/abs/2507.00698. Written from
its equations. The official weights carry no licence at the top level of their repository; these models have their
names and take them.
"""

from typing import Any

import torch
from timm.layers import trunc_normal_
from timm.models import generate_default_cfgs, register_model
from torch import nn

from visattn.models.backbones.factory import build, cfg
from visattn.models.backbones.leveled import LeveledPyramid
from visattn.models.backbones.mala import Block, RoPE, RotaryBlocks
from visattn.models.backbones.pyramid import drop_paths
from visattn.models.backbones.stages import Levels

__all__ = ["MAViT"]


class Downsample(nn.Module):
    """A strided convolution and a batch norm: half the sides."""

    def __init__(self, dim: int, out: int, **dd: Any) -> None:
        super().__init__()
        self.reduction = nn.Conv2d(dim, out, 3, stride=2, padding=1, **dd)
        self.norm = nn.BatchNorm2d(out, **dd)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map [B, dim, H, W] to [B, out, H / 2, W / 2]."""
        return self.norm(self.reduction(x))


class Layer(nn.Module):
    """A stage: blocks that share their positions, then the step down to the next stage."""

    def __init__(self, rope: RoPE, blocks: RotaryBlocks, downsample: nn.Module) -> None:
        super().__init__()
        self.RoPE = rope
        self.blocks = blocks
        self.downsample = downsample

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Run the blocks."""
        return self.blocks(x, self.RoPE(x.shape[2], x.shape[3]))


class Stem(nn.Module):
    """Four convolutions: image [B, C, H, W] to a map [B, dim, H / 4, W / 4]."""

    def __init__(self, in_chans: int, dim: int, **dd: Any) -> None:
        super().__init__()
        half = dim // 2
        layers: list[nn.Module] = []
        for a, b, stride in ((in_chans, half, 2), (half, half, 1), (half, half, 1), (half, dim, 2)):
            layers += [nn.Conv2d(a, b, 3, stride=stride, padding=1, **dd), nn.BatchNorm2d(b, **dd), nn.GELU()]
        # No activation after the last one.
        self.proj = nn.Sequential(*layers[:-1])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Image to map."""
        return self.proj(x)


class MAViT(LeveledPyramid):
    """MAViT.

    Args:
        embed_dims: Channels per stage.
        depths: Blocks per stage.
        num_heads: Heads per stage.
        mlp_ratios: Hidden channels of the MLP over channels, per stage.
        flags: Attention per stage: "l" linear, "v" softmax.
        projection: Channels of the last convolution, before pooling and head.
        layer_init_values: First value of the per-channel factors on attention and MLP, per stage; None for none.
        drop_path_rate: Chance to skip the last block in training; earlier blocks have less.
        in_chans: Channels of the image.
        num_classes: Classes of the head, 0 for none.
        global_pool: "avg", "max", "avgmax", "catavgmax", or "" for none.
        drop_rate: Dropout before the head.
        device: Where the weights are made.
        dtype: Of the weights.

    Raises:
        ValueError: If a flag is neither "l" nor "v".
    """

    output_fmt = "NCHW"
    last_names = "proj|norm"

    def __init__(
        self,
        embed_dims: tuple[int, ...] = (64, 128, 256, 512),
        depths: tuple[int, ...] = (2, 2, 6, 2),
        num_heads: tuple[int, ...] = (1, 2, 4, 8),
        mlp_ratios: tuple[float, ...] = (3.5, 3.5, 3.5, 3.5),
        flags: tuple[str, ...] = ("l", "l", "v", "v"),
        projection: int = 2048,
        layer_init_values: tuple[float | None, ...] = (1.0, 1.0, 1.0, 1.0),
        drop_path_rate: float = 0.1,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        if not set(flags) <= {"l", "v"}:
            raise ValueError(f"flags {tuple(flags)} must have 'l' (linear) or 'v' (softmax) for each stage")
        dd = {"device": device, "dtype": dtype}
        dims = tuple(embed_dims)
        self.patch_embed = Stem(in_chans, dims[0], **dd)
        self.layers = Levels()
        for i, rates in enumerate(drop_paths(drop_path_rate, depths)):
            hidden = int(mlp_ratios[i] * dims[i])
            blocks = RotaryBlocks(
                *(
                    Block(dims[i], num_heads[i], flags[i] == "l", hidden, rate, layer_init_values[i], **dd)
                    for rate in rates
                )
            )
            step = nn.Identity() if i == len(dims) - 1 else Downsample(dims[i], dims[i + 1], **dd)
            self.layers.append(Layer(RoPE(dims[i], num_heads[i], device), blocks, step))
        modules = tuple(f"layers.{i}.blocks" for i in range(len(dims)))
        norm = nn.BatchNorm2d(projection, **dd)
        self._finish(dims, modules, num_classes, in_chans, global_pool, drop_rate, norm, **dd, projection=projection)
        self.proj = nn.Conv2d(dims[-1], projection, 1, **dd)
        self.swish = nn.SiLU()
        self.apply(_init_convolution)

    def _classifier(self, channels: int, classes: int, device: Any = None, dtype: Any = None) -> nn.Module:
        """A head that is a 1 x 1 convolution, as in the official files."""
        if classes == 0:
            return nn.Identity()
        head = nn.Conv2d(channels, classes, 1, device=device, dtype=dtype)
        _init_convolution(head)
        return head

    def forward_last(self, x: torch.Tensor) -> torch.Tensor:
        """See `Pyramid.forward_last`: to the channels of the head."""
        return self.swish(self.norm(self.proj(x)))

    def forward_head(self, x: torch.Tensor, pre_logits: bool = False) -> torch.Tensor:
        """Map to logits [B, num_classes], or to the pooled features with `pre_logits`."""
        x = self.head_drop(self.global_pool(x))
        if pre_logits:
            return x
        if self.global_pool.pool_type == "":
            return self.head(x)
        return self.head(x[:, :, None, None]).flatten(1)

    def drop_last(self) -> None:
        """See `Pyramid.drop_last`."""
        self.proj = self.norm = self.swish = nn.Identity()


def _init_convolution(module: nn.Module) -> None:
    if isinstance(module, nn.Conv2d):
        trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def _cfg() -> dict[str, Any]:
    origin = "https://github.com/qhfan/MALA"
    return cfg("", "arXiv:2507.00698", origin, "patch_embed.proj.0", min_input_size=(3, 32, 32))


default_cfgs = generate_default_cfgs({f"mavit_{size}.in1k": _cfg() for size in ("tiny", "small", "base", "large")})


@register_model
def mavit_tiny(pretrained: bool = False, **kwargs: Any) -> MAViT:
    """MAViT-T, 16.5 M parameters."""
    return build(MAViT, "mavit_tiny", pretrained, **kwargs)


@register_model
def mavit_small(pretrained: bool = False, **kwargs: Any) -> MAViT:
    """MAViT-S, 27.1 M parameters."""
    size = {
        "embed_dims": (64, 128, 320, 512),
        "depths": (3, 5, 9, 3),
        "num_heads": (1, 2, 5, 8),
        "drop_path_rate": 0.15,
    }
    return build(MAViT, "mavit_small", pretrained, **{**size, **kwargs})


@register_model
def mavit_base(pretrained: bool = False, **kwargs: Any) -> MAViT:
    """MAViT-B, 49.8 M parameters."""
    size = {
        "embed_dims": (96, 192, 384, 512),
        "depths": (4, 6, 12, 6),
        "num_heads": (1, 2, 6, 8),
        "layer_init_values": (1.0, 1.0, 1e-6, 1e-6),
        "drop_path_rate": 0.4,
    }
    return build(MAViT, "mavit_base", pretrained, **{**size, **kwargs})


@register_model
def mavit_large(pretrained: bool = False, **kwargs: Any) -> MAViT:
    """MAViT-L, 97.8 M parameters."""
    size = {
        "embed_dims": (96, 192, 448, 640),
        "depths": (4, 7, 19, 8),
        "num_heads": (1, 2, 7, 10),
        "projection": 2560,
        "layer_init_values": (1e-6, 1e-6, 1e-6, 1e-6),
        "drop_path_rate": 0.55,
    }
    return build(MAViT, "mavit_large", pretrained, **{**size, **kwargs})
