"""As many key blocks for each block of queries as carry a share of its attention."""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from typing import ClassVar

import torch

from visattn.patterns.base import ByText
from visattn.patterns.choice.blocks import Blocks
from visattn.patterns.choice.picks import (
    SPREAD,
    Seen,
    at_most,
    number_of,
    pick_height,
    pick_mass,
    pick_number,
)
from visattn.patterns.choice.values import share_or_count
from visattn.patterns.dynamic import DynamicPattern
from visattn.patterns.values import PerAxis, flag, is_number, real_number

RULES = ("cover", "under")
SHARES = ("softmax", "height")


@dataclass(frozen=True, eq=False)
class TopP(ByText, DynamicPattern):
    """Each block of queries lists the best key blocks until their estimated attention reaches `p`.

    The estimate is the softmax of the scores over all key blocks. Sources: Mikhailov et al.,
    "NABLA: Neighborhood Adaptive Block-Level Attention" (2025); Zhang et al., "Training-Free Efficient Video
    Generation via Dynamic Token Carving" (Jenga, 2025). With `of=height` shares are those of VMoBA (Wu et al., 2025),
    whose blocks of queries are single tokens.

    Attributes:
        p: Share of the attention, above 0 and at most 1; with `per=head` of that of all rows of a head.
        least: Blocks that are listed anyway: a fraction of all, rounded up, or a count; 0 for none.
        most: Blocks that are listed at most, forced ones included: a fraction or a count.
        rule: "cover" lists the block that crosses the share, "under" does not.
        of: What `p` is a share of: "softmax" of the scores, or "height", of how far they lie above the lowest one; then
            forced blocks count first, and at least one other is listed.
        score: As in `topk`.
        always: As in `topk`; forced blocks are listed beside those that carry the share.
        counted: Whether the share of forced blocks counts too, before all others, so that fewer others are listed.
        per: As in `topk`.
        rest: As in `topk`.
        block: As in `topk`.
        key_block: As in `topk`.
        every: As in `topk`.
        drift: As in `topk`.
        share: As in `topk`.
        alike: As in `topk`.
        skip: As in `topk`.
        causal: As in `topk`.

    Raises:
        ValueError: If a parameter is out of range, here or on the grid it is used with.
    """

    p: float = 0.9
    least: int | float = 1
    most: int | float = 1.0
    rule: str = "cover"
    of: str = "softmax"
    score: str = "mean"
    always: str | None = "self"
    per: str = "row"
    rest: str = "drop"
    block: PerAxis | None = None
    key_block: PerAxis | None = None
    every: int = 1
    drift: float = 0.3
    share: int | str = 1
    alike: float | None = None
    skip: float = 0.0
    causal: bool | tuple[bool, ...] = False
    counted: bool = False

    name: ClassVar[str] = "topp"

    def __post_init__(self) -> None:
        if not is_number(self.p) or not 0 < self.p <= 1:
            raise ValueError(f"p={self.p!r} must be a share of the attention, above 0 and at most 1")
        object.__setattr__(self, "p", real_number(self.p))
        for name, low in (("least", 0), ("most", 1)):
            object.__setattr__(self, name, share_or_count(getattr(self, name), name, low))
        if self.rule not in RULES:
            raise ValueError(f"rule={self.rule!r} must be {' or '.join(RULES)}")
        if self.of not in SHARES:
            raise ValueError(f"of={self.of!r} must be {' or '.join(SHARES)}")
        object.__setattr__(self, "counted", flag(self.counted, "counted"))
        if self.counted and (self.of == "height" or self.alike is not None):
            raise ValueError(
                "counted=true is for shares of the softmax without alike: of=height always counts, so leave it out"
            )
        self.put_in_form()

    def check(self, grid: tuple[int, ...]) -> None:
        """Raise a ValueError if blocks or rules do not fit the grid."""
        super().check(grid)
        blocks = self.blocks(grid)
        least, most = self.least_listed(blocks), self.most_listed(blocks)
        if least > most:
            raise ValueError(
                f"{self} on grid {grid}: least={self.least} is {least} blocks, most={self.most} only {most}"
            )

    def most_listed(self, blocks: Blocks) -> int:
        """`most`."""
        return number_of(self.most, blocks.columns)

    def least_listed(self, blocks: Blocks) -> int:
        """`least`, or all."""
        everything = self.p == 1 and self.rule == "cover" and self.most_listed(blocks) == blocks.columns
        return blocks.columns if everything else number_of(self.least, blocks.columns)

    def expected(self, blocks: Blocks) -> float:
        """The share of normally distributed scores that carries `p`, between the limits."""
        if self.p == 1:
            share = 1.0
        else:
            normal = statistics.NormalDist()
            share = normal.cdf(normal.inv_cdf(self.p) - SPREAD)
        low, high = self.least_listed(blocks), self.most_listed(blocks)
        return min(max(share, low / blocks.columns), high / blocks.columns)

    @property
    def estimated(self) -> str:
        """What `expected` assumes."""
        return (
            "which blocks are listed, and how many, depends on q and k, head by head: density and bounds take the "
            "scores of each row to be normally distributed with standard deviation 2; report() says what is reached"
        )

    def marked(
        self,
        scores: torch.Tensor,
        seen: Seen,
        forced: torch.Tensor | None,
        blocks: Blocks,
        variance: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """What carries the share, and what is forced."""
        of_all = self.per != "row"
        if self.least_listed(blocks) >= blocks.columns:
            return torch.ones_like(scores, dtype=torch.bool)
        least = self.least_listed(blocks)
        if self.of == "height":
            mask = pick_height(scores, seen, forced, self.p, self.rule == "cover", of_all)
            mask = mask | pick_number(scores, seen, forced, least) if least else mask
        else:
            first = forced if self.counted else None
            mask = pick_mass(scores, seen, self.p, self.rule == "cover", least, of_all, first)
            mask = mask if forced is None else mask | forced
        return at_most(mask, scores, seen, forced, self.most_listed(blocks))
