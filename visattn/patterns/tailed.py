"""Routed patterns that add something to the output of the engine that runs their lists."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import replace
from typing import Self

import torch

from visattn.layout import Layout
from visattn.patterns.choice.blocks import Blocks
from visattn.patterns.choice.tail import TAILS, coarse, linear, slope
from visattn.patterns.kinds import RoutedPattern
from visattn.patterns.routes import Routes

# What a call has chosen already, for the engine that runs it.
_held: ContextVar[tuple[TailedPattern, Routes] | None] = ContextVar("held", default=None)


@contextmanager
def holding(pattern: TailedPattern, choice: Routes) -> Iterator[None]:
    """Inside, the pattern chooses this."""
    before = _held.set((pattern, choice))
    try:
        yield
    finally:
        _held.reset(before)


def held_for(pattern: TailedPattern) -> Routes | None:
    """What a pattern is held to choose, None if it is free."""
    held = _held.get()
    return held[1] if held is not None and held[0] == pattern else None


class TailedPattern(RoutedPattern):
    """A routed pattern of blocks with a rest that may be added behind the softmax.

    Attributes:
        rest: What unlisted blocks give.
    """

    rest: str

    @abstractmethod
    def blocks(self, grid: tuple[int, ...]) -> Blocks:
        """The blocks of a grid."""

    @property
    def has_tail(self) -> bool:
        """Whether something is added to the output of an engine."""
        return self.rest in TAILS

    @property
    def front(self) -> Self:
        """The pattern that engines run, without what is added behind; itself where nothing is."""
        return replace(self, rest=TAILS[self.rest]) if self.has_tail else self  # type: ignore[type-var]

    @property
    def of_products(self) -> bool:
        """Whether its output is made of the products of queries and keys, so that further channels may carry a bias."""
        return not self.has_tail

    @property
    def learnable(self) -> bool:
        """Whether what is added behind is learned."""
        return self.rest in ("linear", "coarse")

    def parameter_shapes(self, heads: int, head_dim: int, grid: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
        """`weight` [D, D] and `bias` [D] of `rest=linear`, the same for all heads; `gate` [H, D] of `rest=coarse`."""
        if self.rest == "linear":
            return {"weight": (head_dim, head_dim), "bias": (head_dim,)}
        return {"gate": (heads, head_dim)} if self.rest == "coarse" else {}

    def initial_parameters(self, heads: int, head_dim: int, grid: tuple[int, ...]) -> dict[str, torch.Tensor]:
        """Zeros: nothing is added before it is learned."""
        return {
            name: torch.zeros(shape, dtype=torch.float32, device="cpu")
            for name, shape in self.parameter_shapes(heads, head_dim, grid).items()
        }

    def tail(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        layout: Layout,
        key_mask: torch.Tensor | None,
        scale: float,
        lse: torch.Tensor | None,
        choice: Routes | None,
        parameters: Mapping[str, torch.Tensor],
    ) -> torch.Tensor:
        """What is added to the output of grid queries behind the softmax: [B, tokens, H, D].

        Args:
            q: Queries [B, S, H, D].
            k: Keys [B, S, Hkv, D].
            v: Values, alike.
            layout: The tokens.
            key_mask: bool [B, S], or None.
            scale: Factor on the logits.
            lse: Log-sum-exp of the softmax [B, S, H], which `rest=slope` needs.
            choice: Key blocks of each query block, likewise.
            parameters: What is learned; missing ones are zero.
        """
        blocks = self.blocks(layout.grid)
        if self.rest == "slope":
            assert lse is not None and choice is not None
            return slope(q, k, v, lse, choice, layout, blocks, key_mask, scale)
        initial = self.initial_parameters(q.shape[2], q.shape[3], layout.grid)
        own = {name: parameters.get(name, t.to(q)) for name, t in initial.items()}
        if self.rest == "linear":
            return linear(q, k, v, layout, key_mask, own)
        return coarse(q, k, v, layout, blocks, key_mask, scale) * own["gate"]
