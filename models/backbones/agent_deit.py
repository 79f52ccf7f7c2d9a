"""Agent-DeiT: DeiT with agent attention in its first blocks.

Paper: "Agent Attention: On the Integration of Softmax and Linear Attention" (ECCV 2024),
https://arxiv.org/abs/2312.08874, section 4 and appendix. The official weights carry no licence; these models have
their names and take them.
"""

from typing import Any

import torch
from timm.layers import DropPath, Mlp, PatchEmbed, trunc_normal_
from timm.models import checkpoint, generate_default_cfgs, register_model
from timm.models._features import feature_take_indices  # timm exports it nowhere else
from torch import nn
from torch.nn import functional as F

from visattn.models.backbones.agent import AgentAttention
from visattn.models.backbones.factory import build, cfg
from visattn.models.backbones.flat import Flat
from visattn.models.backbones.functional import resize, unscripted
from visattn.models.backbones.pyramid import drop_paths, init_weights

__all__ = ["AgentDeit"]


class PlainAttention(nn.Module):
    """Softmax attention of all tokens."""

    def __init__(self, dim: int, num_heads: int, **dd: Any) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim, **dd)
        self.proj = nn.Linear(dim, dim, **dd)

    def forward(self, x: torch.Tensor, height: int, width: int) -> torch.Tensor:
        """Attention of tokens [B, S, dim]; the grid does not matter."""
        batch, tokens, dim = x.shape
        qkv = self.qkv(x).reshape(batch, tokens, 3, self.num_heads, dim // self.num_heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        x = F.scaled_dot_product_attention(q, k, v)
        return self.proj(x.transpose(1, 2).reshape(batch, tokens, dim))


class Block(nn.Module):
    """Attention and an MLP, each behind a norm."""

    def __init__(self, dim: int, attn: nn.Module, mlp_ratio: float, drop_path: float, **dd: Any) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6, **dd)
        self.attn = attn
        self.norm2 = nn.LayerNorm(dim, eps=1e-6, **dd)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), **dd)
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def forward(self, x: torch.Tensor, height: int, width: int) -> torch.Tensor:
        """Tokens [B, S, dim] of a grid to the same shape."""
        x = x + self.drop_path(self.attn(self.norm1(x), height, width))
        return x + self.drop_path(self.mlp(self.norm2(x)))


