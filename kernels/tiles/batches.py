"""Problems cut in batches that stay in the cache."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from itertools import chain
from typing import Any

import torch

from visattn.kernels.tiles.groups import Group, Problems
from visattn.kernels.tiles.heads import ALL_HEADS, Heads
from visattn.kernels.tiles.moves import Shapes

# Gathered keys and values of one batch of problems, in bytes: they stay in a CPU's caches, and in memory that the
# allocator keeps mapped from call to call.
BATCH_BYTES = {"cpu": 2 * 2**20}
BATCH_BYTES_ELSEWHERE = 256 * 2**20
# Batches are kept for the next call if their indices and masks take no more bytes than this, for so many shapes.
KEPT_BYTES = 8 * 2**20
KEPT_SHAPES = 2


@dataclass(frozen=True, eq=False)
class Work:
    """Everything about a call besides its floating-point tensors.

    Attributes:
        problems: What to compute.
        scale: Factor on the scores.
        key_mask: bool [B, keys], or None.
        lse: Whether the log-sum-exp is wanted.
        heads: Who shares the lists of routed groups.
    """

    problems: Problems
    scale: float
    key_mask: torch.Tensor | None
    lse: bool = True
    heads: Heads = ALL_HEADS

    def listed(self) -> Work:
        """The same without the problems of routed groups."""
        if not self.problems.routed:
            return self
        return replace(self, problems=Problems(tuple(group for group in self.problems.groups if not group.routed)))


@dataclass(frozen=True, eq=False)
class Part:
    """Problems of one shape within a batch.

    Attributes:
        group: Their group.
        count: Number of problems n.
        bias: Added to the scores: [1 or n, 1 or Hkv, 1 or (H / Hkv) T, L], or None.
        hidden: Rows that see no key: bool [1 or n, 1, 1 or (H / Hkv) T], or None where there is none.
        slots: Queries of a problem.
        length: Keys of a problem.
    """

    group: Group
    count: int
    bias: torch.Tensor | None
    hidden: torch.Tensor | None
    slots: int = field(init=False)
    length: int = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "slots", self.group.queries.shape[1])
        object.__setattr__(self, "length", self.group.length)


@dataclass(frozen=True, eq=False)
class Batch:
    """Problems whose tokens are gathered together; rows are ordered by part, problem and slot.

    Attributes:
        parts: The problems by shape.
        queries: Rows of q [B * S] of every slot: [slots].
        target: Rows of the result [B * S + 1]; empty slots go to the last one: [slots].
        keys: Rows of k and v [B * N]: [keys], or None for the leading ones of each sample.
        samples: The samples of the problems where `keys` is None, else None.
        query_rows: Rows of `queries` of each part.
        key_rows: Rows of `keys` of each part.
        targets: `target` of each part.
    """

    parts: tuple[Part, ...]
    queries: torch.Tensor
    target: torch.Tensor
    keys: torch.Tensor | None
    samples: slice | None = None
    query_rows: list[int] = field(init=False)
    key_rows: list[int] = field(init=False)
    targets: tuple[torch.Tensor, ...] = field(init=False)

    def __post_init__(self) -> None:
        rows = [part.count * part.slots for part in self.parts]
        object.__setattr__(self, "query_rows", rows)
        object.__setattr__(self, "key_rows", [part.count * part.length for part in self.parts])
        object.__setattr__(self, "targets", self.target.split_with_sizes(rows))

    @property
    def tensors(self) -> list[torch.Tensor]:
        """Its tensors."""
        own = [self.queries, self.target, self.keys, *(t for part in self.parts for t in (part.bias, part.hidden))]
        return [t for t in own if t is not None]


def batch_size(keys: int, row: int, device: str) -> int:
    """Problems of so many keys that run together, where a key and its value have `row` bytes."""
    return max(1, BATCH_BYTES.get(device, BATCH_BYTES_ELSEWHERE) // (max(1, keys) * row))


def batches(work: Work, q: torch.Tensor, k: torch.Tensor, rpb: torch.Tensor | None) -> Iterator[Batch]:
    """Cut all problems in batches.

    Args:
        work: The call.
        q: Queries [B, S, H, D].
        k: Keys [B, N, Hkv, D].
        rpb: Relative position bias, or None.
    """
    shapes, row = Shapes(q, k), 2 * k.shape[2] * k.shape[3] * k.element_size()
    alone = work.problems.groups
    if work.key_mask is None and rpb is None:
        yield from _kept(work.problems, q, k, row, shapes)
        alone = tuple(group for group in alone if group.routed)
    for group in alone:
        size = batch_size(group.length, row, q.device.type)
        yield from _by_sample(group, work.key_mask, q, k, rpb, size, shapes)


def _kept(problems: Problems, q: torch.Tensor, k: torch.Tensor, row: int, shapes: Shapes) -> Iterable[Batch]:
    """The batches that depend on nothing but shapes: cut once, then kept with the problems."""
    budget = batch_size(1, row, q.device.type)
    shape = q.shape[0], q.shape[1], k.shape[1], budget, shapes.each, shapes.wide
    return problems.kept.get(shape) or _cut(problems, q, k, row, shapes, shape)


def _cut(problems: Problems, q: torch.Tensor, k: torch.Tensor, row: int, shapes: Shapes, shape: Any) -> Iterator[Batch]:
    """The same batches, which are kept if they are small."""
    budget = batch_size(1, row, q.device.type)
    made: list[Batch] = []
    sizes: dict[int, int] = {}
    whole = (group for group in problems.groups if group.whole)
    sizes_of = ((group, batch_size(group.length, row, q.device.type)) for group in whole)
    alone = (_by_sample(group, None, q, k, None, size, shapes) for group, size in sizes_of)
    for batch in chain(_shared(problems, q, k, budget, shapes), *alone):
        # Parts of a group share their bias.
        sizes |= {t.data_ptr(): t.numel() * t.element_size() for t in batch.tensors}
        made = [*made, batch] if sum(sizes.values()) <= KEPT_BYTES else []
        yield batch
    if sum(sizes.values()) <= KEPT_BYTES:
        if len(problems.kept) >= KEPT_SHAPES:
            problems.kept.clear()
        problems.kept[shape] = made


def _shared(problems: Problems, q: torch.Tensor, k: torch.Tensor, budget: int, shapes: Shapes) -> Iterator[Batch]:
    """Batches that groups share as long as there is room.

    Args:
        problems: The problems.
        q: Queries [B, S, H, D].
        k: Keys [B, N, Hkv, D].
        budget: Keys of a batch.
        shapes: Moves between tokens and problems.
    """
    parts: list[Part] = []
    rows: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []
    free = budget
    for group in problems.groups:
        if not group.listed:
            continue
        bias, hidden = shapes.bias(group.visible(None), None, group) if group.mask is None else (None, None)
        number = torch.arange(q.shape[0] * len(group.queries), device=q.device)
        for some in number.split(max(1, budget // group.length)):
            need = len(some) * group.length
            if need > free and parts:
                yield _joined(parts, rows)
                parts, rows, free = [], [], budget
            sample, tile = some // len(group.queries), some % len(group.queries)
            if group.mask is not None:
                bias, hidden = shapes.bias(group.visible(tile), None, group)
            parts.append(Part(group, len(some), bias, hidden))
            rows.append(_rows(group, tile, sample[:, None], q, k))
            free -= need
    if parts:
        yield _joined(parts, rows)


def _rows(
    group: Group, tile: torch.Tensor, sample: torch.Tensor, q: torch.Tensor, k: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`queries`, `target` and `keys` of a `Batch` for tiles [n] of samples [n, 1]."""
    queries, keys = group.queries[tile], group.keys(sample, tile)
    assert keys is not None, "the keys of a whole sequence are not listed"
    from_rows = to_rows = (queries.clamp(min=0) + sample * q.shape[1]).flatten()
    if group.short_queries:
        to_rows = torch.where((queries < 0).flatten(), q.shape[0] * q.shape[1], from_rows)
    return from_rows, to_rows, (keys.clamp(min=0) + sample * k.shape[1]).flatten()


