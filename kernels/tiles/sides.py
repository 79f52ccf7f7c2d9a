"""Tensors of a call's queries, of its keys or of all of it, cut to pieces of problems and put together again."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch

from visattn.kernels.plan_chunks import PRODUCTS
from visattn.kernels.tiles.batches import Batch, Part
from visattn.kernels.tiles.moves import Shapes, accumulate


class Place(NamedTuple):
    """Where the tokens of the problems of one part are.

    Attributes:
        part: The problems.
        queries: Rows of q [B * S] of every slot: [n * T].
        target: Rows of the result [B * S + 1]; empty slots go to the last one: [n * T].
        keys: Rows of k [B * N]: [n * L].
    """

    part: Part
    queries: torch.Tensor
    target: torch.Tensor
    keys: torch.Tensor


class Piece(NamedTuple):
    """Some rows of some problems of one part.

    Attributes:
        part: The problems.
        shapes: Their sizes.
        problems: Which of the n problems.
        rows: Which rows of each, of (H / Hkv) T.
    """

    part: Part
    shapes: Shapes
    problems: slice
    rows: slice

    def of_rows(self, x: torch.Tensor) -> torch.Tensor:
        """What belongs to the piece of a tensor [1 or n, 1 or Hkv, 1 or rows, ...]."""
        x = x if len(x) == 1 else x[self.problems]
        return x if x.shape[2] == 1 else x[:, :, self.rows]


def places(batch: Batch, k: torch.Tensor) -> Iterator[Place]:
    """The parts of a batch."""
    keys = batch.keys
    if keys is None:
        assert batch.samples is not None and len(batch.parts) == 1
        sample = torch.arange(batch.samples.start, batch.samples.stop, device=k.device)[:, None] * k.shape[1]
        keys = (sample + torch.arange(batch.parts[0].group.length, device=k.device)).flatten()
    queries, target = (rows.split(batch.query_rows) for rows in (batch.queries, batch.target))
    for each in zip(batch.parts, queries, target, keys.split(batch.key_rows), strict=True):
        yield Place(*each)


def pieces(part: Part, shapes: Shapes) -> Iterator[Piece]:
    """Cut the problems of a part so that a piece has at most `PRODUCTS` scores, but at least one row of scores."""
    rows, each = shapes.each * part.slots, shapes.kv_heads * part.group.length
    some = max(1, min(rows, PRODUCTS // max(1, each)))
    number = max(1, PRODUCTS // max(1, each * some)) if some == rows else 1
    for first in range(0, part.count, number):
        for row in range(0, rows, some):
            yield Piece(part, shapes, slice(first, first + number), slice(row, row + some))


@dataclass(frozen=True)
class PerQuery:
    """Tensors [B, S, H, ...]."""

    shapes: Shapes
    like: torch.Tensor

    def rows(self, x: torch.Tensor) -> torch.Tensor:
        """One row per token."""
        return x.flatten(0, 1).flatten(1)

    def problems(self, rows: torch.Tensor, place: Place) -> torch.Tensor:
        """[n, Hkv, (H / Hkv) T, channels]; 0 in empty slots, which therefore add nothing to any gradient of keys."""
        own = rows[place.queries].to(self.shapes.wide)
        if place.part.group.short_queries:
            own = own.masked_fill((place.target == len(rows))[:, None], 0)
        return self.shapes.queries(own, place.part.slots)

    def cut(self, x: torch.Tensor, piece: Piece) -> torch.Tensor:
        """A piece of problems, as a view."""
        return x[piece.problems, :, piece.rows]

    def total(self) -> torch.Tensor:
        """Where results of all problems are collected; the last row takes what empty slots compute."""
        rows = self.like.shape[0] * self.like.shape[1]
        return self.like.new_zeros(rows + 1, self.like.shape[2:].numel(), dtype=self.shapes.wide)

    def add(self, total: torch.Tensor, problems: torch.Tensor, place: Place) -> None:
        """Put results of problems where they belong."""
        total.index_copy_(0, place.target, self.shapes.query_rows(problems, place.part.slots))

    def whole(self, total: torch.Tensor) -> torch.Tensor:
        """The collected results as a tensor like the given ones."""
        return total[:-1].view(self.like.shape).to(self.like.dtype)


class PerKey(PerQuery):
    """Tensors [B, N, Hkv, D]."""

    def problems(self, rows: torch.Tensor, place: Place) -> torch.Tensor:
        """[n, Hkv, L, D]."""
        return self.shapes.keys(rows[place.keys].to(self.shapes.wide), place.part.group.length)

    def cut(self, x: torch.Tensor, piece: Piece) -> torch.Tensor:
        """All keys of a piece of problems."""
        return x[piece.problems]

    def add(self, total: torch.Tensor, problems: torch.Tensor, place: Place) -> None:
        """Add up what the problems that share a key give it, in a fixed order."""
        accumulate(total, place.keys, problems.transpose(1, 2).flatten(0, 1).flatten(1))


class OfAll(PerQuery):
    """Tensors that all problems share: the relative position bias."""

    def rows(self, x: torch.Tensor) -> torch.Tensor:
        """As it is."""
        return x.to(self.shapes.wide)

    def problems(self, rows: torch.Tensor, place: Place) -> torch.Tensor:
        """As it is."""
        return rows

    def cut(self, x: torch.Tensor, piece: Piece) -> torch.Tensor:
        """As it is."""
        return x

    def total(self) -> torch.Tensor:
        """Zeros."""
        return torch.zeros_like(self.like, dtype=self.shapes.wide)

    def add(self, total: torch.Tensor, problems: torch.Tensor, place: Place) -> None:
        """The sum over the problems."""
        total += problems

    def whole(self, total: torch.Tensor) -> torch.Tensor:
        """In the given dtype."""
        return total.to(self.like.dtype)
