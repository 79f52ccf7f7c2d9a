"""DiNAT_s: Swin's layout (patches of 4, patch merging) with dilated neighborhood attention in its blocks.

Paper: "Dilated Neighborhood Attention Transformer", https://arxiv.org/abs/2209.15001, section 4.
Official code and weights: https://github.com/SHI-Labs/Neighborhood-Attention-Transformer (MIT).
"""

from typing import Any

import torch
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.swin_transformer import PatchMerging
from torch import nn

from visattn.models.functional import pad_multiple, unscripted
from visattn.models.nat import Block, Level
from visattn.models.pyramid import Blocks, Pyramid, cfg, drop_paths, official

__all__ = ["DiNATS"]


class PatchEmbed(nn.Module):
    """Patches of `patch` pixels per side as tokens, normed; the image is padded with zeros to whole patches."""

    def __init__(self, in_chans: int, dim: int, patch: int = 4, **dd: Any) -> None:
        super().__init__()
        self.patch = patch
        self.proj = nn.Conv2d(in_chans, dim, patch, stride=patch, **dd)
        self.norm = nn.LayerNorm(dim, **dd)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Image [B, C, H, W] to a map [B, H / patch, W / patch, dim]."""
        x = pad_multiple(x.permute(0, 2, 3, 1), self.patch).permute(0, 3, 1, 2)
        return self.norm(self.proj(x).permute(0, 2, 3, 1))


class DiNATS(Pyramid):
    """DiNAT_s.

    Args:
        embed_dim: Channels of the first stage; they double at each stage.
        depths: Blocks per stage.
        num_heads: Heads per stage.
        mlp_ratio: Hidden channels of the MLP over channels.
        kernel_size: Window per axis.
        dilations: Dilation of each block of each stage, 1 everywhere if None.
        drop_path_rate: Chance to skip the last block in training; earlier blocks have less.
        in_chans: Channels of the image.
        num_classes: Classes of the head, 0 for none.
        global_pool: "avg", "max", "avgmax", "catavgmax", or "" for none.
        drop_rate: Dropout before the head.
        device: Where the weights are made.
        dtype: Of the weights.
    """

    def __init__(
        self,
        embed_dim: int = 96,
        depths: tuple[int, ...] = (2, 2, 6, 2),
        num_heads: tuple[int, ...] = (3, 6, 12, 24),
        mlp_ratio: float = 4.0,
        kernel_size: int = 7,
        dilations: tuple[tuple[int, ...], ...] | None = None,
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
        self.patch_embed = PatchEmbed(in_chans, embed_dim, **dd)
        self.layers = nn.ModuleList()
        for i, rates in enumerate(drop_paths(drop_path_rate, depths)):
            steps = dilations[i] if dilations else (1,) * depths[i]
            blocks = Blocks(
                *(
                    Block(dims[i], num_heads[i], kernel_size, step, mlp_ratio, rate, None, **dd)
                    for step, rate in zip(steps, rates, strict=True)
                )
            )
            self.layers.append(Level(blocks, nn.Identity() if i == len(dims) - 1 else PatchMerging(dims[i], **dd)))
        modules = tuple(f"layers.{i}.blocks" for i in range(len(dims)))
        norm = nn.LayerNorm(dims[-1], **dd)
        self._finish(dims, modules, num_classes, in_chans, global_pool, drop_rate, norm, **dd)

    def forward_stages(self, x: torch.Tensor, take: list[int]) -> list[torch.Tensor]:
        """See `Pyramid.forward_stages`."""
        maps: list[torch.Tensor] = []
        x = self.patch_embed(x)
        for i, layer in enumerate(self.layers):
            if i <= take[-1]:
                x = layer.blocks(x)  # type: ignore[operator]
                if i in take:
                    maps.append(x)
                if i < take[-1]:
                    x = layer.downsample(x)  # type: ignore[operator]
        return maps

    def keep_stages(self, count: int) -> None:
        """See `Pyramid.keep_stages`."""
        self.layers = self.layers[:count]
        self.layers[-1].downsample = nn.Identity()

    @unscripted
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Parameters by depth, for layer-wise learning rates."""
        fine = [(r"^layers\.(\d+)\.downsample", (0,)), (r"^layers\.(\d+)\.blocks\.(\d+)", None), (r"^norm", (99999,))]
        return {"stem": r"^patch_embed", "blocks": r"^layers\.(\d+)" if coarse else fine}


def _dinat_s(variant: str, pretrained: bool, depth: int, **kwargs: Any) -> DiNATS:
    depths = (2, 2, depth, 2)
    dilations = tuple(
        tuple(d if j % 2 else 1 for j in range(blocks)) for blocks, d in zip(depths, (8, 4, 2, 1), strict=True)
    )
    return build_model_with_cfg(
        DiNATS,
        variant,
        pretrained,
        pretrained_filter_fn=official,
        feature_cfg={"out_indices": (0, 1, 2, 3), "feature_cls": "getter"},
        **{"depths": depths, "dilations": dilations, **kwargs},
    )


def _cfg(file: str, **more: Any) -> dict[str, Any]:
    origin = "https://github.com/SHI-Labs/Neighborhood-Attention-Transformer"
    url = f"https://shi-labs.com/projects/dinat/checkpoints/{file}.pth"
    return cfg("mit", "arXiv:2209.15001", origin, "patch_embed.proj", url, **more)


default_cfgs = generate_default_cfgs(
    {
        "dinat_s_tiny.in1k": _cfg("imagenet1k/dinat_s_tiny_in1k_224"),
        "dinat_s_small.in1k": _cfg("imagenet1k/dinat_s_small_in1k_224"),
        "dinat_s_base.in1k": _cfg("imagenet1k/dinat_s_base_in1k_224"),
        "dinat_s_large.in22k_ft_in1k": _cfg("imagenet1k/dinat_s_large_in1k_224"),
        "dinat_s_large.in22k": _cfg("imagenet22k/dinat_s_large_in22k_224", num_classes=21841),
    }
)


@register_model
def dinat_s_tiny(pretrained: bool = False, **kwargs: Any) -> DiNATS:
    """DiNAT_s-Tiny, 28 M parameters."""
    return _dinat_s("dinat_s_tiny", pretrained, 6, **kwargs)


@register_model
def dinat_s_small(pretrained: bool = False, **kwargs: Any) -> DiNATS:
    """DiNAT_s-Small, 50 M parameters."""
    return _dinat_s("dinat_s_small", pretrained, 18, **{"drop_path_rate": 0.3, **kwargs})


@register_model
def dinat_s_base(pretrained: bool = False, **kwargs: Any) -> DiNATS:
    """DiNAT_s-Base, 88 M parameters."""
    size = {"embed_dim": 128, "num_heads": (4, 8, 16, 32), "drop_path_rate": 0.5}
    return _dinat_s("dinat_s_base", pretrained, 18, **{**size, **kwargs})


@register_model
def dinat_s_large(pretrained: bool = False, **kwargs: Any) -> DiNATS:
    """DiNAT_s-Large, 197 M parameters."""
    size = {"embed_dim": 192, "num_heads": (6, 12, 24, 48), "drop_path_rate": 0.35}
    return _dinat_s("dinat_s_large", pretrained, 18, **{**size, **kwargs})