def _joined(parts: list[Part], rows: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]) -> Batch:
    queries, target, keys = (torch.cat(each) for each in zip(*rows, strict=True))
    return Batch(tuple(parts), queries, target, keys)


def _by_sample(
    group: Group,
    key_mask: torch.Tensor | None,
    q: torch.Tensor,
    k: torch.Tensor,
    rpb: torch.Tensor | None,
    size: int,
    shapes: Shapes,
) -> Iterator[Batch]:
    """Batches of problems of one sample each, which may have keys and masks of its own."""
    bias = hidden = None
    alike = key_mask is None and group.mask is None and not group.short_keys
    alike = alike and group.counts is None and group.rest is None and not group.in_order
    if alike:
        bias, hidden = shapes.bias(group.visible(None), rpb, group)
    for own, problem in _together(group, q, size):
        sample, tile = problem // len(own.queries), problem % len(own.queries)
        queries, keys = own.queries[tile], own.keys(sample, tile)
        target = queries + sample[:, None] * q.shape[1]
        if own.short_queries:
            target = torch.where(queries < 0, q.shape[0] * q.shape[1], target)
            queries = queries.clamp(min=0)
        visible = None if alike else own.visible(tile)
        if own.routed and (shown := own.lengths(problem)) is not None:
            visible = _and(visible, shown)
        if own.routed and own.key_tiles is not None:
            rows = own.rows_see(problem, own.key_tiles.shape[1])
            if rows is not None:
                # Every query sees what is not listed.
                rows = torch.nn.functional.pad(rows, (0, own.length - rows.shape[2]), value=True)
                visible = rows if visible is None else visible & rows
        if keys is not None:
            if own.short_keys:
                visible = _and(visible, keys >= 0)
            keys = (keys.clamp(min=0) + sample[:, None] * k.shape[1]).flatten()
        if key_mask is not None:
            shown = key_mask[sample, : own.length] if keys is None else key_mask.flatten()[keys]
            visible = _and(visible, shown.view(-1, own.length))
        if not alike:
            bias, hidden = shapes.bias(visible, rpb, own)
        if own.rest is not None:
            assert bias is not None
            bias[..., own.length - own.rest.shape[1] :] += own.rest[problem][:, None, None]
        parts = (Part(own, len(problem), bias, hidden),)
        rows = (queries + sample[:, None] * q.shape[1]).flatten()
        # Only leading keys are found by their samples, and those problems are in order.
        first = int(problem[0]) if keys is None else 0
        yield Batch(parts, rows, target.flatten(), keys, slice(first, first + len(problem)))


def _together(group: Group, q: torch.Tensor, size: int) -> Iterator[tuple[Group, torch.Tensor]]:
    """Problems that run together, at most `size` unless their lists differ in length."""
    if group.counts is not None:
        yield from group.cut(size * group.length)
        return
    problems = q.shape[0] * len(group.queries)
    for start in range(0, problems, size):
        yield group, torch.arange(start, min(start + size, problems), device=q.device)


def _and(visible: torch.Tensor | None, keys: torch.Tensor) -> torch.Tensor:
    """Visibility [1 or n, T, L] without the keys that are not there [n, L]."""
    return keys[:, None] if visible is None else visible & keys[:, None]
