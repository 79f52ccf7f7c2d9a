"""Tokens whose projections have the same signs are neighbours: runs of queries see runs of keys."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch

from visattn.keep import kept
from visattn.layout import Layout
from visattn.operands import repeated, wide_dtype
from visattn.patterns.choice.blocks import inner
from visattn.patterns.ordered import Clustered, OrderedPattern
from visattn.patterns.values import LARGEST, LARGEST_SEED, check_many, whole_number


@dataclass(frozen=True)
class Lsh(OrderedPattern):
    """Queries and keys are sorted by a hash of their direction; each run of queries sees the run of keys of its place.

    The hash is the Gray code's rank of the signs of `planes` random projections, the same for all heads. All queries of
    a head see `samples` random keys besides, which stand for all: the logarithm of how many each stands for is added to
    their scores, and one that is in the own run counts twice, as in the original. Source: Han et al., "HyperAttention:
    Long-context Attention in Near-Linear Time" (2023).

    Attributes:
        planes: Random projections.
        block: Tokens of a run.
        samples: Random keys of each head; 0 for none.
        seed: Of the projections and the samples.

    Raises:
        ValueError: If a number is out of range.
    """

    planes: int = 7
    block: int = 256
    samples: int = 256
    seed: int = 0

    name: ClassVar[str] = "lsh"

    def __post_init__(self) -> None:
        limits = (("planes", 1, LARGEST), ("block", 1, LARGEST), ("samples", 0, LARGEST), ("seed", 0, LARGEST_SEED))
        for name, low, high in limits:
            object.__setattr__(self, name, whole_number(getattr(self, name), name, low, high=high))
        if self.planes > 30:
            raise ValueError(f"planes={self.planes} must be at most 30: more have more buckets than there are tokens")

    @property
    def joins_heads(self) -> bool:
        """Whether samples are drawn, for one head after the other."""
        return self.samples > 0

    def check(self, grid: tuple[int, ...]) -> None:
        """Raise a ValueError if there are more samples than a grid of its size can have a use for."""
        check_many(self.samples, math.prod(grid), f"samples={self.samples} random keys")

    def covers(self, grid: tuple[int, ...]) -> bool:
        """Where one run holds all tokens and none is sampled besides."""
        return self.block >= math.prod(grid) and not self.samples

    def groups(self, layout: Layout) -> tuple[int, int]:
        """Runs."""
        runs = -(-layout.tokens // self.block)
        return runs, runs

    def tiles(self, layout: Layout) -> tuple[int, int]:
        """A divisor of the run, so that every run is whole tiles."""
        size = max(d for d in range(1, min(64, self.block) + 1) if self.block % d == 0)
        return size, size

    def expected(self, layout: Layout) -> float:
        """One run each."""
        return min(1.0, self.block / layout.tokens)

    def more_keys(self, layout: Layout) -> int:
        """`samples`."""
        return self.samples

    def cluster(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        layout: Layout,
        key_mask: torch.Tensor | None = None,
        scale: float | None = None,
    ) -> Clustered:
        """The runs, and the sampled keys."""
        at, (batch, _, heads, dim) = inner(layout), q.shape
        with torch.no_grad():
            planes = projections(dim, self.planes, self.seed, q.device)
            valid = None if key_mask is None else key_mask[:, None, at]
            turned = q[:, at].transpose(1, 2), k[:, at].transpose(1, 2)
            queries, keys = (self._runs(x, planes, valid) for x in turned)
            keys = repeated(keys, heads, 1)
            runs = self.groups(layout)[0]
            listed = torch.eye(runs, dtype=torch.bool, device=q.device).expand(batch, heads, -1, -1)
            if not self.samples:
                return Clustered(queries, keys, listed)
            extra = sampled(layout.tokens, heads, self.samples, self.seed, q.device).expand(batch, -1, -1)
            wide = wide_dtype(q)
            weight = torch.full(extra.shape, math.log(layout.tokens / self.samples), dtype=wide, device=q.device)
            if valid is not None:
                there = valid.expand(-1, heads, -1).gather(2, extra)
                stands = valid.sum(-1, keepdim=True).to(wide) / there.sum(-1, keepdim=True).clamp(min=1)
                weight = stands.clamp(min=1e-30).log().expand_as(there).masked_fill(~there, float("-inf"))
            return Clustered(queries, keys, listed, extra, weight)

    def _runs(self, x: torch.Tensor, planes: torch.Tensor, valid: torch.Tensor | None) -> torch.Tensor:
        """Run of each token of x [B, heads, tokens, D] in the order of the hash; padding comes last."""
        wide = wide_dtype(x)
        bits = (x.to(wide) @ planes.to(wide) > 0).long()
        bucket = (bits << torch.arange(bits.shape[3], device=x.device)).sum(-1)
        rank = bucket ^ (bucket >> 1)
        if valid is not None:
            rank = rank.masked_fill(~valid, 1 << bits.shape[3])
        order = rank.sort(dim=-1, stable=True).indices
        place = torch.arange(x.shape[2], device=x.device).expand(order.shape)
        return torch.zeros_like(order).scatter(2, order, place) // self.block


@kept
def projections(dim: int, planes: int, seed: int, device: torch.device) -> torch.Tensor:
    """Random planes [dim, planes]."""
    return torch.randn(dim, planes, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(device)


@kept
def sampled(tokens: int, heads: int, samples: int, seed: int, device: torch.device) -> torch.Tensor:
    """Random grid tokens of each head, with repetition: int64 [1, heads, samples]."""
    generator = torch.Generator().manual_seed(seed + 1)
    return torch.randint(tokens, (1, heads, samples), generator=generator).to(device)
