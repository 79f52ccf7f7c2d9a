"""Flowformer for vision: a pyramid whose every block has Flow-Attention.

Paper: "Flowformer: Linearizing Transformers with Conservation Flows" (ICML 2022), https://arxiv.org/abs/2202.06258,
section 4.2. Official code: https://github.com/thuml/Flowformer (MIT), folder Flowformer_CV, which links no weights.
"""

import itertools
from typing import Any

import torch
from timm.layers import DropPath, Mlp, trunc_normal_
from timm.models import generate_default_cfgs, register_model
from torch import nn

from visattn.models.backbones.factory import build, cfg
from visattn.models.backbones.functional import flow, unscripted
from visattn.models.backbones.patches import Patches, Place
from visattn.models.backbones.pyramid import Pyramid, channels_of_head, drop_paths
from visattn.models.backbones.stages import Blocks

__all__ = ["Flowformer"]


class FlowAttention(nn.Module):
    """Multi-head Flow-Attention: linear in the tokens, without a scale of products."""

    def __init__(self, dim: int, num_heads: int, **dd: Any) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.head_dim = channels_of_head(dim, num_heads)
        self.qkv = nn.Linear(dim, 3 * dim, **dd)
        self.proj = nn.Linear(dim, dim, **dd)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Attention of a map [B, H, W, dim]."""
        batch, height, width, dim = x.shape
        q, k, v = self.qkv(x).reshape(batch, height * width, 3, self.num_heads, self.head_dim).unbind(2)
        return self.proj(flow(q, k, v).reshape(batch, height, width, dim))


class Block(nn.Module):
    """Flow-Attention and an MLP, each behind a norm; only the MLP is scaled per channel."""

    def __init__(
        self, dim: int, num_heads: int, mlp_ratio: float, drop: float, drop_path: float, scale: float, **dd: Any
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6, **dd)
        self.attn = FlowAttention(dim, num_heads, **dd)
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()
        self.norm2 = nn.LayerNorm(dim, eps=1e-6, **dd)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), drop=drop, **dd)
        self.gamma = nn.Parameter(torch.full((dim,), scale, **dd))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map [B, H, W, dim] to the same shape."""
        x = x + self.drop_path(self.attn(self.norm1(x)))
        return x + self.drop_path(self.gamma * self.mlp(self.norm2(x)))


class Flowformer(Pyramid):
    """Flowformer for vision.

    Any image works: the position embedding is resampled.

    Args:
        img_size: Side of the images that the positions are made for.
        patch_size: Side of a patch of the first stage.
        embed_dim: Channels per stage.
        depth: Blocks per stage.
        num_heads: Heads of every stage.
        mlp_ratio: Hidden channels of the MLP over channels, per stage.
        init_values: First value of the per-channel factors on the MLP.
        drop_path_rate: Chance to skip the last block in training; earlier blocks have less.
        proj_drop_rate: Dropout in the MLP.
        in_chans: Channels of the image.
        num_classes: Classes of the head, 0 for none.
        global_pool: "avg", "max", "avgmax", "catavgmax", or "" for none.
        drop_rate: Dropout before the head.
        device: Where the weights are made.
        dtype: Of the weights.

    Raises:
        ValueError: If the heads do not divide the channels of a stage.
    """

    def __init__(
        self,
        img_size: int = 224,
        patch_size: int = 4,
        embed_dim: tuple[int, ...] = (96, 192, 384, 768),
        depth: tuple[int, ...] = (3, 3, 10, 3),
        num_heads: int = 12,
        mlp_ratio: tuple[float, ...] = (4, 4, 4, 4),
        init_values: float = 1e-5,
        drop_path_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
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
        self.side = img_size // patch_size
        self.pos_embed = nn.Parameter(torch.empty(1, self.side**2, dims[0], **dd))
        trunc_normal_(self.pos_embed, std=0.02)
        self.place = Place()
        steps = [Patches(in_chans, dims[0], patch_size, norm=False, **dd)]
        steps += [Patches(a, b, 2, norm=False, **dd) for a, b in itertools.pairwise(dims)]
        self.patch_embed = nn.ModuleList(steps)
        self.blocks = nn.ModuleList()
        for i, rates in enumerate(drop_paths(drop_path_rate, depth)):
            args = (dims[i], num_heads, mlp_ratio[i], proj_drop_rate)
            self.blocks.append(Blocks(*(Block(*args, rate, init_values, **dd) for rate in rates)))
        modules = tuple(f"blocks.{i}" for i in range(len(dims)))
        norm = nn.LayerNorm(dims[-1], eps=1e-6, **dd)
        self._finish(dims, modules, num_classes, in_chans, global_pool, drop_rate, norm, **dd)

    def forward_stages(self, x: torch.Tensor, take: list[int]) -> list[torch.Tensor]:
        """See `Pyramid.forward_stages`."""
        maps: list[torch.Tensor] = []
        x = x.permute(0, 2, 3, 1)
        for i, (step, blocks) in enumerate(zip(self.patch_embed, self.blocks)):  # noqa: B905, TorchScript
            if i <= take[-1]:
                x = step(x)
                if i == 0:
                    x = self.place(x, self.pos_embed, self.side)
                x = blocks(x)
                if i in take:
                    maps.append(x)
        return maps

    def keep_stages(self, count: int) -> None:
        """See `Pyramid.keep_stages`."""
        self.patch_embed = self.patch_embed[:count]
        self.blocks = self.blocks[:count]

    @unscripted
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Parameters by depth, for layer-wise learning rates."""
        fine = [(r"^patch_embed\.(\d+)", (0,)), (r"^blocks\.(\d+)\.(\d+)", None), (r"^norm", (99999,))]
        return {
            "stem": r"^pos_embed|^patch_embed\.0",
            "blocks": r"^(?:blocks|patch_embed)\.(\d+)" if coarse else fine,
        }


def _cfg() -> dict[str, Any]:
    return cfg("mit", "arXiv:2202.06258", "https://github.com/thuml/Flowformer", "patch_embed.0.proj", crop_pct=0.9)


default_cfgs = generate_default_cfgs({f"flowformer_{size}.in1k": _cfg() for size in ("tiny", "small")})


@register_model
def flowformer_tiny(pretrained: bool = False, **kwargs: Any) -> Flowformer:
    """The 19 blocks of the paper, 43.3 M parameters."""
    return build(Flowformer, "flowformer_tiny", pretrained, **{"drop_path_rate": 0.2, **kwargs})


@register_model
def flowformer_small(pretrained: bool = False, **kwargs: Any) -> Flowformer:
    """The depths that are the default of the official code, 49.8 M parameters."""
    return build(Flowformer, "flowformer_small", pretrained, **{"depth": (2, 2, 10, 4), **kwargs})
