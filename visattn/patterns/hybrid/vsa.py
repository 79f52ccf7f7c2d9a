"""VSA: softmax over the best key blocks, and attention of the means of all blocks behind a learned gate."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch

from visattn.layout import Layout
from visattn.patterns.choice.picks import Seen
from visattn.patterns.choice.tail import coarse
from visattn.patterns.hybrid.base import HybridPattern
from visattn.patterns.hybrid.parts import grid_of, mean_scores, wide
from visattn.patterns.routes import Routes
from visattn.patterns.values import PerAxis

GATES = ("token", "channel")


@dataclass(frozen=True, eq=False)
class VSA(HybridPattern):
    """softmax(best blocks) + gate * coarse, where coarse_i = softmax_j(scale mean(q_i) . mean(k_j)) mean(v_j).

    i and j are blocks of queries and keys; the coarse branch has all of them, alike for the queries of a block.

    Blocks are listed by the very products of means whose softmax weighs the coarse branch. The list itself is not
    differentiated (hard, no straight-through), as in the paper: what trains the selection is the gradient of the
    coarse softmax, which reaches the means of queries and keys. The gate is zero at first, so that training starts
    from the sparse pattern.

    Source: Zhang et al., "VSA: Faster Video Diffusion with Trainable Sparse Attention" (2025), blocks 4x4x4. There
    the gate is a linear map of the block's input to one number per token and channel; attention does not see that
    input, so `gate=token` maps the queries, head by head, and `gate=channel` is a number per head and channel.

    Attributes:
        keep: Listed key blocks of a query block: a fraction, rounded up and at least one, or a count.
        gate: "token" for q W + b with W [D, D] and b [D] per head, "channel" for b alone.
        block: Sides of a block, or tokens of a run of the flat sequence; None for a cube-like box of 64 tokens, which
            is 4x4x4 in a video.
        key_block: The same for keys, None for `block`.
        always: What is listed whatever its score, as in `topk`.
        every: Denoising steps that lists are kept for.
        drift: With `every`, how far means may move before lists are chosen again all the same.

    Raises:
        ValueError: If a parameter is out of range, here or on the grid it is used with.
    """

    keep: int | float = 0.1
    gate: str = "token"
    block: PerAxis | None = None
    key_block: PerAxis | None = None
    always: str | None = None
    every: int = 1
    drift: float = 0.3

    name: ClassVar[str] = "vsa"

    def __post_init__(self) -> None:
        self.put_in_form()
        if self.gate not in GATES:
            raise ValueError(f"gate={self.gate!r} must be token or channel")

    @property
    def needs_choice(self) -> bool:
        """Never: the coarse branch is of all blocks."""
        return False

    def parameter_shapes(self, heads: int, head_dim: int, grid: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
        """`gate` [H, D], and `gate_map` [H, D, D] of `gate=token`."""
        found: dict[str, tuple[int, ...]] = {"gate": (heads, head_dim)}
        return found if self.gate == "channel" else found | {"gate_map": (heads, head_dim, head_dim)}

    def initial_parameters(self, heads: int, head_dim: int, grid: tuple[int, ...]) -> dict[str, torch.Tensor]:
        """Zeros: no coarse branch."""
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
        """The logits of the coarse branch: differentiable in q and k, nothing in it is a parameter."""
        return mean_scores(q, k, layout, self.blocks(layout.grid), key_mask, scale)

    def gates(self, q: torch.Tensor, layout: Layout, parameters: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """What the coarse branch is multiplied by: [B or 1, tokens or 1, H, D]."""
        own = self.own(parameters, q, layout.grid)
        if self.gate == "channel":
            return own["gate"][None, None]
        return torch.einsum("bthd,hde->bthe", wide(grid_of(q, layout)), own["gate_map"]) + own["gate"]

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
        added = coarse(q, k, v, layout, self.blocks(layout.grid), key_mask, scale)
        return soft + self.gates(q, layout, parameters) * added
