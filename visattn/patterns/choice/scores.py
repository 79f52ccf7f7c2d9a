"""Scores of pairs of blocks: how much of a query block's attention a key block may hold."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch

from visattn.operands import widened
from visattn.patterns.choice import diagonal, lowbit, tree
from visattn.patterns.choice.blocks import Blocks
from visattn.patterns.choice.picks import Seen
from visattn.patterns.choice.pooling import bounds, counts, means
from visattn.patterns.choice.slices import Slices

TEXT = re.compile(r"(mean|bounds)|parts\((\d+)x(\d+)\)|(diagonal|lowbit|tree)\((\d+)\)")
# Bits of integers that are no more than the numbers they stand for.
MOST_BITS = 8


@dataclass(frozen=True)
class Score:
    """A rule for scores.

    Attributes:
        name: mean, parts, bounds, diagonal, lowbit or tree.
        query_parts: Parts of a query block.
        key_parts: Parts of a key block.
        number: Tokens of a diagonal, bits, or children of a node.
    """

    name: str
    query_parts: int = 1
    key_parts: int = 1
    number: int = 0

    @classmethod
    def of(cls, text: object) -> Score:
        """The rule that a text like "parts(4x4)" names.

        Raises:
            ValueError: If it names none.
        """
        found = TEXT.fullmatch(text) if isinstance(text, str) else None
        if not found or (found[2] and not (int(found[2]) and int(found[3]))):
            raise ValueError(
                f"score={text!r} must be mean, bounds, parts(4x4) with the parts of a query and of a key block, "
                "diagonal(8), lowbit(4) or tree(2)"
            )
        if found[1]:
            return cls(found[1])
        if found[2]:
            return cls("parts", int(found[2]), int(found[3]))
        name, number = found[4], int(found[5])
        low, high = {"diagonal": (1, math.inf), "lowbit": (2, MOST_BITS), "tree": (2, math.inf)}[name]
        if not low <= number <= high:
            limit = f"at least {low}" if high == math.inf else f"from {low} to {high}"
            raise ValueError(f"score={text}: the number must be {limit}")
        return cls(name, number=number)

    def check(self, blocks: Blocks) -> None:
        """Raise a ValueError if blocks cannot be cut in these parts."""
        for name, parts, box in (("query", self.query_parts, blocks.queries), ("key", self.key_parts, blocks.keys)):
            if math.prod(box) % parts:
                raise ValueError(
                    f"score=parts({self.query_parts}x{self.key_parts}) cuts {name} blocks of {math.prod(box)} tokens "
                    f"in {parts} parts of equal length: give a divisor of {math.prod(box)}"
                )
            if self.name == "diagonal" and math.prod(box) % self.number:
                raise ValueError(
                    f"score=diagonal({self.number}) cuts {name} blocks of {math.prod(box)} tokens in runs of "
                    f"{self.number}: give a divisor of {math.prod(box)}"
                )


class Scored(NamedTuple):
    """Scores of some heads.

    Attributes:
        scores: [B, h, rows, columns] in float32 at least; those of blocks that take no part mean nothing.
        heads: Which query heads they are of.
    """

    scores: torch.Tensor
    heads: slice


def block_scores(
    score: Score,
    q: torch.Tensor,
    k: torch.Tensor,
    blocks: Blocks,
    valid: torch.Tensor | None,
    scale: float,
    slices: Slices | None = None,
    leaves: int = 0,
) -> tuple[Seen, Iterator[Scored]]:
    """Scores of all pairs of blocks, some heads at a time.

    Args:
        score: The rule.
        q: Grid queries [B, tokens, H, D].
        k: Grid keys [B, tokens, Hkv, D].
        blocks: The blocks.
        valid: Tokens that take part, bool [B, tokens], or None for all.
        scale: Factor on the logits.
        slices: How many heads at a time.
        leaves: Key blocks that a tree looks for in each row.

    Returns:
        Which blocks take part, and the scores.
    """
    slices = slices or Slices()
    found: Iterator[Scored]
    query, query_count = means(q, blocks.grid, blocks.queries, score.query_parts, valid)
    key_count = counts(k, blocks.grid, blocks.keys, score.key_parts, valid)
    seen = Seen() if valid is None else Seen(query_count.sum(-1) > 0, key_count.sum(-1) > 0)
    if score.name in ("diagonal", "lowbit"):
        make = diagonal.scores if score.name == "diagonal" else lowbit.scores
        # In half precision the factor would round the queries.
        own = widened(q) * scale
        found = (Scored(*each) for each in make(score.number, own, k, blocks, valid, slices))
        return seen, found
    query = (query * scale).permute(0, 3, 1, 2, 4)
    if score.name == "bounds":
        low, high = (t.permute(0, 2, 3, 1) for t in bounds(k, blocks.grid, blocks.keys, valid))
        return seen, _bounded(query[:, :, :, 0], low, high, slices)
    keys, _ = means(k, blocks.grid, blocks.keys, score.key_parts, valid)
    keys = keys.permute(0, 3, 4, 1, 2)
    if score.name == "tree":
        levels = tree.levels(keys[..., 0], key_count[..., 0], score.number, leaves)
        each = slices.of(query, keys.shape[3], keys.shape[1])
        made = ((tree.scores(query[:, some, :, 0], levels, head, score.number, leaves), some) for some, head in each)
        return seen, (Scored(*each) for each in made)
    return seen, _products(query, keys, query_count > 0, key_count > 0, slices)


def block_means(
    x: torch.Tensor, grid: tuple[int, ...], box: tuple[int, ...], valid: torch.Tensor | None
) -> torch.Tensor:
    """Means over the valid tokens of each block of tokens [B, tokens, H, D], zero where there are none."""
    return means(x, grid, box, 1, valid)[0][:, :, 0]


def _products(
    query: torch.Tensor, keys: torch.Tensor, query_part: torch.Tensor, key_part: torch.Tensor, slices: Slices
) -> Iterator[Scored]:
    """Means of parts [B, H, rows, a, D] and [B, Hkv, D, columns, b]: the logarithm of the sum of all a b weights."""
    a, (columns, b) = query.shape[3], keys.shape[3:]
    for some, head in slices.of(query, columns * b, keys.shape[1]):
        own = keys if keys.shape[1] == query.shape[1] == some.stop - some.start else keys[:, head]
        found = query[:, some].flatten(2, 3) @ own.flatten(3)
        if a == b == 1:
            yield Scored(found, some)
            continue
        found = found.unflatten(3, (columns, b)).unflatten(2, (-1, a))
        there = query_part[:, None, :, :, None, None] & key_part[:, None, None, None]
        yield Scored(found.masked_fill(~there, float("-inf")).logsumexp((3, 5)), some)


def _bounded(query: torch.Tensor, low: torch.Tensor, high: torch.Tensor, slices: Slices) -> Iterator[Scored]:
    """Mean queries [B, H, rows, D] and bounds [B, Hkv, D, columns]: the most that a key within them could reach."""
    for some, head in slices.of(query, low.shape[3], low.shape[1]):
        own = query[:, some]
        yield Scored(own.clamp(min=0) @ high[:, head] + own.clamp(max=0) @ low[:, head], some)
