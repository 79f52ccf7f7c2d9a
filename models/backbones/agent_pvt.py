"""Agent-PVT: PVT's layout without class token and spatial reduction, with agent attention in every block.

Paper: "Agent Attention: On the Integration of Softmax and Linear Attention" (ECCV 2024),
https://arxiv.org/abs/2312.08874, section 4 and appendix; PVT: https://arxiv.org/abs/2102.12122. The official
weights carry no licence; these models have their names and take them.
"""

# Stages are attributes with computed names (the official keys): a type checker knows only "Tensor or Module" of them.
# pyright: reportCallIssue=false, reportArgumentType=false, reportAssignmentType=false

from typing import Any

import torch
from timm.layers import DropPath, Mlp, trunc_normal_
from timm.models import generate_default_cfgs, register_model
from torch import nn

from visattn.models.backbones.agent import AgentAttention
from visattn.models.backbones.factory import build, cfg
from visattn.models.backbones.numbered import NumberedPyramid
from visattn.models.backbones.patches import Patches, Place
from visattn.models.backbones.pyramid import drop_paths
from visattn.models.backbones.stages import Blocks

__all__ = ["AgentPVT"]


class Block(nn.Module):
    """Agent attention and an MLP, each behind a norm."""

    def __init__(
        self, dim: int, num_heads: int, side: int, agents: int, mlp_ratio: float, drop_path: float, **dd: Any
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6, **dd)
        self.attn = AgentAttention(dim, num_heads, (side, side), agents, split=True, **dd)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6, **dd)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), **dd)
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map [B, H, W, dim] to the same shape."""
        batch, height, width, dim = x.shape
        x = x.reshape(batch, height * width, dim)
        x = x + self.drop_path(self.attn(self.norm1(x), height, width))
        x = x + self.drop_path(self.mlp(self.norm2(x)))
        return x.reshape(batch, height, width, dim)


class AgentPVT(NumberedPyramid):
    """Agent-PVT.

    Any image works: position embeddings and agent biases are resampled.

    Args:
        img_size: Side of the images that positions and biases are made for.
        embed_dims: Channels per stage.
        num_heads: Heads per stage.
        mlp_ratios: Hidden channels of the MLP over channels, per stage.
        depths: Blocks per stage.
        agent_num: Agents per stage.
        drop_path_rate: Chance to skip the last block in training; earlier blocks have less.
        in_chans: Channels of the image.
        num_classes: Classes of the head, 0 for none.
        global_pool: "avg", "max", "avgmax", "catavgmax", or "" for none.
        drop_rate: Dropout before the head.
        device: Where the weights are made.
        dtype: Of the weights.
    """

    parts = ("patch_embed", "pos_embed", "block")

    def __init__(
        self,
        img_size: int = 224,
        embed_dims: tuple[int, ...] = (64, 128, 320, 512),
        num_heads: tuple[int, ...] = (1, 2, 5, 8),
        mlp_ratios: tuple[float, ...] = (8, 8, 4, 4),
        depths: tuple[int, ...] = (2, 2, 2, 2),
        agent_num: tuple[int, ...] = (9, 16, 49, 49),
        drop_path_rate: float = 0.1,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.sides = [max(1, img_size // (4 * 2**i)) for i in range(len(depths))]
        self.place = Place()
        channels = in_chans
        for i, rates in enumerate(drop_paths(drop_path_rate, depths)):
            dim, side = embed_dims[i], self.sides[i]
            position = nn.Parameter(torch.empty(1, side * side, dim, **dd))
            trunc_normal_(position, std=0.02)
            blocks = (Block(dim, num_heads[i], side, agent_num[i], mlp_ratios[i], rate, **dd) for rate in rates)
            self.add_module(f"patch_embed{i + 1}", Patches(channels, dim, 2 if i else 4, norm=True, **dd))
            self.register_parameter(f"pos_embed{i + 1}", position)
            self.add_module(f"block{i + 1}", Blocks(*blocks))
            channels = dim
        modules = tuple(f"block{i + 1}" for i in range(len(depths)))
        norm = nn.Identity()
        self._finish(tuple(embed_dims), modules, num_classes, in_chans, global_pool, drop_rate, norm, **dd)

    def stage1(self, x: torch.Tensor) -> torch.Tensor:
        """See `NumberedPyramid.stage1`."""
        return self.block1(self.place(self.patch_embed1(x), self.pos_embed1, self.sides[0]))

    def stage2(self, x: torch.Tensor) -> torch.Tensor:
        """See `NumberedPyramid.stage2`."""
        return self.block2(self.place(self.patch_embed2(x), self.pos_embed2, self.sides[1]))

    def stage3(self, x: torch.Tensor) -> torch.Tensor:
        """See `NumberedPyramid.stage3`."""
        return self.block3(self.place(self.patch_embed3(x), self.pos_embed3, self.sides[2]))

    def stage4(self, x: torch.Tensor) -> torch.Tensor:
        """See `NumberedPyramid.stage4`."""
        return self.block4(self.place(self.patch_embed4(x), self.pos_embed4, self.sides[3]))


def _cfg() -> dict[str, Any]:
    return cfg("", "arXiv:2312.08874", "https://github.com/LeapLabTHU/Agent-Attention", "patch_embed1.proj")


default_cfgs = generate_default_cfgs(
    {f"agent_pvt_{size}.in1k": _cfg() for size in ("tiny", "small", "medium", "large")}
)


@register_model
def agent_pvt_tiny(pretrained: bool = False, **kwargs: Any) -> AgentPVT:
    """Agent-PVT-T, 11.6 M parameters."""
    return build(AgentPVT, "agent_pvt_tiny", pretrained, **kwargs)


@register_model
def agent_pvt_small(pretrained: bool = False, **kwargs: Any) -> AgentPVT:
    """Agent-PVT-S, 20.6 M parameters."""
    return build(AgentPVT, "agent_pvt_small", pretrained, **{"depths": (3, 4, 6, 3), **kwargs})


@register_model
def agent_pvt_medium(pretrained: bool = False, **kwargs: Any) -> AgentPVT:
    """Agent-PVT-M, 35.9 M parameters."""
    return build(AgentPVT, "agent_pvt_medium", pretrained, **{"depths": (3, 4, 18, 3), "drop_path_rate": 0.3, **kwargs})


@register_model
def agent_pvt_large(pretrained: bool = False, **kwargs: Any) -> AgentPVT:
    """Agent-PVT-L, 48.7 M parameters."""
    return build(AgentPVT, "agent_pvt_large", pretrained, **{"depths": (3, 8, 27, 3), "drop_path_rate": 0.3, **kwargs})
