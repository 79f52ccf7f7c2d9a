"""Point-to-point exchange of border keys and values, posted before it is needed; gradients go the same way back."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.distributed as dist

from visattn.parallel.needs import Border, Needs
from visattn.parallel.once import once


class Exchange:
    """The messages of one call. A message is [tensors, B, outer, rows, inner, C]: some rows of each of its tensors.

    Args:
        needs: What is fetched and given.
        group: The process group.
    """

    def __init__(self, needs: Needs, group: dist.ProcessGroup | None) -> None:
        self.needs, self.group = needs, group
        self.received: dict[int, torch.Tensor] = {}
        self.given: dict[int, torch.Tensor] = {}
        self._works: list[Any] = []
        self._own = needs.slabs.local(needs.rank)

    def _rows(self, x: torch.Tensor) -> torch.Tensor:
        """A sequence [B, S, ...] of this rank as [B, outer, rows, inner, C], without its dense tokens."""
        own, axis = self._own, self.needs.slabs.axis
        sides = math.prod(own.grid[:axis]), own.grid[axis], math.prod(own.grid[axis + 1 :])
        return x[:, own.prefix : own.prefix + own.tokens].unflatten(1, sides).flatten(4)

    def post(self, *tensors: torch.Tensor) -> None:
        """Send the rows that others need of some sequences [B, S, ...], and begin to receive theirs."""
        views = [self._rows(x) for x in tensors]
        batch, outer, _, inner, channels = views[0].shape
        sends = {to: torch.stack([_chosen(x, rows) for x in views]) for to, rows in self.needs.give.items()}
        shape = (len(views), batch, outer)
        takes = {of: views[0].new_empty(*shape, len(rows), inner, channels) for of, rows in self.needs.fetch.items()}
        self.given, self.received = sends, takes
        self._start(sends, takes)

    def post_back(self, grads: dict[int, torch.Tensor]) -> None:
        """Send the gradients of what was received, and begin to receive those of what was given."""
        self.given = {to: torch.empty_like(sent) for to, sent in self.given.items()}
        self.received = {of: grad.contiguous() for of, grad in grads.items()}
        self._start(self.received, self.given)

    def _start(self, sends: dict[int, torch.Tensor], takes: dict[int, torch.Tensor]) -> None:
        at = {r: r if self.group is None else dist.get_global_rank(self.group, r) for r in {*sends, *takes}}
        out = [dist.P2POp(dist.isend, sent, at[to], self.group) for to, sent in sorted(sends.items())]
        into = [dist.P2POp(dist.irecv, taken, at[of], self.group) for of, taken in sorted(takes.items())]
        self._works = dist.batch_isend_irecv(out + into) if out or into else []

    def wait(self) -> None:
        """Until all is there; on a GPU its later work waits, not the host."""
        for work in self._works:
            work.wait()
        self._works = []

    def moved(self) -> tuple[int, int]:
        """Bytes of the messages that went and that came."""
        sent, received = (sum(t.numel() * t.element_size() for t in ts.values()) for ts in (self.given, self.received))
        return sent, received

    def back(self, like: torch.Tensor, number: int) -> list[torch.Tensor]:
        """The gradients of the sequences whose rows were given, from what `post_back` received."""
        found = [torch.zeros_like(like, memory_format=torch.contiguous_format) for _ in range(number)]
        for to, grads in self.given.items():
            for x, grad in zip(found, grads, strict=True):
                # `_rows` gives views of contiguous tensors.
                _add(self._rows(x), self.needs.give[to], grad)
        return found


def _chosen(x: torch.Tensor, rows: tuple[int, ...]) -> torch.Tensor:
    """Rows of [B, outer, rows, inner, C]."""
    if rows[-1] - rows[0] + 1 == len(rows):
        return x.narrow(2, rows[0], len(rows))
    return x[:, :, list(rows)]


def _add(x: torch.Tensor, rows: tuple[int, ...], values: torch.Tensor) -> None:
    if rows[-1] - rows[0] + 1 == len(rows):
        x.narrow(2, rows[0], len(rows)).add_(values)
    else:
        x[:, :, list(rows)] += values


class Post(torch.autograd.Function):
    """Posts keys and values; what comes back is a token that ties `Arrive` to it in the graph."""

    @staticmethod
    def forward(ctx: Any, exchange: Exchange, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """Post."""
        exchange.post(k, v)
        ctx.exchange, ctx.like = exchange, k
        return k.new_zeros(())

    @staticmethod
    @once
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """What the others' queries add to the gradients of the rows that they were given."""
        ctx.exchange.wait()
        return None, *ctx.exchange.back(ctx.like, 2)


class Arrive(torch.autograd.Function):
    """Waits for what was posted: the own output as it is, and the messages by rank."""

    @staticmethod
    def forward(ctx: Any, exchange: Exchange, token: torch.Tensor, out: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Wait."""
        exchange.wait()
        ctx.exchange = exchange
        return out.view_as(out), *exchange.received.values()

    @staticmethod
    @once
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Post the messages' gradients; the own part's backward runs while they travel."""
        exchange = ctx.exchange
        exchange.post_back(dict(zip(exchange.received, grads[1:], strict=True)))
        return None, grads[0].new_zeros(()), grads[0]


def buffers(
    border: Border, needs: Needs, messages: dict[int, torch.Tensor], k: torch.Tensor, v: torch.Tensor
) -> list[torch.Tensor]:
    """Keys and values [B, tokens, Hkv, D] of a border from messages, or on a small ring from the slab itself."""
    shape = k.shape[2:]
    grid, axis = border.layout.keys.grid, needs.slabs.axis
    owners = {source[0] for source in border.sources if source is not None}
    if len(owners) == 1 and needs.rank not in owners:
        message = messages[next(iter(owners))]
        if border.sources == tuple((next(iter(owners)), i) for i in range(message.shape[3])):
            return [part.flatten(1, 3).unflatten(-1, shape) for part in message]
    own = Exchange(needs, None)
    found = []
    for number, x in enumerate((k, v)):
        rows = [
            _row(source, needs.rank, messages, own._rows(x) if needs.rank in owners else None, number, x, grid, axis)
            for source in border.sources
        ]
        found.append(torch.cat(rows, 2).flatten(1, 3).unflatten(-1, shape))
    return found


def _row(
    source: tuple[int, int] | None,
    rank: int,
    messages: dict[int, torch.Tensor],
    own: torch.Tensor | None,
    number: int,
    like: torch.Tensor,
    grid: tuple[int, ...],
    axis: int,
) -> torch.Tensor:
    """One row of a buffer: [B, outer, 1, inner, C]."""
    if source is None:
        outer, inner = math.prod(grid[:axis]), math.prod(grid[axis + 1 :])
        return like.new_zeros(like.shape[0], outer, 1, inner, like.shape[2:].numel())
    owner, place = source
    if owner == rank:
        assert own is not None
        return own.narrow(2, place, 1)
    return messages[owner][number].narrow(2, place, 1)
