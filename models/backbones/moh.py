"""Mixture-of-head attention: gates that weigh and leave out heads per token, and the softmax attention of MoH-ViT.

Paper: "MoH: Multi-Head Attention as Mixture-of-Head Attention" (2024), https://arxiv.org/abs/2410.11842, section 3;
the attention itself is TransNeXt's, https://arxiv.org/abs/2311.17132. Official code: https://github.com/SkyworkAI/MoH
(Apache 2.0); it computes every head and then masks, which `skip_heads=False` does here.
"""

import math
from typing import Any

import numpy as np
import torch
from timm.layers import trunc_normal_
from timm.models import register_notrace_module
from torch import nn
from torch.nn import functional as F

from visattn.keep import kept
from visattn.models.backbones.functional import unscripted
from visattn.models.backbones.pyramid import channels_of_head
from visattn.models.sizes import check_fixed

# From so many tokens on it pays to leave heads out. On one thread of a CPU the attention layer with 12 of 16 (8 of
# 28) routed heads took 1.3 (1.0) times as long at 256 tokens and 0.9 (0.6) times at 1024.
SKIP_FROM = 1024


def _axis(length: int, keys: int, pretrained: int) -> tuple[tuple[float, ...], tuple[tuple[int, ...], ...]]:
    """Distinct scaled distances from queries to pooled keys along an axis, and which one each pair has."""
    starts = np.arange(keys) * length // keys
    ends = -(-(np.arange(keys) + 1) * length // keys)
    centres = (starts + ends - 1) / 2
    distance = (np.arange(length)[:, None] - centres[None, :]) * 8 / max(pretrained - 1, 1)
    values, index = np.unique(distance.astype(np.float32), return_inverse=True)
    logs = np.sign(values) * np.log2(np.abs(values) + 1) / math.log2(8)
    return tuple(logs.tolist()), tuple(tuple(row.tolist()) for row in index.reshape(distance.shape))


# What `torch.compiler.assume_constant_result` does: how many distances are distinct is no size that a tracer knows.
_axis._dynamo_marked_constant = True


@kept
def _log_coordinates(
    grid: tuple[int, int], pool: tuple[int, int], pretrained: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """Distinct log distances [pairs, 2], and which one each query and key has [grid tokens, pooled tokens]."""
    (rows, rows_of), (columns, columns_of) = (_axis(n, p, pretrained) for n, p in zip(grid, pool, strict=True))
    row, column = np.array(rows_of), np.array(columns_of)
    table = np.stack(np.meshgrid(rows, columns, indexing="ij"), -1).reshape(-1, 2).astype(np.float32)
    index = row[:, None, :, None] * len(columns) + column[None, :, None, :]
    index = index.reshape(grid[0] * grid[1], pool[0] * pool[1])
    return torch.from_numpy(table).to(device), torch.from_numpy(index).to(device)


@unscripted
def log_coordinates(
    x: torch.Tensor, height: int, width: int, rows: int, columns: int, pretrained: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log distances from a grid to its pooled grid, on x's device; see `_log_coordinates`."""
    check_fixed((height, width))
    # While torch.jit.trace records, sizes are tensors.
    return _log_coordinates((int(height), int(width)), (int(rows), int(columns)), pretrained, x.device)


@register_notrace_module  # reason: the value is kept outside the graph
class LoadBalance(nn.Module):
    """Keeps the load-balancing loss of the last forward in training (section 3.4)."""

    def __init__(self) -> None:
        super().__init__()
        self.loss: torch.Tensor | None = None

    @unscripted
    def keep(self, gates: torch.Tensor, used: torch.Tensor) -> None:
        """Compute it from gates and their use, both [B, N, routed heads]."""
        share = gates.flatten(0, 1).mean(0) * used.to(gates.dtype).flatten(0, 1).mean(0)
        self.loss = share.mean() * gates.shape[-1] ** 2

    def forward(self, gates: torch.Tensor, used: torch.Tensor) -> None:
        """See `keep`; nothing outside training."""
        if self.training and not torch.jit.is_scripting():
            self.keep(gates, used)


class HeadGates(nn.Module):
    """What both attentions of MoH-ViT share: gates, the position bias, the query's scaling.

    Args:
        dim: Channels.
        num_heads: Heads.
        shared: The first so many heads are used by every token.
        routed: How many of the other heads a token uses.
        pretrained: Side of the map that distances are scaled to.
        dd: Device and dtype of the weights.
    """

    def __init__(self, dim: int, num_heads: int, shared: int, routed: int, pretrained: int, **dd: Any) -> None:
        super().__init__()
        if not (0 <= shared <= num_heads and 0 <= routed <= num_heads - shared) or (not routed and shared < num_heads):
            raise ValueError(
                f"{shared} shared and {routed} routed heads do not fit {num_heads} heads: without routed heads every "
                "head is shared, with them shared + routed is at most the number of heads"
            )
        self.num_heads, self.head_dim = num_heads, channels_of_head(dim, num_heads)
        self.shared, self.routed = shared, routed
        self.pretrained = pretrained
        # softplus of it starts at 1 / 0.24.
        self.temperature = nn.Parameter(torch.full((num_heads, 1, 1), math.log(math.exp(1 / 0.24) - 1), **dd))
        self.query_embedding = nn.Parameter(torch.empty(num_heads, 1, self.head_dim, **dd))
        trunc_normal_(self.query_embedding, std=0.02)
        self.cpb_fc1 = nn.Linear(2, 512, **dd)
        self.cpb_fc2 = nn.Linear(512, num_heads, **dd)
        self.balance = LoadBalance()
        self.wg = nn.Linear(dim, num_heads - shared, bias=False, **dd) if routed else None
        self.wg_0 = nn.Linear(dim, 2, bias=False, **dd) if routed and shared else None
        self.wg_1 = nn.Linear(dim, shared, bias=False, **dd) if shared > 1 else None

    def gates(self, x: torch.Tensor) -> torch.Tensor:
        """Factor of each head for each token x [B, N, dim]: [B, N, heads], 0 for heads that it does not use."""
        shared = x.new_ones(x.shape[0], x.shape[1], self.shared)
        if self.wg_1 is not None:
            shared = self.wg_1(x).softmax(-1) * self.shared
        if self.wg is None:
            return shared
        every = self.wg(x).softmax(-1)
        used = torch.zeros_like(every).scatter(-1, every.topk(self.routed, dim=-1)[1], 1.0)
        self.balance(every, used)
        routed = every * used
        # The sum is at least routed / all routed heads: the largest of a softmax.
        routed = routed / routed.sum(-1, keepdim=True) * self.routed
        if self.wg_0 is None:
            return routed
        both = self.wg_0(x).softmax(-1) * 2
        return torch.cat([shared * both[..., :1], routed * both[..., 1:]], dim=-1)

    def bias_table(
        self, x: torch.Tensor, height: int, width: int, rows: int, columns: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Position bias of each distinct distance [heads, distances], and the distance of each query and key."""
        table, index = log_coordinates(x, height, width, rows, columns, self.pretrained)
        table = self.cpb_fc2(F.relu(self.cpb_fc1(table.to(self.cpb_fc1.weight.dtype))))
        return table.transpose(0, 1).contiguous(), index

    def bias(self, x: torch.Tensor, height: int, width: int, rows: int, columns: int) -> torch.Tensor:
        """Position bias of a grid towards its pooled grid: [heads, height * width, rows * columns]."""
        table, index = self.bias_table(x, height, width, rows, columns)
        return spread(table, index)

    def scaled(self, q: torch.Tensor, length: torch.Tensor) -> torch.Tensor:
        """Queries [B, heads, N, head_dim] of length 1, embedded and scaled by temperature and log key count."""
        return (q + self.query_embedding) * (F.softplus(self.temperature) * length.log())

    def heads(self, x: torch.Tensor) -> torch.Tensor:
        """[B, N, dim] to [B, heads, N, head_dim]."""
        return x.reshape(x.shape[0], x.shape[1], self.num_heads, self.head_dim).transpose(1, 2)


@register_notrace_module  # reason: position biases and skipped heads depend on sizes and values
class MoHAttention(HeadGates):
    """Softmax attention of all tokens, each using some of the heads: the last stage.

    Args:
        dim: Channels.
        num_heads: Heads.
        shared: Heads used by every token.
        routed: Further heads that a token uses.
        pretrained: Side of the map that distances are scaled to.
        skip_heads: Whether heads are computed only for the tokens that use them.
        dd: Device and dtype of the weights.
    """

    def __init__(
        self, dim: int, num_heads: int, shared: int, routed: int, pretrained: int, skip_heads: bool, **dd: Any
    ) -> None:
        super().__init__(dim, num_heads, shared, routed, pretrained, **dd)
        self.skip_heads = skip_heads
        self.skip_from = SKIP_FROM
        self.qkv = nn.Linear(dim, 3 * dim, **dd)
        self.proj = nn.Linear(dim, dim, **dd)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Attention of a map [B, H, W, dim]."""
        batch, height, width, dim = x.shape
        x = x.reshape(batch, height * width, dim)
        gates = self.gates(x).transpose(1, 2)
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        q, k, v = F.normalize(self.heads(q), dim=-1), F.normalize(self.heads(k), dim=-1), self.heads(v)
        length = torch.full((1,), float(height * width), dtype=q.dtype, device=q.device)
        q = self.scaled(q, length).to(v.dtype)
        if self.skip_heads and self.routed > 0 and height * width >= self.skip_from:
            table, index = self.bias_table(x, height, width, height, width)
            y = used_heads(q, k.to(v.dtype), v, table.to(v.dtype), index, gates)
        else:
            bias = self.bias(x, height, width, height, width).to(v.dtype)
            y = F.scaled_dot_product_attention(q, k.to(v.dtype), v, attn_mask=bias[None], scale=1.0)
        y = (y * gates[..., None]).transpose(1, 2).reshape(batch, height, width, dim)
        return self.proj(y)


def spread(table: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """A table [heads, distances] looked up at [queries, keys]: [heads, queries, keys]."""
    return table.index_select(1, index.flatten()).reshape(table.shape[0], index.shape[0], index.shape[1])


@unscripted
def used_heads(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    table: torch.Tensor,
    index: torch.Tensor,
    gates: torch.Tensor,
) -> torch.Tensor:
    """Attention of the queries that use a head only; what the others get is arbitrary, their gate is 0.

    Each head gathers its queries and looks up the position biases of those alone, so both the attention and the
    biases cost as much as heads are used. (Whole tiles without a user of a head are rare: tokens choose alone.)

    Args:
        q: Scaled queries [B, heads, N, head_dim].
        k: Keys, like q.
        v: Values, like q.
        table: Position bias of each distinct distance [heads, distances].
        index: Which distance each query and key has [N, N].
        gates: Factors of the heads [B, heads, N], 0 where unused.
    """
    if q.device.type != "cpu" or torch.compiler.is_compiling():
        # Counting users waits for a GPU at every head and breaks a compiled graph.
        return F.scaled_dot_product_attention(q, k, v, attn_mask=spread(table, index)[None], scale=1.0)
    out = torch.zeros_like(q)
    for sample in range(q.shape[0]):
        for head in range(q.shape[1]):
            users = gates[sample, head].nonzero()[:, 0]
            if len(users):
                bias = spread(table[head : head + 1], index[users])
                part = F.scaled_dot_product_attention(
                    q[sample, head, users][None],
                    k[sample, head][None],
                    v[sample, head][None],
                    attn_mask=bias,
                    scale=1.0,
                )
                out[sample, head] = out[sample, head].index_copy(0, users, part[0])
    return out


@register_notrace_module  # reason: position biases depend on sizes
class AggregatedAttention(HeadGates):
    """One softmax over the 3 x 3 neighbours and a pooled map, each token using some of the heads: stages 1 to 3.

    TransNeXt, section 3.1: neighbours outside the map are left out, and after the softmax learnable tokens add
    weights on the neighbours that come from the query alone.

    Args:
        dim: Channels.
        num_heads: Heads.
        shared: Heads used by every token.
        routed: Further heads that a token uses.
        pretrained: Side of the map that distances are scaled to.
        reduction: Tokens per pooled token and axis.
        dd: Device and dtype of the weights.
    """

    def __init__(
        self, dim: int, num_heads: int, shared: int, routed: int, pretrained: int, reduction: int, **dd: Any
    ) -> None:
        super().__init__(dim, num_heads, shared, routed, pretrained, **dd)
        self.reduction = reduction
        self.relative_pos_bias_local = nn.Parameter(torch.empty(num_heads, 9, **dd))
        self.learnable_tokens = nn.Parameter(torch.empty(num_heads, self.head_dim, 9, **dd))
        self.learnable_bias = nn.Parameter(torch.zeros(num_heads, 1, 9, **dd))
        trunc_normal_(self.relative_pos_bias_local, std=0.0004)
        trunc_normal_(self.learnable_tokens, std=0.02)
        self.q = nn.Linear(dim, dim, **dd)
        self.kv = nn.Linear(dim, 2 * dim, **dd)
        self.proj = nn.Linear(dim, dim, **dd)
        self.sr = nn.Conv2d(dim, dim, 1, **dd)
        self.norm = nn.LayerNorm(dim, **dd)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Attention of a map [B, H, W, dim]."""
        batch, height, width, dim = x.shape
        rows, columns = max(1, height // self.reduction), max(1, width // self.reduction)
        tokens = x.reshape(batch, height * width, dim)
        gates = self.gates(tokens)

        inside = neighbours(torch.ones(1, height, width, 1, dtype=x.dtype, device=x.device)).flatten(1)
        q = F.normalize(self.heads(self.q(tokens)), dim=-1)
        scaled = self.scaled(q, (inside.sum(0) + rows * columns)[:, None])
        k, v = self.kv(tokens).chunk(2, dim=-1)
        k = F.normalize(self.heads(k), dim=-1).transpose(1, 2).reshape(batch, height, width, dim)
        near_k = neighbours(k).reshape(9, batch, height * width, self.num_heads, self.head_dim)
        near_v = neighbours(v.reshape(batch, height, width, dim)).reshape_as(near_k)
        local = torch.einsum("bhnd,obnhd->bhno", scaled, near_k) + self.relative_pos_bias_local[:, None]
        local = local.masked_fill(inside.t() == 0, float("-inf"))

        pooled = F.gelu(self.sr(x.permute(0, 3, 1, 2)))
        pooled = self.norm(F.adaptive_avg_pool2d(pooled, (rows, columns)).flatten(2).transpose(1, 2))
        pool_k, pool_v = self.kv(pooled).chunk(2, dim=-1)
        pool_k, pool_v = F.normalize(self.heads(pool_k), dim=-1), self.heads(pool_v)
        far = scaled @ pool_k.transpose(-2, -1) + self.bias(x, height, width, rows, columns)

        weights = torch.cat([local, far], dim=-1).softmax(-1).to(v.dtype)
        extra = (q @ self.learnable_tokens + self.learnable_bias).to(v.dtype)
        y = torch.einsum("bhno,obnhd->bnhd", weights[..., :9] + extra, near_v)
        y = y + (weights[..., 9:] @ pool_v).transpose(1, 2)
        return self.proj((y * gates[..., None]).reshape(batch, height, width, dim))


def neighbours(x: torch.Tensor) -> torch.Tensor:
    """The 3 x 3 neighbours of each token of a map [B, H, W, C], zero outside, row by row: [9, B, H, W, C]."""
    height, width = x.shape[1], x.shape[2]
    padded = F.pad(x, (0, 0, 1, 1, 1, 1))
    return torch.stack([padded[:, i // 3 : i // 3 + height, i % 3 : i % 3 + width] for i in range(9)])
