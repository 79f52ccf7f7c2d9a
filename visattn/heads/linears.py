"""Linear layers whose key and value heads are shared by query heads, in the place of the usual ones."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from visattn.operands import widened

# Who gives query heads to key heads: evenly, by the norms of the keys of this forward, by a moving mean of those.
ALLOCATIONS = ("even", "norms", "moving")
# The share of the newest norms in their moving mean.
NEWEST = 0.9


def key_norms(keys: torch.Tensor) -> torch.Tensor:
    """Norms of key heads over tokens and channels, summed over samples: [B, S, Hkv, D] -> [Hkv]."""
    wide = widened(keys.detach())
    return wide.square().sum((1, 3)).sqrt().sum(0)


def allocated(weights: torch.Tensor, heads: int) -> torch.Tensor:
    """Key head of each query head, so that key heads get query heads in proportion to weights.

    Shares are rounded; while they are too many the head with the most loses one, while too few the one with the fewest
    gets one, of equal ones the first. Source: Khan et al., "Beyond Uniform Query Distribution: Key-Driven Grouped Query
    Attention" (2024), section 3, and its released code. Nothing waits for the device.

    Args:
        weights: At least 0, one for each key head [Hkv]; equal shares where they are all 0.
        heads: Query heads.

    Returns:
        int64 [H], not falling.
    """
    kv_heads = len(weights)
    total = weights.sum()
    shares = torch.where(total > 0, weights / total.where(total > 0, 1), 1 / kv_heads)
    counts = (shares * heads).round()
    place = torch.arange(kv_heads, device=weights.device)
    # Rounding is off by at most half a head for each key head.
    for _ in range(kv_heads // 2 + 1):
        off = counts.sum() - heads
        counts = (
            counts
            - ((place == counts.argmax()) & (off > 0)).to(counts)
            + ((place == counts.argmin()) & (off < 0)).to(counts)
        )
    return torch.searchsorted(counts.cumsum(0), torch.arange(heads, device=weights.device).to(counts), right=True)


def driven(norms: torch.Tensor) -> torch.Tensor:
    """Norms of key heads from 0 (the least) to 1 (the greatest), as KDGQA weighs them; zeros where all are equal."""
    low, high = norms.min(), norms.max()
    return (norms - low) / (high - low).where(high > low, 1)


def spread(x: torch.Tensor, owner: torch.Tensor | int, kv_heads: int) -> torch.Tensor:
    """Each query head's key head: [B, S, Hkv * D] -> [B, S, H * D].

    Args:
        x: Keys or values.
        owner: Key head of each query head [H], or the size of their equal groups.
        kv_heads: Key heads.
    """
    if isinstance(owner, int):
        return x.unflatten(2, (kv_heads, 1, -1)).expand(-1, -1, -1, owner, -1).flatten(2)
    # A product with ones and zeros: its backward adds in one order on every device.
    chosen = F.one_hot(owner, kv_heads).to(x.dtype)
    return torch.einsum("bskd,hk->bshd", x.unflatten(2, (kv_heads, -1)), chosen).flatten(2)


class Shared(nn.Linear):
    """A linear layer of queries, keys or values whose key heads are shared: its output has a head for each query head.

    Keys and values are repeated, since a model's own code expects as many as queries: what is saved is weights and the
    time of projections, not that of attention.

    Attributes:
        expanded_features: Channels of the output.
        norms: The moving mean of the norms of key heads [Hkv], with that allocation.
    """

    norms: torch.Tensor

    def __init__(
        self,
        channels: tuple[int, int],
        heads: tuple[int, int],
        allocation: str,
        fused: bool,
        bias: bool,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        """Make one without values.

        Args:
            channels: Of the input, and of a head.
            heads: Query heads, key heads.
            allocation: One of `ALLOCATIONS`.
            fused: Whether it gives queries, keys and values one after the other.
            bias: Whether it adds one.
            device: Where its parameters are.
            dtype: What they are.
        """
        wide, dim = channels
        self.heads, self.kv_heads = heads
        rows = self.heads + 2 * self.kv_heads if fused else self.kv_heads
        super().__init__(wide, rows * dim, bias=bias, device=device, dtype=dtype)
        self.allocation, self.fused, self.head_dim = allocation, fused, dim
        self.expanded_features = (3 if fused else 1) * self.heads * dim
        # The layer of keys, of which a layer of values asks who owns what; in a tuple, it is no part of this one.
        self.keys: tuple[Shared, ...] = ()
        if allocation == "moving":
            self.register_buffer("norms", torch.zeros(self.kv_heads, device=device, dtype=torch.float32))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[B, S, channels] -> [B, S, expanded_features]."""
        shape, dim = x.shape, self.head_dim
        x = x.reshape(shape[0], -1, shape[-1])
        y = super().forward(x)
        if self.fused:
            sizes = [self.heads * dim, self.kv_heads * dim, self.kv_heads * dim]
            q, k, v = y.split(sizes, 2)
            owner = self.owners(k)
            y = torch.cat([q, spread(k, owner, self.kv_heads), spread(v, owner, self.kv_heads)], 2)
        else:
            y = spread(y, self.keys[0].owners_of(x) if self.keys else self.owners(y), self.kv_heads)
        return y.reshape(*shape[:-1], self.expanded_features)

    def owners_of(self, x: torch.Tensor) -> torch.Tensor | int:
        """The same for what the layer of keys gets [B, S, channels]."""
        if self.allocation == "even":
            return self.heads // self.kv_heads
        if self.allocation == "moving":
            return self._moved()
        with torch.no_grad():
            return self.owners(super().forward(x))

    def owners(self, keys: torch.Tensor) -> torch.Tensor | int:
        """Key head of each query head for keys [B, S, Hkv * D]: int64 [H], or the size of equal groups."""
        if self.allocation == "even":
            return self.heads // self.kv_heads
        if self.allocation == "norms":
            return allocated(driven(key_norms(keys.unflatten(2, (self.kv_heads, -1)))), self.heads)
        # A forward that a checkpointed block runs again in the backward is no new one.
        if self.training and torch._C._current_graph_task_id() < 0:
            with torch.no_grad():
                now = key_norms(keys.unflatten(2, (self.kv_heads, -1))).to(self.norms.dtype)
                self.norms.copy_(NEWEST * now + (1 - NEWEST) * self.norms)
        return self._moved()

    def _moved(self) -> torch.Tensor:
        return allocated(self.norms, self.heads)

    def extra_repr(self) -> str:
        """What repr says of it."""
        return f"{super().extra_repr()}, heads={self.heads}, kv_heads={self.kv_heads}, allocation={self.allocation!r}"
