"""The key blocks whose scores stand out of their row."""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass
from typing import ClassVar

import torch

from visattn.operands import repeated
from visattn.patterns.base import ByText
from visattn.patterns.choice.blocks import Blocks
from visattn.patterns.choice.picks import SPREAD, Seen, at_most, number_of, pick_above, probabilities
from visattn.patterns.choice.pooling import means
from visattn.patterns.choice.scores import block_means
from visattn.patterns.choice.values import share_or_count
from visattn.patterns.dynamic import DynamicPattern
from visattn.patterns.values import PerAxis, is_number, real_number

BARS = ("exact", "diag", "share")


@dataclass(frozen=True, eq=False)
class Above(ByText, DynamicPattern):
    """Each block of queries lists the key blocks that score `tau` standard deviations above the mean of its row.

    Source: "Sol-Attn" (2025), the exact form of its bar: mean and variance of the scores in base 2 over the key
    blocks, 1e-6 added to the variance.

    Attributes:
        tau: Standard deviations above the mean.
        most: Blocks that are listed at most, forced ones included: a fraction of all, rounded up, or a count.
        score: As in `topk`.
        always: As in `topk`; forced blocks are listed beside those above the bar.
        per: As in `topk`: "head" has one bar for all pairs of a head.
        rest: As in `topk`.
        block: As in `topk`.
        key_block: As in `topk`.
        every: As in `topk`.
        drift: As in `topk`.
        share: As in `topk`.
        bar: "exact" for the variance of the scores, "diag" for that of the mean keys, channel by channel, with the
            squares of the mean query as weights: Sol-Attn's cheaper form. It needs `score=mean`, `per=row`, `share=1`.
            "share" for a bar that is the same for all rows: blocks are listed that carry more than `tau` of the softmax
            of the scores of their row, as SeerAttention has it. It needs `per=row`.
        skip: As in `topk`.
        causal: As in `topk`.

    Raises:
        ValueError: If a parameter is out of range, here or on the grid it is used with.
    """

    tau: float = 1.0
    most: int | float = 1.0
    score: str = "mean"
    always: str | None = "self"
    per: str = "row"
    rest: str = "drop"
    block: PerAxis | None = None
    key_block: PerAxis | None = None
    every: int = 1
    drift: float = 0.3
    share: int | str = 1
    bar: str = "exact"
    skip: float = 0.0
    causal: bool | tuple[bool, ...] = False

    name: ClassVar[str] = "above"

    def __post_init__(self) -> None:
        if not is_number(self.tau):
            raise ValueError(f"tau={self.tau!r} must be a finite float32 number of standard deviations")
        object.__setattr__(self, "tau", real_number(self.tau))
        object.__setattr__(self, "most", share_or_count(self.most, "most"))
        if self.bar not in BARS:
            raise ValueError(f"bar={self.bar!r} must be {' or '.join(BARS)}")
        self.put_in_form()
        if self.bar == "share" and (self.per != "row" or not 0 < self.tau < 1):
            raise ValueError(
                f"bar=share, tau={self.tau!r}: a share of the attention of a row is above 0 and below 1, per=row"
            )
        if self.bar == "diag" and (self.score, self.per, self.share) != ("mean", "row", 1):
            raise ValueError("bar=diag is made of means of blocks, head by head: it needs score=mean, per=row, share=1")

    def most_listed(self, blocks: Blocks) -> int:
        """`most`."""
        return number_of(self.most, blocks.columns)

    def least_listed(self, blocks: Blocks) -> int:
        """All of a single one, else any number."""
        return 1 if blocks.columns == 1 and self.always else 0

    def expected(self, blocks: Blocks) -> float:
        """The tail of normally distributed scores."""
        bar = self.tau
        if self.bar == "share":
            # In standard deviations, where a block of score s carries exp(s) of what all carry together.
            bar = (math.log(self.tau * blocks.columns) + SPREAD**2 / 2) / SPREAD
        share = max(statistics.NormalDist().cdf(-bar), 1 / blocks.columns)
        return min(share, self.most_listed(blocks) / blocks.columns)

    @property
    def estimated(self) -> str:
        """What `expected` assumes."""
        return (
            "which blocks are listed, and how many, depends on q and k, head by head: density and bounds take the "
            "scores of each row to be normally distributed; report() says what is reached"
        )

    def variance(
        self, q: torch.Tensor, k: torch.Tensor, blocks: Blocks, valid: torch.Tensor | None, scale: float
    ) -> torch.Tensor | None:
        """With `bar=diag` that of independent channels."""
        if self.bar != "diag":
            return None
        query = block_means(q, *blocks.sides[0], valid) * scale
        keys, count = means(k, *blocks.sides[1], 1, valid)
        there = (count > 0).to(keys.dtype)[..., None]
        number = there.sum(1, keepdim=True).clamp(min=1)
        mean = (keys[:, :, 0] * there).sum(1, keepdim=True) / number
        spread = ((keys[:, :, 0] - mean).square() * there).sum(1, keepdim=True) / number
        spread = repeated(spread, q.shape[2])
        return (query.square() * spread).sum(-1).transpose(1, 2)[..., None]

    def marked(
        self,
        scores: torch.Tensor,
        seen: Seen,
        forced: torch.Tensor | None,
        blocks: Blocks,
        variance: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """What stands out, and what is forced."""
        if self.bar == "share":
            mask = probabilities(scores, seen) > self.tau
        else:
            mask = pick_above(scores, seen, self.tau, self.per != "row", variance)
        mask = mask if forced is None else mask | forced
        return at_most(mask, scores, seen, forced, self.most_listed(blocks))
