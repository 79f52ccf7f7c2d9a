"""Scores of pairs of blocks: how much of a query block's attention a key block may hold."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from visattn.patterns.choice.blocks import Blocks
from visattn.patterns.choice.pooling import bounds, sums

# Scores that exist at a time, in numbers: few on a CPU, whose caches are small, many where launches cost.
SCORES = {"cpu": 2**22}
SCORES_ELSEWHERE = 2**26


@dataclass(frozen=True)
class Score:
    """A rule for scores.

    Attributes:
        name: mean, parts or bounds.
        query_parts: Parts of a query block.
        key_parts: Parts of a key block.
    """

    name: str
    query_parts: int = 1
    key_parts: int = 1

    @classmethod
    def of(cls, text: object) -> Score:
        """The rule that a text like "parts(4x4)" names.

        Raises:
            ValueError: If it names none.
        """
        found = re.fullmatch(r"(mean|bounds)|parts\((\d+)x(\d+)\)", text) if isinstance(text, str) else None
        if not found or (found[2] and not (int(found[2]) and int(found[3]))):
            raise ValueError(
                f"score={text!r} must be mean, bounds, or parts(4x4) with the parts of a query and of a key block"
            )
        return cls(found[1]) if found[1] else cls("parts", int(found[2]), int(found[3]))

    def check(self, blocks: Blocks) -> None:
        """Raise a ValueError if blocks cannot be cut in these parts."""
        for name, parts, box in (("query", self.query_parts, blocks.queries), ("key", self.key_parts, blocks.keys)):
            if math.prod(box) % parts:
                raise ValueError(
                    f"score=parts({self.query_parts}x{self.key_parts}) cuts {name} blocks of {math.prod(box)} tokens "
                    f"in {parts} parts of equal length: give a divisor of {math.prod(box)}"
                )


@dataclass(frozen=True, eq=False)
class Seen:
    """Which blocks take part.

    Attributes:
        rows: Query blocks with valid tokens: bool [B, rows], None where all are.
        columns: Key blocks with valid tokens: bool [B, columns], None where all are.
    """

    rows: torch.Tensor | None = None
    columns: torch.Tensor | None = None


def block_scores(
    score: Score, q: torch.Tensor, k: torch.Tensor, blocks: Blocks, valid: torch.Tensor | None, scale: float
) -> tuple[Seen, Iterator[torch.Tensor]]:
    """Scores of all pairs of blocks, some heads at a time.

    Args:
        score: The rule.
        q: Grid queries [B, tokens, H, D].
        k: Grid keys [B, tokens, Hkv, D].
        blocks: The blocks.
        valid: Tokens that take part, bool [B, tokens], or None for all.
        scale: Factor on the logits.

    Returns:
        Which blocks take part, and the scores [B, some heads, rows, columns] in float32 at least; those of blocks that
        do not take part mean nothing.
    """
    query, query_count = _means(q, blocks.grid, blocks.queries, score.query_parts, valid)
    key_count = _counts(k, blocks.grid, blocks.keys, score.key_parts, valid)
    seen = Seen() if valid is None else Seen(query_count.sum(-1) > 0, key_count.sum(-1) > 0)
    query = (query * scale).permute(0, 3, 1, 2, 4)
    if score.name == "bounds":
        low, high = (t.permute(0, 2, 3, 1) for t in bounds(k, blocks.grid, blocks.keys, valid))
        return seen, _bounded(query[:, :, :, 0], low, high)
    keys, _ = _means(k, blocks.grid, blocks.keys, score.key_parts, valid)
    keys = keys.permute(0, 3, 4, 1, 2)
    return seen, _products(query, keys, query_count > 0, key_count > 0)


def block_means(
    x: torch.Tensor, grid: tuple[int, ...], box: tuple[int, ...], valid: torch.Tensor | None
) -> torch.Tensor:
    """Means over the valid tokens of each block of tokens [B, tokens, H, D], zero where there are none."""
    return _means(x, grid, box, 1, valid)[0][:, :, 0]


def _counts(
    x: torch.Tensor, grid: tuple[int, ...], box: tuple[int, ...], parts: int, valid: torch.Tensor | None
) -> torch.Tensor:
    """Valid tokens of each part: [1 or B, blocks, parts]."""
    wide = torch.promote_types(x.dtype, torch.float32)
    ones = torch.ones(1, x.shape[1], dtype=wide, device=x.device) if valid is None else valid.to(wide)
    return sums(ones[..., None, None], grid, box, parts)[..., 0, 0]


def _means(
    x: torch.Tensor, grid: tuple[int, ...], box: tuple[int, ...], parts: int, valid: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Means over the valid tokens of each part [B, blocks, parts, H, D], zero where there are none; their counts."""
    x = x if valid is None else x.masked_fill(~valid[..., None, None], 0)
    count = _counts(x, grid, box, parts, valid)
    return sums(x, grid, box, parts) / count.clamp(min=1)[..., None, None], count


def _slices(query: torch.Tensor, columns: int, kv_heads: int) -> Iterator[tuple[slice, torch.Tensor]]:
    """Some query heads at a time, and the key head of each: queries [B, H, ...]."""
    batch, heads = query.shape[:2]
    rows = query.shape[2:-1].numel()
    budget = SCORES.get(query.device.type, SCORES_ELSEWHERE)
    each = max(1, budget // max(1, batch * rows * columns))
    group = heads // kv_heads
    for first in range(0, heads, each):
        some = slice(first, min(first + each, heads))
        yield some, torch.arange(some.start, some.stop, device=query.device) // group


def _products(
    query: torch.Tensor, keys: torch.Tensor, query_part: torch.Tensor, key_part: torch.Tensor
) -> Iterator[torch.Tensor]:
    """Means of parts [B, H, rows, a, D] and [B, Hkv, D, columns, b]: the logarithm of the sum of all a b weights."""
    a, (columns, b) = query.shape[3], keys.shape[3:]
    for some, head in _slices(query, columns * b, keys.shape[1]):
        own = keys if keys.shape[1] == query.shape[1] == some.stop - some.start else keys[:, head]
        found = query[:, some].flatten(2, 3) @ own.flatten(3)
        if a == b == 1:
            yield found
            continue
        found = found.unflatten(3, (columns, b)).unflatten(2, (-1, a))
        there = query_part[:, None, :, :, None, None] & key_part[:, None, None, None]
        yield found.masked_fill(~there, float("-inf")).logsumexp((3, 5))


def _bounded(query: torch.Tensor, low: torch.Tensor, high: torch.Tensor) -> Iterator[torch.Tensor]:
    """Mean queries [B, H, rows, D] and bounds [B, Hkv, D, columns]: the most that a key within them could reach."""
    for some, head in _slices(query, low.shape[3], low.shape[1]):
        own = query[:, some]
        yield own.clamp(min=0) @ high[:, head] + own.clamp(max=0) @ low[:, head]
