"""Ulysses on slabs: every rank has some tokens of all heads, and for the attention all tokens of some heads."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist

from visattn.attend import attention
from visattn.layout import Layout
from visattn.parallel.agreed import check_agreed
from visattn.parallel.moved import Moved
from visattn.parallel.once import once
from visattn.parallel.ranks import checked_rank, own_tensors
from visattn.parallel.slabs import Slabs, check_slabs
from visattn.patterns import Pattern, PerHead, parse
from visattn.plans import plan

JOINS_HEADS = (
    "what a head sees depends on the other heads (they choose together, or draw one after the other), and a rank has "
    "some of them: pass share=1 and per=head where the pattern has these, or use one process"
)


def head_shares(kv_heads: int, ranks: int, cost: tuple[float, ...] | None = None) -> tuple[int, ...]:
    """Key heads of each rank, in order, so that the most that a rank has is least.

    Args:
        kv_heads: Key heads.
        ranks: Ranks.
        cost: What each key head costs with its query heads, all the same if None.

    Raises:
        ValueError: If there are fewer heads than ranks.
    """
    if kv_heads < ranks:
        raise ValueError(
            f"{kv_heads} key heads cannot be given to {ranks} ranks, at least one each: use fewer ranks or halo"
        )
    cost = cost or (1.0,) * kv_heads
    if len(cost) != kv_heads or min(cost) < 0:
        raise ValueError(f"cost of heads {cost} must be {kv_heads} numbers of at least 0")
    # Consecutive heads: the least bound under which a greedy cut needs at most so many ranks.
    bounds = sorted({sum(cost[i:j]) for i in range(kv_heads) for j in range(i + 1, kv_heads + 1)})
    return next(found for bound in bounds if (found := _cut(cost, ranks, bound)))


def _cut(cost: tuple[float, ...], ranks: int, bound: float) -> tuple[int, ...]:
    """Consecutive heads of each rank that cost at most `bound`; empty if that is impossible."""
    shares, at = [], 0
    for rank in range(ranks):
        most = len(cost) - at - (ranks - rank - 1)
        # The last rank takes what is left.
        number, total = 1, cost[at]
        while number < most and (rank == ranks - 1 or total + cost[at + number] <= bound + 1e-9):
            total += cost[at + number]
            number += 1
        if total > bound + 1e-9:
            return ()
        shares.append(number)
        at += number
    return tuple(shares)


class Exchanged(torch.autograd.Function):
    """All-to-all of flat pieces: [sum of sends] to [sum of takes]."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, sends: list[int], takes: list[int], group: dist.ProcessGroup | None
    ) -> torch.Tensor:
        """Exchange."""
        ctx.rest = sends, takes, group
        out = x.new_empty(sum(takes))
        dist.all_to_all_single(out, x.contiguous(), takes, sends, group=group)
        return out

    @staticmethod
    @once
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """The way back."""
        sends, takes, group = ctx.rest
        back = grads[0].new_empty(sum(sends))
        dist.all_to_all_single(back, grads[0].contiguous(), sends, takes, group=group)
        return back, None, None, None


class Packed(torch.autograd.Function):
    """Tensors one behind the other in one flat tensor, each copied once: views of strided ones need no copy before."""

    @staticmethod
    def forward(ctx: Any, *pieces: torch.Tensor) -> torch.Tensor:
        """Copy."""
        ctx.shapes = [piece.shape for piece in pieces]
        out = pieces[0].new_empty(sum(piece.numel() for piece in pieces))
        for part, piece in zip(out.split([piece.numel() for piece in pieces]), pieces, strict=True):
            part.view(piece.shape).copy_(piece)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Views."""
        parts = grads[0].split([shape.numel() for shape in ctx.shapes])
        return tuple(part.view(shape) for part, shape in zip(parts, ctx.shapes, strict=True))


class Heads:
    """How the heads of one call are given to ranks.

    Args:
        slabs: How the sequence is cut.
        rank: Whose view.
        shares: Key heads of each rank.
        group: The process group.
    """

    def __init__(self, slabs: Slabs, rank: int, shares: tuple[int, ...], group: dist.ProcessGroup | None) -> None:
        self.slabs, self.rank, self.shares, self.group = slabs, rank, shares, group
        self.sent = self.received = 0
        self._grid = Slabs(Layout(slabs.layout.grid), slabs.axis, slabs.sizes)

    def gather(self, x: torch.Tensor, per: int) -> torch.Tensor:
        """All tokens of this rank's heads: [B, S, H, D] of its slab to [B, whole length, own heads, D].

        Args:
            x: All heads of this rank's tokens.
            per: Heads for each key head.
        """
        local = self.slabs.local(self.rank)
        before, grid, after = x.split([local.prefix, local.tokens, local.suffix], 1)
        heads = [per * n for n in self.shares]
        parts = self._exchange(grid.split(heads, 2), self._grids(x, heads[self.rank]))
        whole = self._grid.joined(parts)
        if not self.slabs.dense:
            return whole
        ends = [t.split(heads, 2)[self.rank] for t in (before, after)]
        return torch.cat([ends[0], whole, ends[1]], 1)

    def scatter(self, x: torch.Tensor, per: int) -> torch.Tensor:
        """The way back: [B, whole length, own heads, D] to all heads of this rank's tokens; dense tokens of all."""
        heads = [per * n for n in self.shares]
        batch, _, _, dim = x.shape
        own = [self.slabs.shard(x, r) for r in range(self.slabs.ranks)]
        length = self.slabs.local(self.rank).length
        return torch.cat(self._exchange(own, [(batch, length, n, dim) for n in heads]), 2)

    def _grids(self, x: torch.Tensor, heads: int) -> list[tuple[int, ...]]:
        locals_ = [self.slabs.local(r) for r in range(self.slabs.ranks)]
        return [(x.shape[0], one.tokens, heads, x.shape[3]) for one in locals_]

    def _exchange(self, pieces: Sequence[torch.Tensor], shapes: list[tuple[int, ...]]) -> list[torch.Tensor]:
        sends = [piece.numel() for piece in pieces]
        takes = [int(torch.Size(shape).numel()) for shape in shapes]
        size = pieces[0].element_size()
        self.sent += size * (sum(sends) - sends[self.rank])
        self.received += size * (sum(takes) - takes[self.rank])
        # Each piece is copied once, to where it is sent from.
        found: Any = Exchanged.apply(Packed.apply(*pieces), sends, takes, self.group)
        return [part.view(shape) for part, shape in zip(found.split(takes), shapes, strict=True)]


