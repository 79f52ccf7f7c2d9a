"""Agent-Swin: Swin's layout with agent attention over the whole map in its first blocks, windows in the rest.

Paper: "Agent Attention: On the Integration of Softmax and Linear Attention" (ECCV 2024),
https://arxiv.org/abs/2312.08874, section 4 and appendix. The official weights carry no licence; these models have
their names and take them.
"""

# Stages are attributes with computed names (the official keys): a type checker knows only "Tensor or Module" of them.
# pyright: reportCallIssue=false, reportArgumentType=false, reportAssignmentType=false

from typing import Any

import torch
from timm.layers import DropPath, Mlp, trunc_normal_
from timm.models import generate_default_cfgs, register_model
from timm.models.swin_transformer import PatchMerging, get_relative_position_index
from torch import nn
from torch.nn import functional as F

from visattn.models.backbones.agent import AgentAttention
from visattn.models.backbones.dinat_s import PatchEmbed
from visattn.models.backbones.factory import build, cfg
from visattn.models.backbones.functional import pad_multiple, shift_mask, window_mask
from visattn.models.backbones.leveled import LeveledPyramid
from visattn.models.backbones.pyramid import drop_paths
from visattn.models.backbones.stages import Blocks, Level, Levels

__all__ = ["AgentSwin"]


