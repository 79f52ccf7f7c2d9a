"""DiNAT_s: Swin's layout (patches of 4, patch merging) with dilated neighborhood attention in its blocks.

Paper: "Dilated Neighborhood Attention Transformer", https://arxiv.org/abs/2209.15001, section 4.
Official code and weights: https://github.com/SHI-Labs/Neighborhood-Attention-Transformer (MIT).
"""

from typing import TYPE_CHECKING, Any

import torch
from timm.models import generate_default_cfgs, register_model
from timm.models.swin_transformer import PatchMerging
from torch import nn

from visattn.models.backbones.factory import build, cfg
from visattn.models.backbones.functional import pad_multiple
from visattn.models.backbones.nat import NAT, alternating
from visattn.models.backbones.stages import Levels

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


class DiNATS(NAT):
    """DiNAT_s: the blocks and arguments of `NAT` between Swin's patch embedding and merging."""

    stages_name = "layers"
    if TYPE_CHECKING:  # as in `NAT`
        layers: Levels

    def __init__(
        self,
        embed_dim: int = 96,
        depths: tuple[int, ...] = (2, 2, 6, 2),
        num_heads: tuple[int, ...] = (3, 6, 12, 24),
        mlp_ratio: float = 4.0,
        **kwargs: Any,
    ) -> None:
        super().__init__(embed_dim, depths, num_heads, mlp_ratio, **kwargs)

    def _stem(self, in_chans: int, dim: int, **dd: Any) -> nn.Module:
        return PatchEmbed(in_chans, dim, **dd)

    def _step(self, dim: int, **dd: Any) -> nn.Module:
        return PatchMerging(dim, **dd)

    def forward_stages(self, x: torch.Tensor, take: list[int]) -> list[torch.Tensor]:
        """See `Pyramid.forward_stages`."""
        return self.layers(self.patch_embed(x), take)


def _dinat_s(variant: str, pretrained: bool, depth: int, **kwargs: Any) -> DiNATS:
    depths = (2, 2, depth, 2)
    return build(DiNATS, variant, pretrained, **{"depths": depths, "dilations": alternating(depths), **kwargs})


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
