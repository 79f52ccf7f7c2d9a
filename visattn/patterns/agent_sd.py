"""Agent attention for Stable Diffusion without training, on tokens that are merged before they are projected."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, NamedTuple, NoReturn

from visattn.patterns.base import ByText
from visattn.patterns.kinds import MergingPattern
from visattn.patterns.values import (
    LARGEST,
    LARGEST_SEED,
    PerAxis,
    is_number,
    per_axis,
    real_number,
    uniform,
    whole_number,
    whole_numbers,
)


class Merge(NamedTuple):
    """How much is merged at one step.

    Attributes:
        cell: Rows and columns of a cell, which has one token that others merge into.
        tokens: Share of the tokens that merges away.
        agents: Share of the tokens that merges away to leave the agents.
    """

    cell: PerAxis
    tokens: float
    agents: float


@dataclass(frozen=True, eq=False)
class AgentSD(ByText, MergingPattern):
    """Self-attention of a UNet among merged tokens, through agents that are the same tokens merged further.

    Source: Han et al., "Agent Attention: On the Integration of Softmax and Linear Attention" (ECCV 2024), section
    4.4, and the settings of its released code, on the token merging of Bolya and Hoffman, "Token Merging for Fast
    Stable Diffusion" (2023). The early steps merge hard and attend through agents; the later ones merge less, and
    then agents are too many to pay, so that plain softmax attention of the merged tokens remains. What is merged is
    the input of the projections to queries, keys and values, so only `visattn.apply` on a UNet can install it.

    Attributes:
        ratio: Share of the tokens that merges away.
        agent_ratio: Share that merges away to leave the agents of the early steps; 0 for no agents.
        cell: Side of a cell in the early steps, one number or rows x columns.
        late_agent_ratio: As `agent_ratio`, in the other steps.
        late_cell: As `cell`, in the other steps.
        early: How many of the first steps are early: a count, or a fraction between 0 and 1 (1.0 for all steps).
        max_downsample: Modules whose grid is smaller by more than this factor keep the stock attention.
        read_scale: Exponent of the scale of the second softmax, relative to plain attention (k_scale2).
        shortcut: Factor on the values that are added (k_shortcut).
        seed: Of the tokens that are merged into, which are drawn anew at each step and module.

    Raises:
        ValueError: If a parameter is out of range.
    """

    ratio: float = 0.4
    agent_ratio: float = 0.95
    cell: PerAxis = 4
    late_agent_ratio: float = 0.5
    late_cell: PerAxis = 2
    early: int | float = 0.4
    max_downsample: int = 1
    read_scale: float = 0.3
    shortcut: float = 0.075
    seed: int = 0

    name: ClassVar[str] = "agentsd"

    def __post_init__(self) -> None:
        for name in ("ratio", "agent_ratio", "late_agent_ratio"):
            value = getattr(self, name)
            if not is_number(value) or not 0 <= value < 1:
                raise ValueError(f"{name}={value!r} must be a share of the tokens, at least 0 and below 1")
            object.__setattr__(self, name, real_number(value))
        for name in ("cell", "late_cell"):
            sides = per_axis(whole_numbers(getattr(self, name), name, 1), 2, name)
            object.__setattr__(self, name, uniform(sides))
        for name, low, high in (("max_downsample", 1, LARGEST), ("seed", 0, LARGEST_SEED)):
            object.__setattr__(self, name, whole_number(getattr(self, name), name, low, high=high))
        early = self.early
        whole = isinstance(early, int) and not isinstance(early, bool) and 0 <= early <= LARGEST
        if not whole and not (isinstance(early, float) and 0 <= early <= 1):
            raise ValueError(f"early={early!r} must be a count of steps like 20 or a fraction like 0.4")
        # No step is early, as a count and as a fraction alike.
        object.__setattr__(self, "early", (float(early) if isinstance(early, float) else int(early)) or 0)
        for name in ("read_scale", "shortcut"):
            value = getattr(self, name)
            if not is_number(value):
                raise ValueError(f"{name}={value!r} must be a finite float32 number")
            object.__setattr__(self, name, real_number(value))

    @property
    def stepped(self) -> bool:
        """Whether early and late steps differ."""
        merges = {(self.cell, self.agent_ratio), (self.late_cell, self.late_agent_ratio)}
        return len(merges) > 1 and not (self.early == 0 or (isinstance(self.early, float) and self.early == 1))

    def merge(self, early: bool) -> Merge:
        """What is merged in an early or a late step."""
        if early:
            return Merge(self.cell, self.ratio, self.agent_ratio)
        return Merge(self.late_cell, self.ratio, self.late_agent_ratio)

    def check(self, grid: tuple[int, ...]) -> NoReturn:
        """Always raise: there is no grid of queries, keys and values on which it is defined."""
        raise ValueError(
            f"{self} merges tokens of a UNet before they are projected to queries, keys and values: use it with "
            "visattn.apply on a Stable Diffusion pipeline, or take agent(agents=...) here"
        )

    def cells(self, merge: Merge) -> tuple[int, int]:
        """Rows and columns of a cell."""
        rows, columns = per_axis(merge.cell, 2, "cell")
        return rows, columns
