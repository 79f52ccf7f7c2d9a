"""Lists for some queries of each block: the others have the output of the nearest of those."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch

from visattn.layout import Layout
from visattn.operands import repeated, wide_dtype, widened
from visattn.patterns.choice.blocks import Blocks, fitting, inner, token_blocks
from visattn.patterns.choice.picks import Seen
from visattn.patterns.choice.pooling import tokens_of_blocks
from visattn.patterns.choice.scores import block_means
from visattn.patterns.dynamic import DynamicPattern
from visattn.patterns.ordered import Clustered, OrderedPattern
from visattn.patterns.text import parse
from visattn.patterns.values import is_number, real_number


@dataclass(frozen=True)
class Pruned(OrderedPattern):
    """Of each block of queries only those attend that resemble its middle one least; the others copy an output.

    The kept share has the lowest cosines with the middle token of its block, in row-major order. Blocks are scored by
    the mean of the kept queries and the mean of the keys, and `by` picks; a query that is left out has the output of
    the nearest kept one, of two equally near ones the earlier. Source: BSA of FastVideo (Zhan et al., "Bidirectional
    Sparse Attention for Faster Video Diffusion Training", 2025).

    Attributes:
        by: Who picks: topk, topp or above, with its blocks and its `always`.
        keep: Share of the queries of a block that attend, rounded up.

    Raises:
        ValueError: If the share is out of range, or `by` is no such pattern.
    """

    by: DynamicPattern
    keep: float = 0.5

    name: ClassVar[str] = "pruned"

    def __post_init__(self) -> None:
        pattern = parse(self.by)
        if not isinstance(pattern, DynamicPattern) or pattern.name not in ("topk", "topp", "above"):
            raise ValueError(f"by={pattern} lists no blocks by scores: give topk(...), topp(...) or above(...)")
        given = (pattern.score, pattern.rest, pattern.alike, pattern.every, pattern.skip, pattern.causal)
        if given != ("mean", "drop", None, 1, 0.0, False) or getattr(pattern, "bar", "exact") == "diag":
            raise ValueError(
                f"by={pattern}: blocks are scored by the means of the kept queries, once per call: leave score, rest, "
                "alike, every, skip, causal and bar=diag out"
            )
        object.__setattr__(self, "by", pattern)
        if not is_number(self.keep) or not 0 < self.keep <= 1:
            raise ValueError(f"keep={self.keep!r} must be a share of the queries of a block, above 0 and at most 1")
        object.__setattr__(self, "keep", real_number(self.keep))

    @property
    def joins_heads(self) -> bool:
        """Whether heads share a choice or a budget."""
        return self.by.joins_heads

    def check(self, grid: tuple[int, ...]) -> None:
        """Raise a ValueError if `by` is not defined on this grid."""
        self.by.check(grid)

    def covers(self, grid: tuple[int, ...]) -> bool:
        """Where nothing is left out."""
        return self.keep == 1 and self.by.covers(grid)

    def groups(self, layout: Layout) -> tuple[int, int]:
        """Blocks, and one more of queries: of those that are left out."""
        blocks = self.by.blocks(layout.grid)
        return blocks.rows + 1, blocks.columns

    def tiles(self, layout: Layout) -> tuple[int, int]:
        """As many as a block keeps, and a part of a block of keys."""
        blocks = self.by.blocks(layout.grid)
        kept = self.kept_of(math.prod(min(n, side) for n, side in zip(blocks.grid, blocks.queries, strict=True)))
        return min(64, kept), math.prod(fitting(blocks.keys, blocks.grid, 64))

    def expected(self, layout: Layout) -> float:
        """What `by` lists, of the kept queries."""
        return self.keep * self.by.visible_pairs(layout.grid) / layout.tokens**2

    def kept_of(self, tokens: int) -> int:
        """Queries that a block of so many keeps."""
        return max(1, math.ceil(round(self.keep * tokens, 9)))

    def cluster(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        layout: Layout,
        key_mask: torch.Tensor | None = None,
        scale: float | None = None,
    ) -> Clustered:
        """The blocks of kept queries and of keys, and whose output the other queries have."""
        at, blocks, heads = inner(layout), self.by.blocks(layout.grid), q.shape[2]
        with torch.no_grad():
            own, valid = q[:, at], None if key_mask is None else key_mask[:, at]
            kept, copied = self._kept(own, blocks, valid)
            wide = own.to(wide_dtype(q)).masked_fill(~kept[..., None], 0)
            # Means over the kept queries of each head.
            count = block_means(kept[..., None].to(wide.dtype), *blocks.sides[0], None).clamp(min=1e-30)
            query = block_means(wide, *blocks.sides[0], None) / count
            keys = repeated(block_means(k[:, at], *blocks.sides[1], valid), heads)
            factor = q.shape[3] ** -0.5 if scale is None else scale
            scores = factor * torch.einsum("bihd,bjhd->bhij", query, keys)
            choice = self.by.picked(scores, self._seen(q, blocks, valid), blocks)
            listed = choice.mask(0, blocks.columns).expand(-1, heads, -1, -1)
            rows, columns = (token_blocks(blocks.grid, box, q.device) for box in (blocks.queries, blocks.keys))
            queries = torch.where(kept.transpose(1, 2), rows, blocks.rows)
            return Clustered(
                queries,
                columns.expand(*queries.shape),
                torch.nn.functional.pad(listed, (0, 0, 0, 1)),
                copied=copied.transpose(1, 2),
            )

    def _seen(self, q: torch.Tensor, blocks: Blocks, valid: torch.Tensor | None) -> Seen:
        """Which blocks have valid tokens."""
        if valid is None:
            return Seen()
        there = valid[..., None, None].to(wide_dtype(q))
        return Seen(*(block_means(there, *side, None)[..., 0, 0] > 0 for side in blocks.sides))

    def _kept(self, q: torch.Tensor, blocks: Blocks, valid: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        """Which grid queries are kept: bool [B, tokens, H]; the grid token whose output each has: int64, alike.

        Padding is left out, and counts for no block; where a block has nothing else its tokens are kept as if valid.
        """
        batch, tokens, heads, _ = q.shape
        side = blocks.sides[0]
        there = torch.ones(batch, tokens, dtype=torch.bool, device=q.device) if valid is None else valid
        number = torch.arange(tokens, device=q.device)
        cut = tokens_of_blocks(widened(q), *side)
        exists = tokens_of_blocks(torch.ones_like(there)[..., None, None], *side)[..., 0, 0]
        shown = tokens_of_blocks(there[..., None, None], *side)[..., 0, 0]
        shown = torch.where(shown.any(-1, keepdim=True), shown, exists)
        place = tokens_of_blocks(number[None, :, None, None], *side)[..., 0, 0]
        count = shown.sum(-1, keepdim=True)
        # The middle one of those that are there.
        middle = (shown & (shown.cumsum(-1) - 1 == count // 2)).to(torch.uint8).argmax(-1)
        unit = torch.nn.functional.normalize(cut, dim=-1)
        of_middle = unit.gather(2, middle[..., None, None, None].expand(-1, -1, 1, *unit.shape[3:]))
        alike = (unit * of_middle).sum(-1).masked_fill(~shown[..., None], math.inf)
        order = alike.sort(dim=2, stable=True).indices
        rank = torch.zeros_like(order).scatter(
            2, order, torch.arange(order.shape[2], device=q.device)[:, None].expand_as(order)
        )
        most = (self.keep * count - 1e-9).ceil().clamp(min=1)
        kept = (rank < most[..., None]) & shown[..., None]
        slot = torch.arange(kept.shape[2], device=q.device)[:, None]
        far = 2 * kept.shape[2]
        before = torch.where(kept, slot, -far).cummax(2).values
        behind = torch.where(kept, slot, far).flip(2).cummin(2).values.flip(2)
        nearest = torch.where(slot - before <= behind - slot, before, behind)
        copied = place[..., None].expand(batch, -1, -1, heads).gather(2, nearest.clamp(0, kept.shape[2] - 1))
        # Slots behind a border are no token: they go behind the last one.
        target = torch.where(exists, place, tokens).flatten(1)[..., None].expand(-1, -1, heads)
        shape = batch, tokens + 1, heads
        found = [
            torch.zeros(shape, dtype=x.dtype, device=q.device).scatter(1, target, x.flatten(1, 2))[:, :tokens]
            for x in (kept, copied)
        ]
        return found[0], found[1]
