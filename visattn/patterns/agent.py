"""Agent attention: a few pooled queries gather from all keys, and all queries read from those few."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from visattn.patterns.kinds import ComposedPattern
from visattn.patterns.values import PerAxis, check_many, per_axis, whole_numbers


@dataclass(frozen=True)
class Agent(ComposedPattern):
    """Two softmax attentions through agents, which are the queries of the grid pooled to a small grid.

    Source: Han et al., "Agent Attention: On the Integration of Softmax and Linear Attention" (ECCV 2024),
    section 3.2, equation 4. No token sees a token directly, so there is no mask and no tile plan; the backend
    "agent" runs it. Dense tokens are queries and keys of both attentions and no agents (as the class token of
    Agent-DeiT). A token that a key mask hides is in no average, and an agent of hidden tokens only is none.
    `visattn.kernels.agent.attention.agent_attention` adds the biases and the convolution of the backbones.

    Attributes:
        agents: Agents per axis (adaptive average pooling); -1 is one per token.

    Raises:
        ValueError: If a parameter is out of range, here or on the grid it is used with.
    """

    agents: PerAxis

    name: ClassVar[str] = "agent"

    def __post_init__(self) -> None:
        object.__setattr__(self, "agents", whole_numbers(self.agents, "agents", 1, also=(-1,)))

    def check(self, grid: tuple[int, ...]) -> None:
        """Raise a ValueError if the number of axes differs, or there are more agents than a use for them."""
        check_many(self.count(grid), math.prod(grid), f"{self}: {self.count(grid):.3g} agents")

    def shape(self, grid: tuple[int, ...]) -> tuple[int, ...]:
        """Agents per axis."""
        return tuple(n if a == -1 else a for a, n in zip(per_axis(self.agents, len(grid), "agents"), grid, strict=True))

    def count(self, grid: tuple[int, ...]) -> int:
        """Number of agents."""
        return math.prod(self.shape(grid))

    def instead(self, grid: tuple[int, ...]) -> str:
        """Two attentions."""
        return f"two dense attentions through {self.count(grid)} agents"
