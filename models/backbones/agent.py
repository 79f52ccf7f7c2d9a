"""Agent attention with its position biases, the layer that Agent-DeiT, Agent-Swin and Agent-PVT share.

Paper: "Agent Attention: On the Integration of Softmax and Linear Attention" (ECCV 2024),
https://arxiv.org/abs/2312.08874, sections 3.2 and 3.3. Written from the paper's equations.
"""

import math
from typing import Any

import torch
from timm.layers import trunc_normal_
from torch import nn

from visattn.models.backbones.functional import resize, through_agents
from visattn.models.backbones.pyramid import channels_of_head

# Side of the coarse bias maps that are resampled to the grid.
COARSE = 7


class AgentAttention(nn.Module):
    """Attention in two steps through a few agents: means of the queries over a coarse grid.

    The agents attend to all keys, then all queries attend to the agents' results:
    `softmax(s q a^T + B2) (softmax(s a k^T + B1) v)`, plus a depthwise convolution of the values. A class token is
    a query and a key but no part of agents and convolution. On another grid than `grid` the biases are resampled.

    Args:
        dim: Channels.
        num_heads: Heads.
        grid: Rows and columns that the biases are made for.
        agents: Number of agents, a square.
        class_token: Whether the first token is a class token.
        split: Whether queries have a projection of their own (`q` and `kv` instead of `qkv`).
        dd: Device and dtype of the weights.
    """

    an_bias: torch.Tensor
    na_bias: torch.Tensor
    ah_bias: torch.Tensor
    aw_bias: torch.Tensor
    ha_bias: torch.Tensor
    wa_bias: torch.Tensor

    def __init__(
        self,
        dim: int,
        num_heads: int,
        grid: tuple[int, int],
        agents: int,
        class_token: bool = False,
        split: bool = False,
        **dd: Any,
    ) -> None:
        super().__init__()
        self.side = math.isqrt(agents)
        if self.side**2 != agents:
            raise ValueError(f"agent_num {agents} must be a square, like 49: the agents are a grid of means")
        self.num_heads = num_heads
        self.head_dim = channels_of_head(dim, num_heads)
        self.prefix = 1 if class_token else 0
        shapes: dict[str, tuple[int, ...]] = {
            "an_bias": (num_heads, agents, COARSE, COARSE),
            "na_bias": (num_heads, agents, COARSE, COARSE),
            "ah_bias": (1, num_heads, agents, grid[0], 1),
            "aw_bias": (1, num_heads, agents, 1, grid[1]),
            "ha_bias": (1, num_heads, grid[0], 1, agents),
            "wa_bias": (1, num_heads, 1, grid[1], agents),
        }
        if class_token:
            shapes |= {"ac_bias": (1, num_heads, agents, 1), "ca_bias": (1, num_heads, 1, agents)}
        else:
            self.ac_bias = self.ca_bias = None
        for name, shape in shapes.items():
            bias = nn.Parameter(torch.empty(shape, **dd))
            trunc_normal_(bias, std=0.02)
            self.register_parameter(name, bias)
        self.q = self.kv = self.qkv = None
        if split:
            self.q = nn.Linear(dim, dim, **dd)
            self.kv = nn.Linear(dim, 2 * dim, **dd)
        else:
            self.qkv = nn.Linear(dim, 3 * dim, **dd)
        self.proj = nn.Linear(dim, dim, **dd)
        self.dwc = nn.Conv2d(dim, dim, 3, padding=1, groups=dim, **dd)

    def agent_bias(self, height: int, width: int) -> torch.Tensor:
        """Bias of every agent towards every key: [1, heads, agents, keys]."""
        axes = resize(self.ah_bias[0], height, 1) + resize(self.aw_bias[0], 1, width)
        bias = (resize(self.an_bias, height, width) + axes).flatten(2)[None]
        return bias if self.ac_bias is None else torch.cat([self.ac_bias, bias], dim=3)

    def query_bias(self, height: int, width: int) -> torch.Tensor:
        """Bias of every query towards every agent: [1, heads, queries, agents]."""
        rows = resize(self.ha_bias[0].permute(0, 3, 1, 2), height, 1)
        columns = resize(self.wa_bias[0].permute(0, 3, 1, 2), 1, width)
        bias = (resize(self.na_bias, height, width) + rows + columns).flatten(2).transpose(1, 2)[None]
        return bias if self.ca_bias is None else torch.cat([self.ca_bias, bias], dim=2)

    def forward(self, x: torch.Tensor, height: int, width: int) -> torch.Tensor:
        """Attention of tokens [B, (1 +) height * width, dim] on a grid."""
        batch, tokens, dim = x.shape
        if self.qkv is not None:
            q, k, v = self.qkv(x).chunk(3, dim=-1)
        else:
            assert self.q is not None and self.kv is not None
            q = self.q(x)
            k, v = self.kv(x).chunk(2, dim=-1)
        x = through_agents(
            self._heads(q),
            self._heads(k),
            self._heads(v),
            height,
            width,
            self.prefix,
            self.side,
            self.agent_bias(height, width),
            self.query_bias(height, width),
            self.dwc.weight,
            self.dwc.bias,
        )
        return self.proj(x.reshape(batch, tokens, dim))

    def _heads(self, x: torch.Tensor) -> torch.Tensor:
        return x.reshape(x.shape[0], x.shape[1], self.num_heads, self.head_dim)
