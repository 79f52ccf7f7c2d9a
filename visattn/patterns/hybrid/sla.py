"""SLA: softmax over the best key blocks, linear attention behind a learned map for others, nothing for the worst."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

import torch

from visattn.layout import Layout
from visattn.patterns.choice.blocks import Blocks
from visattn.patterns.choice.picks import Seen, number_of
from visattn.patterns.choice.values import share_or_count
from visattn.patterns.hybrid.base import HybridPattern
from visattn.patterns.hybrid.parts import (
    check_features,
    linear_of_all,
    linear_of_blocks,
    mean_scores,
)
from visattn.patterns.routes import Routes
from visattn.patterns.values import PerAxis


@dataclass(frozen=True, eq=False)
class SLA(HybridPattern):
    """softmax(critical blocks) + W linear(others) + b: every query block ranks the key blocks by their means.

    The best `keep` are critical and get exact softmax attention. The next `marginal` get linear attention of features
    f, f(q) . sum f(k) v / (f(q) . sum f(k) + 1e-5), and what is left is passed over. W [D, D] and b [D] are the same
    for all heads and zero at first, so that training starts from the sparse pattern. Dense tokens and their queries
    are part of the softmax only. The choice is not differentiated; W, b, q, k and v are, through both branches.

    Source: Zhang et al., "SLA: Beyond Sparsity in Diffusion Transformers via Fine-Tunable Sparse-Linear Attention"
    (2025): 5 % critical, 10 % passed over, which is `marginal=0.85`. Its released code sums over all keys instead,
    critical ones too, which is `marginal=all` and costs one state per head instead of one per block of queries. It
    rounds the number of blocks down, here it is rounded up.

    Attributes:
        keep: Critical key blocks of a query block: a fraction, rounded up and at least one, or a count.
        marginal: Blocks of the linear branch, behind the critical ones: a fraction or a count of all, or "all" for
            the sums over all keys of the grid.
        feature: f: "softmax" over channels, "elu" (+ 1) or "relu".
        block: Sides of a block, or tokens of a run of the flat sequence; None for a cube-like box of 64 tokens.
        key_block: The same for keys, None for `block`.
        always: What is critical whatever its score, as in `topk`.
        every: Denoising steps that lists are kept for, with `marginal=all`.
        drift: With `every`, how far means may move before lists are chosen again all the same.

    Raises:
        ValueError: If a parameter is out of range, here or on the grid it is used with.
    """

    keep: int | float = 0.05
    marginal: int | float | str = "all"
    feature: str = "softmax"
    block: PerAxis | None = None
    key_block: PerAxis | None = None
    always: str | None = None
    every: int = 1
    drift: float = 0.3

    name: ClassVar[str] = "sla"

    def __post_init__(self) -> None:
        self.put_in_form()
        check_features(self.feature)
        if self.marginal != "all":
            if isinstance(self.marginal, str):
                raise ValueError(f"marginal={self.marginal!r} must be a fraction like 0.85, a count of blocks, or all")
            object.__setattr__(self, "marginal", share_or_count(self.marginal, "marginal"))
            if self.every != 1:
                raise ValueError(f"every={self.every} keeps critical blocks, not marginal ones: give marginal=all")

    @property
    def needs_choice(self) -> bool:
        """Whether the linear branch asks which blocks are critical."""
        return self.marginal != "all"

    def parameter_shapes(self, heads: int, head_dim: int, grid: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
        """`weight` [D, D] and `bias` [D], of all heads."""
        return {"weight": (head_dim, head_dim), "bias": (head_dim,)}

    def initial_parameters(self, heads: int, head_dim: int, grid: tuple[int, ...]) -> dict[str, torch.Tensor]:
        """Zeros: no linear branch."""
        return {
            name: torch.zeros(shape, dtype=torch.float32, device="cpu")
            for name, shape in self.parameter_shapes(heads, head_dim, grid).items()
        }

    def router_scores(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        layout: Layout,
        key_mask: torch.Tensor | None,
        scale: float,
        parameters: Mapping[str, torch.Tensor],
    ) -> tuple[torch.Tensor, Seen]:
        """Products of means, scaled: differentiable in q and k, nothing in it is a parameter."""
        return mean_scores(q, k, layout, self.blocks(layout.grid), key_mask, scale)

    def marginal_blocks(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        layout: Layout,
        key_mask: torch.Tensor | None,
        scale: float,
        critical: Routes,
    ) -> torch.Tensor:
        """Which key blocks are marginal for each query block: bool [B, H, rows, columns].

        Args:
            q: Queries [B, S, H, D].
            k: Keys [B, S, Hkv, D].
            layout: The tokens.
            key_mask: bool [B, S], or None.
            scale: Factor on the logits.
            critical: The critical ones.
        """
        blocks = self.blocks(layout.grid)
        assert not isinstance(self.marginal, str)
        both = number_of(self.keep, blocks.columns) + number_of(self.marginal, blocks.columns)
        wider = replace(self.front, keep=min(both, blocks.columns))
        found = wider.listed(q, k, layout, key_mask, scale).mask(0, blocks.columns)
        return found & ~critical.mask(0, blocks.columns)

    def join(
        self,
        soft: torch.Tensor,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        layout: Layout,
        key_mask: torch.Tensor | None,
        scale: float,
        choice: Routes | None,
        parameters: Mapping[str, torch.Tensor],
    ) -> torch.Tensor:
        """The sum of both."""
        if not parameters:
            return soft
        own = self.own(parameters, q, layout.grid)
        if choice is None:
            found = linear_of_all(q, k, v, layout, key_mask, self.feature)
        else:
            blocks: Blocks = self.blocks(layout.grid)
            of = self.marginal_blocks(q, k, layout, key_mask, scale, choice)
            found = linear_of_blocks(q, k, v, of, layout, blocks, key_mask, self.feature)
        return soft + found @ own["weight"].T + own["bias"]
