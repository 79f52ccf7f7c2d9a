"""Heads that choose keys for themselves, as samples of their own."""

from __future__ import annotations

from typing import NamedTuple

import torch


class Heads(NamedTuple):
    """Groups of heads that share a list, moved from the heads of a sample to samples.

    Attributes:
        groups: Groups per sample: 1 leaves everything as it is.
        heads: Query heads.
        kv_heads: Key heads.
    """

    groups: int
    heads: int
    kv_heads: int

    def queries(self, x: torch.Tensor) -> torch.Tensor:
        """[B, S, H, ...] as [B * G, S, H / G, ...]."""
        if self.groups == 1:
            return x
        return x.unflatten(2, (self.groups, -1)).transpose(1, 2).flatten(0, 1)

    def keys(self, x: torch.Tensor) -> torch.Tensor:
        """[B, N, Hkv, D] as [B * G, N, Hkv / G or 1, D]; groups that share a key head have a copy each."""
        each = self.groups // self.kv_heads
        return self.queries(x if each <= 1 else x.repeat_interleave(each, 2))

    def samples(self, x: torch.Tensor | None) -> torch.Tensor | None:
        """What a sample has, for each of its groups: [B * G, ...]."""
        return x if x is None or self.groups == 1 else x.repeat_interleave(self.groups, 0)

    def joined(self, x: torch.Tensor) -> torch.Tensor:
        """The inverse of `queries`."""
        if self.groups == 1:
            return x
        return x.unflatten(0, (-1, self.groups)).transpose(1, 2).flatten(2, 3)

    def key_gradient(self, x: torch.Tensor) -> torch.Tensor:
        """The gradient of keys from that of what `keys` made of them."""
        x = self.joined(x)
        each = self.groups // self.kv_heads
        return x if each <= 1 else x.unflatten(2, (self.kv_heads, each)).sum(3)


# Everybody shares one list.
ALL_HEADS = Heads(1, 1, 1)
