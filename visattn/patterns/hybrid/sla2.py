"""SLA2: a learned router lists key blocks for softmax, linear attention has the others, a learned ratio mixes them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch

from visattn.layout import Layout
from visattn.patterns.choice.picks import Seen, number_of
from visattn.patterns.hybrid.base import HybridPattern
from visattn.patterns.hybrid.parts import (
    block_means,
    block_weights,
    check_features,
    linear_of_blocks,
    of_tokens,
    seen_blocks,
    valid_of,
)
from visattn.patterns.hybrid.soft import soft_output
from visattn.patterns.routes import Routes
from visattn.patterns.values import PerAxis, is_number, real_number


@dataclass(frozen=True, eq=False)
class SLA2(HybridPattern):
    """a softmax(listed blocks) + (1 - a) linear(all others): two attentions over disjoint keys that add up to one.

    Router: key blocks are listed by scale (mean(q_i) R_q) . (mean(k_j) R_k), with R_q and R_k [D, D] per head that
    are learned and the identity at first. Ratio: the softmax over all keys is the mass m_i of listed blocks times
    softmax over those, plus 1 - m_i times that over all others; m_i is read from the router's own probabilities,
    log(m_i / (1 - m_i)) = o_i, and a_i = sigmoid(gain o_i + shift) with a gain (1) and a shift (0) per head that are
    learned. Linear: features f as in `sla`, over exactly the blocks that are not listed. Dense tokens and their
    queries are part of the softmax only, and a query block that lists everything has a = 1.

    Lists are hard and not differentiated. The router learns from three things: `visattn.patterns.hybrid.targets`
    (the exact mass of each block, which is the paper's first stage in its cheapest form); the ratio, which is a
    score-gradient form: dL/da_i = grad . (soft - linear) raises the scores of listed blocks where softmax should
    count more; and `soft` above 0, the paper's soft top-k, in which block j counts for the softmax by
    w = sigmoid(score_j / soft + shift_i), whose shift makes the weights of a row add up to its number of blocks, and
    for the linear part by 1 - w. That form computes all pairs, in torch: it is for the first stage of training.

    Source: Zhang et al., "SLA2: Sparse-Linear Attention with Learnable Routing and QAT" (2026), without code. There
    the ratio is a number per position of a query block, so that a model has one grid; here it is read from content,
    on any grid, and calibrated per head. Its soft top-k divides probabilities by the temperature, here scores.

    Attributes:
        keep: Listed key blocks of a query block: a fraction, rounded up and at least one, or a count.
        router: "learned", or "mean" for scores of the means themselves.
        ratio: "learned", or "mass" for a_i = m_i as it is.
        feature: f: "softmax" over channels, "elu" (+ 1) or "relu".
        block: Sides of a block, or tokens of a run of the flat sequence; None for a cube-like box of 64 tokens.
        key_block: The same for keys, None for `block`.
        always: What is listed whatever its score, as in `topk`.
        soft: Temperature of the soft lists, in units of scores; 0 for hard ones.

    Raises:
        ValueError: If a parameter is out of range, here or on the grid it is used with.
    """

    keep: int | float = 0.05
    router: str = "learned"
    ratio: str = "learned"
    feature: str = "softmax"
    block: PerAxis | None = None
    key_block: PerAxis | None = None
    always: str | None = None
    soft: float = 0.0

    name: ClassVar[str] = "sla2"

    def __post_init__(self) -> None:
        self.put_in_form()
        check_features(self.feature)
        for name, known in (("router", ("learned", "mean")), ("ratio", ("learned", "mass"))):
            if getattr(self, name) not in known:
                raise ValueError(f"{name}={getattr(self, name)!r} must be {known[0]} or {known[1]}")
        if not is_number(self.soft) or self.soft < 0:
            raise ValueError(f"soft={self.soft!r} must be a temperature of at least 0, like 0.1")
        object.__setattr__(self, "soft", real_number(self.soft))
        if self.soft and self.front.always is not None:
            raise ValueError(f"always={self.always} forces blocks, which soft={self.soft} only weighs: leave one out")

    @property
    def learnable(self) -> bool:
        """Whether router or ratio are."""
        return "learned" in (self.router, self.ratio)

    def parameter_shapes(self, heads: int, head_dim: int, grid: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
        """`route_query` and `route_key` [H, D, D] of the router, `ratio` [H, 2] (gain and shift)."""
        found: dict[str, tuple[int, ...]] = {}
        if self.router == "learned":
            found |= dict.fromkeys(("route_query", "route_key"), (heads, head_dim, head_dim))
        return found | ({"ratio": (heads, 2)} if self.ratio == "learned" else {})

    def initial_parameters(self, heads: int, head_dim: int, grid: tuple[int, ...]) -> dict[str, torch.Tensor]:
        """The router of means, and the ratio that it estimates."""
        found = {}
        if self.router == "learned":
            found = {
                name: torch.eye(head_dim, dtype=torch.float32, device="cpu").repeat(heads, 1, 1)
                for name in ("route_query", "route_key")
            }
        return found | (
            {"ratio": torch.tensor([1.0, 0.0], dtype=torch.float32, device="cpu").repeat(heads, 1)}
            if self.ratio == "learned"
            else {}
        )

    def router_scores(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        layout: Layout,
        key_mask: torch.Tensor | None,
        scale: float,
        parameters: Mapping[str, torch.Tensor],
    ) -> tuple[torch.Tensor, Seen]:
        """Products of means behind the router's maps; differentiable in q, k and the maps."""
        if self.router == "mean":
            return super().router_scores(q, k, layout, key_mask, scale, parameters)
        blocks = self.blocks(layout.grid)
        own, found = self.own(parameters, q, layout.grid), []
        for x, side, name in zip((q, k), blocks.sides, ("route_query", "route_key"), strict=True):
            found.append(block_means(x, layout, side, q.shape[2], key_mask) @ own[name])
        return scale * found[0] @ found[1].transpose(2, 3), seen_blocks(layout, blocks, key_mask)

    def choose(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        layout: Layout,
        key_mask: torch.Tensor | None,
        scale: float,
        parameters: Mapping[str, torch.Tensor],
    ) -> Routes:
        """The best of each row by the router's scores."""
        if self.router == "mean":
            return super().choose(q, k, layout, key_mask, scale, parameters)
        with torch.no_grad():
            return self.front.pick(
                *self.router_scores(q, k, layout, key_mask, scale, parameters), self.blocks(layout.grid)
            )

    def odds(
        self,
        scores: torch.Tensor,
        seen: Seen,
        weights: torch.Tensor,
        layout: Layout,
        key_mask: torch.Tensor | None,
    ) -> torch.Tensor:
        """log(m / (1 - m)) of the router's mass on what is listed: [B, H, rows], inf where nothing else takes part.

        Args:
            scores: Of the router [B, H, rows, columns].
            seen: Which blocks take part.
            weights: How much of each block is listed, 0 to 1: like the scores.
            layout: The tokens.
            key_mask: bool [B, S], or None.
        """
        number = block_weights(self.blocks(layout.grid), valid_of(key_mask, layout), scores.device)
        mass = scores + number[:, None, None].to(scores.dtype).log()
        if seen.columns is not None:
            mass = mass.masked_fill(~seen.columns[:, None, None], float("-inf"))
        sides = []
        for part in (weights, 1 - weights):
            # The logarithm of 0 has no gradient that could be multiplied away.
            logs = part.masked_fill(part <= 0, 1).log().masked_fill(part <= 0, float("-inf"))
            own = mass + logs
            none = own.isinf().all(-1, keepdim=True)
            sides.append(own.masked_fill(none, 0).logsumexp(-1).masked_fill(none[..., 0], float("-inf")))
        empty = sides[0].isinf()
        return torch.where(sides[1].isinf() & ~empty, float("inf"), sides[0].masked_fill(empty, 0) - sides[1])

    def shares(
        self, odds: torch.Tensor, q: torch.Tensor, parameters: Mapping[str, torch.Tensor], layout: Layout
    ) -> torch.Tensor:
        """The ratio a from the odds of the router's mass: [B, H, rows], 1 where they are inf."""
        if self.ratio == "mass":
            return torch.sigmoid(odds)
        gain, shift = self.own(parameters, q, layout.grid)["ratio"].unbind(1)
        all_listed = odds.isinf()
        found = torch.sigmoid(gain[:, None] * odds.masked_fill(all_listed, 0) + shift[:, None])
        return found.masked_fill(all_listed, 1)

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
        """The two, mixed by the ratio."""
        assert choice is not None
        blocks = self.blocks(layout.grid)
        scores, seen = self.router_scores(q, k, layout, key_mask, scale, parameters)
        listed = choice.mask(0, blocks.columns)
        odds = self.odds(scores, seen, listed.to(scores.dtype), layout, key_mask)
        share = of_tokens(self.shares(odds, q, parameters, layout)[..., None], blocks)
        linear = linear_of_blocks(q, k, v, ~listed, layout, blocks, key_mask, self.feature)
        return linear + share * (soft - linear)

    def joint(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        layout: Layout,
        key_mask: torch.Tensor | None,
        scale: float,
        parameters: Mapping[str, torch.Tensor],
    ) -> torch.Tensor:
        """The output of grid queries with soft lists, all pairs of tokens: [B, tokens, H, D]."""
        blocks = self.blocks(layout.grid)
        scores, seen = self.router_scores(q, k, layout, key_mask, scale, parameters)
        number = number_of(self.keep, blocks.columns)
        weights, soft = soft_output(q, k, v, scores, seen, number, self.soft, layout, blocks, key_mask, scale)
        odds = self.odds(scores, seen, weights, layout, key_mask)
        share = of_tokens(self.shares(odds, q, parameters, layout)[..., None], blocks)
        linear = linear_of_blocks(q, k, v, 1 - weights, layout, blocks, key_mask, self.feature)
        return linear + share * (soft - linear)
