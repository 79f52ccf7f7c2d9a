"""A fixed number of key blocks for each block of queries: those with the best scores."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from visattn.patterns.base import ByText
from visattn.patterns.choice.blocks import Blocks
from visattn.patterns.choice.picks import Seen, number_of, pick_number, pick_number_of_all
from visattn.patterns.choice.values import share_or_count
from visattn.patterns.dynamic import DynamicPattern
from visattn.patterns.values import PerAxis


@dataclass(frozen=True, eq=False)
class TopK(ByText, DynamicPattern):
    """Each block of queries lists the `keep` key blocks with the best scores, for each head on its own.

    Sources: Zhang et al., "VSA: Faster Video Diffusion with Trainable Sparse Attention" (2025), whose blocks are boxes
    of the grid, and Zhang et al., "SpargeAttention" (ICML 2025), whose blocks are runs of the sequence.

    Attributes:
        keep: Blocks that are listed, forced ones included: a fraction of all, rounded up and at least one, or a count.
            With `per=head` of all pairs of a head, or a count per row on average.
        score: How pairs of blocks are scored: "mean" for the product of their means, "parts(4x4)" for the logarithm of
            the weights of the means of parts, "bounds" for the most that a key within the bounds of a block may reach,
            "diagonal(8)" for the softmax of sums along antidiagonals of 8 tokens, "lowbit(4)" for the largest weight
            that products of 4-bit integers find, "tree(2)" for means that a search down a binary tree meets.
        always: What is listed whatever its score: "self", "near(1)" for the neighbours in blocks, "first(1)" for blocks
            at the start of the first axis, "window(3x3x3)" in blocks, joined by +; None for nothing.
        per: "row" for a budget of each block of queries, "head" for one of all pairs of a head, "all" for one of all
            heads.
        rest: "drop" leaves unlisted blocks out. With "mean" each of them is one key and value, their means, that counts
            as often as it has tokens.
        block: Sides of a block, like 4x4x4, or tokens of a run of the flat sequence; None for a cube-like box of 64.
        key_block: The same for keys, None for `block`.
        every: Denoising steps that lists are kept for, where a patched pipeline tells its steps: 1 chooses in each.
        drift: With `every`, how far the means of the blocks of queries or keys may move, relative to their norm, before
            lists are chosen again all the same; inf keeps them without a look, which costs nothing.
        share: Neighbouring heads that share one choice, by the mean of their scores: a number, or "all".
        alike: SpargeAttn's guard: query blocks whose tokens, as unit vectors, have no more than this as the mean of all
            their products list everything, and such key blocks are listed by everyone, beside `keep`. None for none.
        skip: Listed blocks are met in ascending order, dense tokens first; one whose largest weight is below this share
            of the largest so far, for every query of the block, is passed over. Forward only. 0 for none.
        causal: Whether a query sees no key after itself, on each axis: blocks have one token along such axes, so that a
            frame sees itself and earlier ones. true for runs of the flat sequence, which see a part of their own block.
            Blocks that nobody may see compete for nothing; a block that sees fewer than it may list lists those.

    Raises:
        ValueError: If a parameter is out of range, here or on the grid it is used with.
    """

    keep: int | float = 0.1
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

    name: ClassVar[str] = "topk"

    def __post_init__(self) -> None:
        object.__setattr__(self, "keep", share_or_count(self.keep, "keep"))
        self.put_in_form()

    def number(self, blocks: Blocks) -> int:
        """Key blocks per query block."""
        return number_of(self.keep, blocks.columns)

    def pairs(self, blocks: Blocks) -> int:
        """Pairs of blocks of a head, at least one per row."""
        pairs = blocks.rows * blocks.columns
        number = self.keep * blocks.rows if isinstance(self.keep, int) else number_of(self.keep, pairs)
        return min(max(number, blocks.rows), pairs)

    def check(self, grid: tuple[int, ...]) -> None:
        """Raise a ValueError if blocks or rules do not fit the grid."""
        super().check(grid)
        blocks = self.blocks(grid)
        forced = int(self.forced(blocks).sum())
        if self.per != "row" and forced > self.pairs(blocks):
            raise ValueError(
                f"{self} on grid {grid}: always={self.always} lists {forced} pairs of blocks of a head, more than the "
                f"{self.pairs(blocks)} that keep={self.keep} allows: keep more, or force fewer"
            )

    def most_listed(self, blocks: Blocks) -> int:
        """`keep`; with a budget per head any number."""
        return blocks.columns if self.per != "row" else self.number(blocks)

    def least_listed(self, blocks: Blocks) -> int:
        """`keep`; with a budget per head any number, unless all are kept."""
        if self.per == "row":
            return self.number(blocks)
        return blocks.columns if self.pairs(blocks) == blocks.rows * blocks.columns else 0

    def expected(self, blocks: Blocks) -> float:
        """`keep`."""
        if self.per != "row":
            return self.pairs(blocks) / (blocks.rows * blocks.columns)
        return self.number(blocks) / blocks.columns

    def marked(
        self,
        scores: torch.Tensor,
        seen: Seen,
        forced: torch.Tensor | None,
        blocks: Blocks,
        variance: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The best."""
        if self.per != "row":
            return pick_number_of_all(scores, seen, forced, self.pairs(blocks) * (scores.shape[2] // blocks.rows))
        return pick_number(scores, seen, forced, self.number(blocks))