class AgentDeit(Flat):
    """Agent-DeiT.

    Any image of whole patches works: position embedding and agent biases are resampled.

    Args:
        img_size: Side of the images that positions and biases are made for.
        patch_size: Side of a patch.
        in_chans: Channels of the image.
        num_classes: Classes of the head, 0 for none.
        global_pool: "token" for the class token, "avg" for the mean of the patches, "" for all tokens.
        embed_dim: Channels.
        depth: Blocks.
        num_heads: Heads.
        mlp_ratio: Hidden channels of the MLP over channels.
        agent_num: Agents of each pair of blocks (the last number also serves the pairs after it), or one number.
        agent_layer: How many of the first blocks have agents, all if None.
        drop_path_rate: Chance to skip the last block in training; earlier blocks have less.
        drop_rate: Dropout before the head.
        device: Where the weights are made.
        dtype: Of the weights.
    """

    pools = ("token", "avg", "")

    output_fmt = "NLC"
    num_prefix_tokens = 1

    def __init__(
        self,
        img_size: int = 224,
        patch_size: int = 16,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "token",
        embed_dim: int = 192,
        depth: int = 12,
        num_heads: int = 3,
        mlp_ratio: float = 4.0,
        agent_num: int | tuple[int, ...] = 49,
        agent_layer: int | None = None,
        drop_path_rate: float = 0.0,
        drop_rate: float = 0.0,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.in_chans = in_chans
        self.num_classes = num_classes
        self.global_pool = self.known_pool(global_pool)
        self.num_features = self.head_hidden_size = self.embed_dim = embed_dim
        self.grad_checkpointing = False
        self.patch_embed = PatchEmbed(
            img_size, patch_size, in_chans, embed_dim, strict_img_size=False, output_fmt="NHWC", **dd
        )
        self.grid: tuple[int, int] = self.patch_embed.grid_size
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim, **dd))
        self.pos_embed = nn.Parameter(torch.empty(1, 1 + self.grid[0] * self.grid[1], embed_dim, **dd))
        numbers = (agent_num,) if isinstance(agent_num, int) else tuple(agent_num)
        self.blocks = nn.ModuleList()
        for i, rate in enumerate(drop_paths(drop_path_rate, (depth,))[0]):
            if agent_layer is None or i < agent_layer:
                agents = numbers[min(i // 2, len(numbers) - 1)]
                attn = AgentAttention(embed_dim, num_heads, self.grid, agents, class_token=True, **dd)
            else:
                attn = PlainAttention(embed_dim, num_heads, **dd)
            self.blocks.append(Block(embed_dim, attn, mlp_ratio, rate, **dd))
        self.feature_info = [
            {"num_chs": embed_dim, "reduction": patch_size, "module": f"blocks.{i}"} for i in range(depth)
        ]
        self.norm = nn.LayerNorm(embed_dim, eps=1e-6, **dd)
        self.head_drop = nn.Dropout(drop_rate)
        self.head = nn.Linear(embed_dim, num_classes, **dd) if num_classes > 0 else nn.Identity()
        trunc_normal_(self.pos_embed, std=0.02)
        trunc_normal_(self.cls_token, std=0.02)
        self.apply(init_weights)

    def embed(self, x: torch.Tensor) -> tuple[torch.Tensor, int, int]:
        """Image [B, C, H, W] to tokens with positions [B, 1 + patches, dim], and the grid."""
        x = self.patch_embed(x)
        batch, height, width, dim = x.shape
        places = self.pos_embed[:, 1:].transpose(1, 2).reshape(1, dim, self.grid[0], self.grid[1])
        places = resize(places, height, width).flatten(2).transpose(1, 2)
        token = (self.cls_token + self.pos_embed[:, :1]).expand(batch, -1, -1)
        return torch.cat([token, x.flatten(1, 2) + places], dim=1), height, width

    def forward_features(self, x: torch.Tensor) -> torch.Tensor:
        """Image [B, C, H, W] to normed tokens [B, 1 + patches, dim]."""
        x, height, width = self.embed(x)
        for block in self.blocks:
            if self.grad_checkpointing and not torch.jit.is_scripting():
                x = checkpoint(block, x, height, width)
            else:
                x = block(x, height, width)
        return self.norm(x)

    def forward_head(self, x: torch.Tensor, pre_logits: bool = False) -> torch.Tensor:
        """Tokens to logits [B, num_classes], or to the pooled features with `pre_logits`."""
        if self.global_pool == "token":
            x = x[:, 0]
        elif self.global_pool == "avg":
            x = x[:, 1:].mean(dim=1)
        x = self.head_drop(x)
        return x if pre_logits else self.head(x)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Image [B, C, H, W] to logits [B, num_classes]."""
        return self.forward_head(self.forward_features(x))

    @unscripted
    def forward_intermediates(
        self,
        x: torch.Tensor,
        indices: int | list[int] | None = None,
        return_prefix_tokens: bool = False,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> Any:
        """Outputs of several blocks, and the features.

        Args:
            x: Images [B, C, H, W].
            indices: Blocks to take: the last n for a number n, all for None.
            return_prefix_tokens: Whether each output comes with its class token.
            norm: Whether outputs pass the last norm.
            stop_early: Whether blocks after the last one taken are skipped.
            output_fmt: "NCHW" or "NLC".
            intermediates_only: Whether only the outputs are returned.

        Raises:
            ValueError: If `output_fmt` is neither.
        """
        self.known_format(output_fmt)
        wanted, last = feature_take_indices(len(self.blocks), indices)
        x, height, width = self.embed(x)
        found = []
        for i, block in enumerate(self.blocks[: last + 1] if stop_early else self.blocks):
            x = checkpoint(block, x, height, width) if self.grad_checkpointing else block(x, height, width)
            if i in wanted:
                found.append(self.norm(x) if norm else x)
        maps: list[Any] = [y[:, 1:] for y in found]
        if output_fmt == "NCHW":
            maps = [y.transpose(1, 2).reshape(len(y), -1, height, width).contiguous() for y in maps]
        if return_prefix_tokens:
            maps = [(y, whole[:, :1]) for y, whole in zip(maps, found, strict=True)]
        return maps if intermediates_only else (self.norm(x), maps)

    @unscripted
    def no_weight_decay(self) -> set[str]:
        """Parameters that should not decay: positions, the class token and the agent biases."""
        biases = {n for n, p in self.named_parameters() if n.endswith("_bias") and p.ndim > 1}
        return {"pos_embed", "cls_token", *biases}

    @unscripted
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Parameters by depth, for layer-wise learning rates."""
        blocks = [(r"^blocks\.(\d+)", None), (r"^norm", (99999,))]
        return {"stem": r"^cls_token|pos_embed|patch_embed", "blocks": r"^blocks\.(\d+)" if coarse else blocks}


def _cfg() -> dict[str, Any]:
    origin = "https://github.com/LeapLabTHU/Agent-Attention"
    return cfg("", "arXiv:2312.08874", origin, "patch_embed.proj", pool_size=None)


default_cfgs = generate_default_cfgs({f"agent_deit_{size}.in1k": _cfg() for size in ("tiny", "small", "base")})


# The last three blocks are the features that timm's `features_only` gives.
_DEFAULTS: dict[str, Any] = {"drop_path_rate": 0.1, "out_indices": 3}


@register_model
def agent_deit_tiny(pretrained: bool = False, **kwargs: Any) -> AgentDeit:
    """Agent-DeiT-T, 6.0 M parameters."""
    return build(AgentDeit, "agent_deit_tiny", pretrained, **{**_DEFAULTS, **kwargs})


@register_model
def agent_deit_small(pretrained: bool = False, **kwargs: Any) -> AgentDeit:
    """Agent-DeiT-S, 22.7 M parameters."""
    size = {"embed_dim": 384, "num_heads": 6}
    return build(AgentDeit, "agent_deit_small", pretrained, **{**_DEFAULTS, **size, **kwargs})


@register_model
def agent_deit_base(pretrained: bool = False, **kwargs: Any) -> AgentDeit:
    """Agent-DeiT-B, 87.2 M parameters: agents in the first four blocks."""
    size = {"embed_dim": 768, "num_heads": 12, "agent_num": 81, "agent_layer": 4}
    return build(AgentDeit, "agent_deit_base", pretrained, **{**_DEFAULTS, **size, **kwargs})
