"""Columns and diagonals of a causal line that its last queries attend to (MInference, FlexPrefill)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch

from visattn.operands import wide_dtype
from visattn.patterns.base import ByText
from visattn.patterns.choice.blocks import Blocks
from visattn.patterns.choice.causal import reachable_on
from visattn.patterns.choice.picks import Seen, bar_of, best, number_of
from visattn.patterns.choice.pooling import means
from visattn.patterns.choice.slices import Slices
from visattn.patterns.choice.values import share_or_count
from visattn.patterns.dynamic import DynamicPattern
from visattn.patterns.routes import Routes, lists_of
from visattn.patterns.values import PerAxis, is_number, real_number, whole_numbers

# Tokens that FlexPrefill makes a block of when it counts what carries the share, whatever its blocks are.
COUNTED = 128
# Columns, and distances, from the first on that MInference always takes.
FIRST_COLUMNS, FIRST_SLASHES = 30, 100


class Weights(NamedTuple):
    """What the last queries of a head attend to, on average.

    Attributes:
        columns: By the token: [B, h, tokens].
        slashes: By how far back it is: [B, h, tokens].
        query: The mean of those queries: [B, h, D].
    """

    columns: torch.Tensor
    slashes: torch.Tensor
    query: torch.Tensor


@dataclass(frozen=True, eq=False)
class VerticalSlash(ByText, DynamicPattern):
    """Each head lists the columns and the diagonals of blocks that the last queries of a causal line attend to most.

    The exact attention of the last `block` queries says what every column, and every distance to the query, carries.
    As many blocks of columns are listed as their best tokens need for a share `p`, counted in 128 tokens, and as many
    of diagonals; the first column, which is that of the first valid token, and the main diagonal always. Where the
    attention of the mean of the last queries to the means of the blocks is nearer than `tau` to what the blocks of
    columns carry (the root of the Jensen-Shannon divergence), only `least` of both are listed, and beside them the best
    pairs of all means that carry no more than `p`. Sources: Lai et al., "FlexPrefill: A Context-Aware Sparse Attention
    Mechanism for Efficient Long-Sequence Inference" (ICLR 2025); with `columns` and `slashes` Jiang et al., "MInference
    1.0" (NeurIPS 2024), which sees those tokens alone, where here their blocks are seen.

    Attributes:
        p: Share of the attention, above 0 and at most 1.
        tau: Divergence below which pairs of means are listed; 0 never does.
        least: Blocks of columns, and of diagonals, that are listed at least: a fraction of all, rounded up, or a count.
        most: The same at most.
        columns: Columns that are listed instead, in tokens, the first 30 among them; None for `p`.
        slashes: Distances to the query that are listed instead, in tokens, the first 100 among them.
        block: Tokens of a block.

    Raises:
        ValueError: If a parameter is out of range.
    """

    p: float = 0.9
    tau: float = 0.1
    least: int | float = 8
    most: int | float = 1.0
    columns: int | None = None
    slashes: int | None = None
    block: PerAxis | None = 128

    score: ClassVar[str] = "mean"
    always: ClassVar[str | None] = None
    per: ClassVar[str] = "row"
    rest: ClassVar[str] = "drop"
    every: ClassVar[int] = 1
    drift: ClassVar[float] = 0.3
    share: ClassVar[int | str] = 1
    key_block: ClassVar[PerAxis | None] = None
    causal: ClassVar[bool | tuple[bool, ...]] = True
    name: ClassVar[str] = "verticalslash"

    def __post_init__(self) -> None:
        for name, low in (("p", False), ("tau", True)):
            value = getattr(self, name)
            if not is_number(value) or not 0 <= value <= 1 or (value == 0 and not low):
                raise ValueError(f"{name}={value!r} must be a number {'from' if low else 'above'} 0 and at most 1")
            object.__setattr__(self, name, real_number(value))
        for name in ("least", "most"):
            object.__setattr__(self, name, share_or_count(getattr(self, name), name))
        if (self.columns is None) != (self.slashes is None):
            raise ValueError("columns and slashes are numbers of tokens: give both, or none and p")
        for name in ("columns", "slashes", "block"):
            value = getattr(self, name)
            if isinstance(value, tuple | list) or (value is None and name == "block"):
                raise ValueError(f"{name}={value!r} must be one whole number of tokens of the flat sequence")
            if value is not None:
                object.__setattr__(self, name, whole_numbers(value, name, 1))

    def most_listed(self, blocks: Blocks) -> int:
        """Any number: columns and diagonals meet."""
        return blocks.columns

    def least_listed(self, blocks: Blocks) -> int:
        """The first column, where that is not the diagonal too."""
        return 1

    def expected(self, blocks: Blocks) -> float:
        """A tenth of the columns and of the diagonals, within the limits; of given ones as if they were neighbours."""
        if self.columns is not None and self.slashes is not None:
            return min(1.0, (self.columns + self.slashes) / blocks.grid[0])
        low, high = (number_of(n, blocks.columns) for n in (self.least, self.most))
        return min(1.0, 2 * min(high, max(low, blocks.columns / 10)) / blocks.columns)

    @property
    def estimated(self) -> str:
        """What `expected` assumes."""
        return "which blocks are listed, and how many, depends on q and k, head by head; density is a guess"

    def marked(
        self,
        scores: torch.Tensor,
        seen: Seen,
        forced: torch.Tensor | None,
        blocks: Blocks,
        variance: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Nothing: it is not pairs of blocks that have scores."""
        raise AssertionError("columns and diagonals are listed by the attention of the last queries")

    def chosen_by_torch(
        self, q: torch.Tensor, k: torch.Tensor, blocks: Blocks, valid: torch.Tensor | None, scale: float
    ) -> Routes:
        """What the last queries attend to, some heads at a time."""
        reach, found = reachable_on(blocks, q.device), []
        assert reach is not None
        rows = q.transpose(1, 2)
        for some, head in Slices().of(rows, q.shape[1], k.shape[2]):
            own, keys = q[:, :, some], k[:, :, head]
            weights = last_attention(own, keys, blocks.queries[0], valid, scale)
            if self.columns is not None and self.slashes is not None:
                mask = self._of_tokens(weights, blocks, valid, self.columns, self.slashes)
            else:
                mask = self._of_shares(weights, own, keys, blocks, valid, scale)
            found.append(lists_of(mask & reach, blocks.columns))
        counts = torch.cat([each.counts for each in found if each.counts is not None], 1)
        return Routes(torch.cat([each.tiles for each in found], 1), counts)

    def _of_tokens(
        self, weights: Weights, blocks: Blocks, valid: torch.Tensor | None, columns: int, slashes: int
    ) -> torch.Tensor:
        """Blocks that the best columns and distances of tokens meet: bool [B, h, rows, columns]."""
        token = torch.arange(blocks.grid[0], device=weights.columns.device)
        side, number = blocks.queries[0], blocks.columns
        column, slash = tokens_of(weights, columns, slashes, valid)
        sums = [torch.zeros(*column.shape[:2], number + 1, device=column.device) for _ in range(3)]
        vertical = sums[0].index_add(2, token // side, column.to(sums[0].dtype))[..., :number] > 0
        # A distance that is no multiple of a block meets two diagonals of blocks.
        low = sums[1].index_add(2, token // side, slash.to(sums[1].dtype))
        high = sums[2].index_add(2, (token + side - 1) // side, slash.to(sums[2].dtype))
        return vertical[:, :, None] | _diagonals((low + high)[..., :number] > 0)

    def _of_shares(
        self,
        weights: Weights,
        q: torch.Tensor,
        k: torch.Tensor,
        blocks: Blocks,
        valid: torch.Tensor | None,
        scale: float,
    ) -> torch.Tensor:
        """Blocks of columns and diagonals that carry the share, or pairs of means: bool [B, h, rows, columns]."""
        number = blocks.columns
        low, high = (number_of(n, number) for n in (self.least, self.most))
        low = min(low, high)
        block = torch.arange(blocks.grid[0], device=q.device) // blocks.queries[0]
        both = weights.columns, weights.slashes
        whole = [x.new_zeros(*x.shape[:2], number).index_add(2, block, x) for x in both]
        wanted = [(_needed(x, self.p) // COUNTED + 1).clamp(low, high) for x in both]
        mean_q, mean_k = (means(x, *side, 1, valid)[0][:, :, 0] for x, side in zip((q, k), blocks.sides, strict=True))
        scores = scale * torch.einsum("bihd,bjhd->bhij", mean_q, mean_k)
        reach = reachable_on(blocks, q.device)
        assert reach is not None
        there = torch.ones(1, number, dtype=torch.bool, device=q.device)
        if valid is not None:
            there = torch.zeros(len(valid), number, device=q.device).index_add(1, block, valid.float()) > 0
        pairs = _shares(scores, reach & there[:, None, None]).masked_fill(~there[:, None, :, None], 0)
        last = _shares(scale * torch.einsum("bhd,bjhd->bhj", weights.query, mean_k), there[:, None])
        near = _divergence(last, whole[0]) < self.tau
        marks = []
        # Every distance is there, whatever padding is.
        for x, count, some in zip(whole, wanted, (there, torch.ones_like(there)), strict=True):
            count = count.masked_fill(near, low)
            order = _first_ones(x, some, 1).sort(dim=-1, descending=True, stable=True).indices
            rank = torch.zeros_like(order).scatter(2, order, torch.arange(number, device=x.device).expand_as(order))
            marks.append(rank < count[..., None])
        found = marks[0][:, :, None] | _diagonals(marks[1])
        flat = pairs.flatten(2) / there.sum(-1)[:, None, None].clamp(min=1)
        value, order = flat.sort(dim=-1, descending=True, stable=True)
        under = torch.zeros_like(flat, dtype=torch.bool).scatter(2, order, value.cumsum(-1) <= bar_of(self.p))
        return found | (under.view(pairs.shape) & near[..., None, None])


def last_attention(q: torch.Tensor, k: torch.Tensor, last: int, valid: torch.Tensor | None, scale: float) -> Weights:
    """What the last queries of a causal line attend to, by the token and by how far back it is.

    Args:
        q: Queries [B, tokens, h, D].
        k: Keys, alike.
        last: How many queries; of those that are valid.
        valid: bool [B, tokens], or None for all.
        scale: Factor on the logits.
    """
    batch, tokens, heads, _ = q.shape
    dtype, last = wide_dtype(q), min(last, tokens)
    there = torch.ones(batch, tokens, dtype=torch.bool, device=q.device) if valid is None else valid
    # Valid tokens last, in their order.
    place = there.to(torch.uint8).sort(dim=1, stable=True).indices[:, -last:]
    real = there.gather(1, place)[:, None, :, None]
    own = q.gather(1, place[..., None, None].expand(-1, -1, *q.shape[2:]))
    logits = scale * torch.einsum("bihd,bjhd->bhij", own.to(dtype), k.to(dtype))
    back = place[..., None] - torch.arange(tokens, device=q.device)
    hidden = ((back < 0) | ~there[:, None])[:, None]
    weights = logits.masked_fill(hidden, float("-inf")).softmax(-1).nan_to_num(0.0).masked_fill(~real, 0)
    weights = weights / real.sum(2, keepdim=True).clamp(min=1)
    index = back.clamp(min=0).flatten(1)[:, None].expand(-1, heads, -1)
    slashes = weights.new_zeros(batch, heads, tokens).scatter_add(2, index, weights.flatten(2))
    mean = own.to(dtype).transpose(1, 2).masked_fill(~real, 0).sum(2) / real.sum(2).clamp(min=1)
    return Weights(weights.sum(2), slashes, mean)


def tokens_of(
    weights: Weights, columns: int, slashes: int, valid: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """The columns and the distances that carry most, the first ones among them: bool [B, h, tokens] each.

    Args:
        weights: What the last queries attend to.
        columns: How many columns; padding comes last, and the first ones are those of valid tokens.
        slashes: How many distances.
        valid: bool [B, tokens], or None for all.
    """
    every = torch.ones(1, weights.columns.shape[2], dtype=torch.bool, device=weights.columns.device)
    sides = (
        (weights.columns, columns, FIRST_COLUMNS, every if valid is None else valid),
        (weights.slashes, slashes, FIRST_SLASHES, every),
    )
    found = [best(_first_ones(x, there, first), min(number, x.shape[2])) for x, number, first, there in sides]
    return found[0], found[1]


def _first_ones(x: torch.Tensor, there: torch.Tensor, number: int) -> torch.Tensor:
    """Weights [B, h, n] for a ranking: first the first `number` of what is there, bool [1 or B, n]; padding last."""
    first = there & (there.cumsum(-1) <= number)
    return x.masked_fill(first[:, None], float("inf")).masked_fill(~there[:, None], -1)


def _needed(weights: torch.Tensor, share: float) -> torch.Tensor:
    """How many of the largest pass a share: int64 [B, h]."""
    return (weights.sort(dim=-1, descending=True).values.cumsum(-1) <= bar_of(share)).sum(-1) + 1


def _shares(scores: torch.Tensor, seen: torch.Tensor) -> torch.Tensor:
    """Softmax over the blocks that are seen, zeros where none is."""
    return scores.masked_fill(~seen, float("-inf")).softmax(-1).nan_to_num(0.0)


def _diagonals(listed: torch.Tensor) -> torch.Tensor:
    """Blocks on diagonals that are listed by their distance [B, h, blocks]: bool [B, h, rows, columns]."""
    index = torch.arange(listed.shape[2], device=listed.device)
    return listed[..., (index[:, None] - index).clamp(min=0)]


def _divergence(p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    """The root of the Jensen-Shannon divergence of distributions [B, h, n]: [B, h]."""
    middle = (p + q) / 2
    parts = [torch.xlogy(x, x / middle.clamp(min=1e-30)).sum(-1) for x in (p, q)]
    return ((parts[0] + parts[1]) / 2).clamp(min=0).sqrt()
