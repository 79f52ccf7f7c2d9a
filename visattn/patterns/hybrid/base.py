"""What patterns with two branches have in common: who is listed, and that more is added than a softmax over that."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from functools import cached_property
from typing import ClassVar

import torch

from visattn.layout import Layout
from visattn.operands import wide_dtype
from visattn.patterns.base import ByText
from visattn.patterns.choice.blocks import Blocks
from visattn.patterns.choice.picks import Seen
from visattn.patterns.hybrid.parts import mean_scores
from visattn.patterns.kinds import ComposedPattern
from visattn.patterns.routes import Routes
from visattn.patterns.topk import TopK
from visattn.patterns.values import PerAxis

# Parameters of the softmax branch, as of `topk`; not all patterns have the last two.
FRONT = ("keep", "block", "key_block", "always", "every", "drift")


class HybridPattern(ByText, ComposedPattern):
    """Softmax over the key blocks that `front` lists, which engines for lists run, and a branch that is learned.

    Attributes:
        keep: Key blocks of the softmax branch: a fraction, rounded up and at least one, or a count.
        block: Sides of a block, or tokens of a run of the flat sequence; None for a cube-like box of 64 tokens.
        key_block: The same for keys, None for `block`.
        always: What is listed whatever its score, as in `topk`.
    """

    keep: int | float
    block: PerAxis | None
    key_block: PerAxis | None
    always: str | None

    of_products: ClassVar[bool] = False
    runs_lists: ClassVar[bool] = True

    def put_in_form(self) -> None:
        """Check what all of them have, and give it the form that equal patterns share."""
        for name in self._of_front():
            object.__setattr__(self, name, getattr(self.front, name))

    def _of_front(self) -> list[str]:
        """Which parameters are those of the softmax branch."""
        return [name for name in FRONT if hasattr(self, name)]

    @cached_property
    def front(self) -> TopK:
        """The pattern of the softmax branch."""
        return TopK(**{name: getattr(self, name) for name in self._of_front()})

    @property
    def needs_steps(self) -> bool:
        """Whether lists are kept from step to step."""
        return self.front.needs_steps

    @property
    def learnable(self) -> bool:
        """Always."""
        return True

    @property
    def needs_choice(self) -> bool:
        """Whether `join` asks for the lists; where not, the engine chooses them."""
        return True

    def blocks(self, grid: tuple[int, ...]) -> Blocks:
        """The blocks of a grid."""
        return self.front.blocks(grid)

    def check(self, grid: tuple[int, ...]) -> None:
        """Raise a ValueError if blocks or rules do not fit the grid."""
        self.front.check(grid)

    def instead(self, grid: tuple[int, ...]) -> str:
        """Two branches."""
        return f"a softmax over the lists of {self.front}, which has a plan, beside a second branch"

    def choose(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        layout: Layout,
        key_mask: torch.Tensor | None,
        scale: float,
        parameters: Mapping[str, torch.Tensor],
    ) -> Routes:
        """The key blocks that each head lists for each query block, not differentiated.

        Args:
            q: Queries [B, S, H, D].
            k: Keys [B, S, Hkv, D].
            layout: The tokens.
            key_mask: bool [B, S], or None.
            scale: Factor on the logits.
            parameters: What is learned; missing ones have their initial values.
        """
        return self.front.choose(q, k, layout, key_mask, scale)

    def router_scores(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        layout: Layout,
        key_mask: torch.Tensor | None,
        scale: float,
        parameters: Mapping[str, torch.Tensor],
    ) -> tuple[torch.Tensor, Seen]:
        """Scores of all pairs of blocks [B, H, rows, columns], differentiable, and which blocks take part.

        Products of means, scaled, in which nothing is a parameter; arguments as of `choose`.
        """
        return mean_scores(q, k, layout, self.blocks(layout.grid), key_mask, scale)

    @abstractmethod
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
        """The output of grid queries from both branches: [B, tokens, H, D].

        Args:
            soft: What the softmax branch gives grid queries [B, tokens, H, D].
            q: Queries [B, S, H, D].
            k: Keys [B, S, Hkv, D].
            v: Values, alike.
            layout: The tokens.
            key_mask: bool [B, S], or None.
            scale: Factor on the logits.
            choice: The lists, where `needs_choice`.
            parameters: What is learned; missing ones have their initial values.
        """

    def own(
        self, parameters: Mapping[str, torch.Tensor], q: torch.Tensor, grid: tuple[int, ...]
    ) -> dict[str, torch.Tensor]:
        """All parameters, in float32 at least and on the device of q; missing ones as they are at first."""
        heads, head_dim = q.shape[2], q.shape[3]
        names = self.parameter_shapes(heads, head_dim, grid)
        missing = not parameters.keys() >= names.keys()
        found = (self.initial_parameters(heads, head_dim, grid) if missing else {}) | dict(parameters)
        wide = wide_dtype(q)
        return {name: found[name].to(q.device, wide) for name in names}