class WindowAttention(nn.Module):
    """Softmax attention inside windows, with Swin's relative position bias."""

    relative_position_index: torch.Tensor

    def __init__(self, dim: int, num_heads: int, window: int, **dd: Any) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.window = window
        self.relative_position_bias_table = nn.Parameter(torch.empty((2 * window - 1) ** 2, num_heads, **dd))
        # Part of the official files, so it is kept in the state dict.
        self.register_buffer("relative_position_index", get_relative_position_index(window, window, dd.get("device")))
        self.qkv = nn.Linear(dim, 3 * dim, **dd)
        self.proj = nn.Linear(dim, dim, **dd)
        trunc_normal_(self.relative_position_bias_table, std=0.02)

    def forward(self, x: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        """Attention of windows [B * windows, window**2, dim] under a mask [windows, window**2, window**2]."""
        count, tokens, dim = x.shape
        qkv = self.qkv(x).reshape(count, tokens, 3, self.num_heads, dim // self.num_heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        bias = self.relative_position_bias_table[self.relative_position_index.flatten()]
        bias = bias.reshape(1, tokens, tokens, self.num_heads).permute(0, 3, 1, 2)
        if mask is not None:
            windows = mask.shape[0]
            bias = (bias + mask[:, None]).unsqueeze(0).expand(count // windows, -1, -1, -1, -1)
            bias = bias.reshape(count, self.num_heads, tokens, tokens)
        x = F.scaled_dot_product_attention(q, k, v, attn_mask=bias.to(q.dtype))
        return self.proj(x.transpose(1, 2).reshape(count, tokens, dim))


class AgentBlock(nn.Module):
    """Agent attention over the whole map and an MLP, each behind a norm.

    Args:
        dim: Channels.
        num_heads: Heads.
        side: Side of the map that the biases are made for.
        agents: Number of agents.
        drop_path: Chance to skip the block in training.
        dd: Device and dtype of the weights.
    """

    def __init__(self, dim: int, num_heads: int, side: int, agents: int, drop_path: float, **dd: Any) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, **dd)
        self.attn = AgentAttention(dim, num_heads, (side, side), agents, **dd)
        self.norm2 = nn.LayerNorm(dim, **dd)
        self.mlp = Mlp(dim, 4 * dim, **dd)
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map [B, H, W, dim] to the same shape."""
        batch, height, width, dim = x.shape
        y = self.attn(self.norm1(x).reshape(batch, height * width, dim), height, width)
        x = x + self.drop_path(y.reshape(batch, height, width, dim))
        return x + self.drop_path(self.mlp(self.norm2(x)))


class WindowBlock(nn.Module):
    """Window attention and an MLP, each behind a norm.

    Args:
        dim: Channels.
        num_heads: Heads.
        side: Side of the map that the mask is made for.
        window: Side of a window.
        shifted: Whether the windows are shifted by half a window (never where one window is the whole map).
        drop_path: Chance to skip the block in training.
        dd: Device and dtype of the weights.
    """

    def __init__(
        self, dim: int, num_heads: int, side: int, window: int, shifted: bool, drop_path: float, **dd: Any
    ) -> None:
        super().__init__()
        self.window = min(window, side)
        self.shift = self.window // 2 if shifted and side > window else 0
        self.side = -(-side // self.window) * self.window
        mask = None
        if self.shift:
            mask = shift_mask(torch.empty(0, **dd), self.side, self.side, self.window, self.shift)
        # Part of the official files, so it is kept in the state dict.
        self.register_buffer("attn_mask", mask)
        self.norm1 = nn.LayerNorm(dim, **dd)
        self.attn = WindowAttention(dim, num_heads, self.window, **dd)
        self.norm2 = nn.LayerNorm(dim, **dd)
        self.mlp = Mlp(dim, 4 * dim, **dd)
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map [B, H, W, dim] to the same shape."""
        x = x + self.drop_path(self.windows(self.norm1(x)))
        return x + self.drop_path(self.mlp(self.norm2(x)))

    def windows(self, x: torch.Tensor) -> torch.Tensor:
        """Attention of a map [B, H, W, dim], padded with zeros to whole windows."""
        _, height, width, dim = x.shape
        side, shift = self.window, self.shift
        if shift:
            x = torch.roll(x, shifts=(-shift, -shift), dims=(1, 2))
        x = pad_multiple(x, side)
        batch, rows, columns, _ = x.shape
        mask: torch.Tensor | None = None
        if self.attn_mask is not None:
            mask = window_mask(x, self.attn_mask, self.side, rows, columns, side, shift)
        x = x.reshape(batch, rows // side, side, columns // side, side, dim).transpose(2, 3)
        x = self.attn(x.reshape(-1, side * side, dim), mask)
        x = x.reshape(batch, rows // side, columns // side, side, side, dim).transpose(2, 3)
        x = x.reshape(batch, rows, columns, dim)[:, :height, :width]
        return torch.roll(x, shifts=(shift, shift), dims=(1, 2)) if shift else x


class AgentSwin(LeveledPyramid):
    """Agent-Swin.

    Any image works: agents and agent biases are resampled, maps are padded to whole windows, and masks follow.

    Args:
        img_size: Side of the images that biases and masks are made for.
        embed_dim: Channels of the first stage; they double at each stage.
        depths: Blocks per stage.
        num_heads: Heads per stage.
        window_size: Side of the map of the first stage; plain windows have an eighth of it, at least 7.
        agent_num: Agents per stage.
        attn_type: A letter per stage: A for agents, B for windows; M for agents in as many of its first blocks as
            the number at the end says and windows after, like "AAMB2".
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
        img_size: int = 224,
        embed_dim: int = 96,
        depths: tuple[int, ...] = (2, 2, 6, 2),
        num_heads: tuple[int, ...] = (3, 6, 12, 24),
        window_size: int = 56,
        agent_num: tuple[int, ...] = (9, 16, 49, 49),
        attn_type: str = "AAAB",
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
        counts = agent_blocks(attn_type, depths)
        self.patch_embed = PatchEmbed(in_chans, embed_dim, **dd)
        self.layers = Levels()
        side = -(-img_size // 4)
        for i, rates in enumerate(drop_paths(drop_path_rate, depths)):
            window = max(7, window_size // 8)
            blocks = (
                AgentBlock(dims[i], num_heads[i], side, agent_num[i], rate, **dd)
                if j < counts[i]
                else WindowBlock(dims[i], num_heads[i], side, window, j % 2 == 1, rate, **dd)
                for j, rate in enumerate(rates)
            )
            last = i == len(dims) - 1
            self.layers.append(Level(Blocks(*blocks), nn.Identity() if last else PatchMerging(dims[i], **dd)))
            side = -(-side // 2)
        modules = tuple(f"layers.{i}.blocks" for i in range(len(dims)))
        norm = nn.LayerNorm(dims[-1], **dd)
        self._finish(dims, modules, num_classes, in_chans, global_pool, drop_rate, norm, **dd)


def agent_blocks(attn_type: str, depths: tuple[int, ...]) -> list[int]:
    """How many of the first blocks of each stage have agents, from text like "AAAB" or "AAMB2".

    Raises:
        ValueError: If the text does not fit the stages.
    """
    letters, number = attn_type[: len(depths)], attn_type[len(depths) :]
    mixed = "M" in letters
    if len(letters) != len(depths) or set(letters) - set("ABM") or number.isdigit() != mixed:
        raise ValueError(
            f"attn_type {attn_type!r} must have a letter A, B or M for each of the {len(depths)} stages, and where "
            "there is an M the number of its agent blocks at the end, like 'AAAB' or 'AAMB2'"
        )
    return [
        {"A": depth, "B": 0, "M": int(number) if mixed else 0}[letter]
        for letter, depth in zip(letters, depths, strict=True)
    ]


def _cfg() -> dict[str, Any]:
    return cfg("", "arXiv:2312.08874", "https://github.com/LeapLabTHU/Agent-Attention", "patch_embed.proj")


default_cfgs = generate_default_cfgs({f"agent_swin_{size}.in1k": _cfg() for size in ("tiny", "small", "base")})


@register_model
def agent_swin_tiny(pretrained: bool = False, **kwargs: Any) -> AgentSwin:
    """Agent-Swin-T, 28.9 M parameters."""
    return build(AgentSwin, "agent_swin_tiny", pretrained, **kwargs)


@register_model
def agent_swin_small(pretrained: bool = False, **kwargs: Any) -> AgentSwin:
    """Agent-Swin-S, 50 M parameters."""
    size = {"depths": (2, 2, 18, 2), "attn_type": "AABB", "drop_path_rate": 0.3}
    return build(AgentSwin, "agent_swin_small", pretrained, **{**size, **kwargs})


@register_model
def agent_swin_base(pretrained: bool = False, **kwargs: Any) -> AgentSwin:
    """Agent-Swin-B, 88 M parameters: agents also in the first two blocks of the third stage."""
    size = {
        "embed_dim": 128,
        "depths": (2, 2, 18, 2),
        "num_heads": (4, 8, 16, 32),
        "attn_type": "AAMB2",
        "drop_path_rate": 0.5,
    }
    return build(AgentSwin, "agent_swin_base", pretrained, **{**size, **kwargs})