def ulysses_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    pattern: Pattern | str,
    slabs: Slabs,
    *,
    group: dist.ProcessGroup | None = None,
    scale: float | None = None,
    key_mask: torch.Tensor | None = None,
    backend: str = "auto",
    head_cost: tuple[float, ...] | None = None,
    moved: Moved | None = None,
) -> torch.Tensor:
    """Attention of a sequence that is cut in slabs, with all tokens of some heads on each rank: for any pattern.

    The layout of the tensors is that of `halo_attention`, so that layers and steps can take turns. Slabs may be
    uneven, and heads need not divide: whole key heads with their queries go to ranks.

    Args:
        q: Queries [B, S, H, D] of this rank, S = slabs.local(rank).length.
        k: Keys [B, S, Hkv, D] of the same tokens.
        v: Values [B, S, Hkv, D].
        pattern: A pattern or its text; one with parameters is refused.
        slabs: How the whole sequence is cut; one slab for each rank of the group.
        group: The process group, the default one if None.
        scale: Factor on the logits, D**-0.5 if None.
        key_mask: bool [B, S], True where a key of this rank may be attended; all ranks pass one or none does.
        backend: As in `attention`.
        head_cost: What each key head costs with its query heads: heads go to ranks by it. None for what the tiles of
            `perhead` patterns visit, or for all the same.
        moved: Gets the bytes of this rank's messages in the forward pass added.

    Returns:
        Output [B, S, H, D].

    Raises:
        ValueError: If there are fewer key heads than ranks, the pattern has parameters or heads that depend on others,
            or tensors, slabs and group do not fit together.
    """
    pattern = parse(pattern)
    check_slabs(slabs)
    _check(pattern, slabs)
    rank = checked_rank(slabs, group)
    q, k, v = own_tensors(q, k, v, slabs.local(rank), key_mask, scale)
    per = q.shape[2] // k.shape[2]
    shares = head_shares(k.shape[2], slabs.ranks, head_cost or _cost(pattern, slabs.layout, q.shape[2], per))
    alike = {"scale": scale, "key_mask": key_mask is not None, "shares": shares}
    check_agreed("ulysses_attention", (q, k, v), pattern, slabs, group, **alike)
    heads = Heads(slabs, rank, shares, group)
    if isinstance(pattern, PerHead):
        first = per * sum(shares[:rank])
        pattern = pattern.among(q.shape[2], range(first, first + per * shares[rank]))
    whole = heads.gather(q, per), heads.gather(k, 1), heads.gather(v, 1)
    mask = None if key_mask is None else _whole_mask(key_mask, slabs, group)
    out = attention(*whole, pattern, slabs.layout, scale=scale, key_mask=mask, backend=backend)
    out = heads.scatter(out, per)
    if moved is not None:
        moved.add(heads.sent, heads.received)
    return out


def _check(pattern: Pattern, slabs: Slabs) -> None:
    """Raise a ValueError for a pattern that no rank can run on its share of the heads."""
    if pattern.learnable:
        raise ValueError(f"{pattern} under Ulysses: it has parameters, and nothing gives a rank those of its heads")
    if pattern.joins_heads and slabs.ranks > 1:
        raise ValueError(f"{pattern} under Ulysses: {JOINS_HEADS}")


def _cost(pattern: Pattern, layout: Layout, heads: int, per: int) -> tuple[float, ...] | None:
    """What key heads cost with their query heads, where heads have patterns of their own: what their tiles visit."""
    if not isinstance(pattern, PerHead):
        return None
    each = [1 / plan(one, layout).tile_bound for one in pattern.of_heads(heads)]
    return tuple(sum(each[i : i + per]) for i in range(0, heads, per))


def _whole_mask(key_mask: torch.Tensor, slabs: Slabs, group: dist.ProcessGroup | None) -> torch.Tensor:
    """The key mask of the whole sequence: bool [B, whole length]."""
    lengths = [slabs.local(r).length for r in range(slabs.ranks)]
    own = torch.nn.functional.pad(key_mask.to(torch.uint8), (0, max(lengths) - key_mask.shape[1]))
    parts = [torch.empty_like(own) for _ in lengths]
    dist.all_gather(parts, own.contiguous(), group=group)
    return slabs.joined([part[:, :n] for part, n in zip(parts, lengths, strict=True)]).bool()
