"""Point-to-point exchange of border keys and values, posted before it is needed; gradients go the same way back."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist

from visattn.parallel.needs import Border, Needs
from visattn.parallel.once import once


class Exchange:
    """The messages of one call. A message is flat: some rows [B, outer, rows, inner, C] of each of its tensors in turn.

    Args:
        needs: What is fetched and given.
        group: The process group.
    """

    def __init__(self, needs: Needs, group: dist.ProcessGroup | None) -> None:
        self.needs, self.group = needs, group
        self.received: dict[int, torch.Tensor] = {}
        self.given: dict[int, torch.Tensor] = {}
        self._works: list[Any] = []
        self._channels: list[int] = []
        self._own = needs.slabs.local(needs.rank)

    def rows(self, x: torch.Tensor) -> torch.Tensor:
        """A sequence [B, S, ...] of this rank as [B, outer, rows, inner, C], without its dense tokens."""
        own, axis = self._own, self.needs.slabs.axis
        sides = math.prod(own.grid[:axis]), own.grid[axis], math.prod(own.grid[axis + 1 :])
        return x[:, own.prefix : own.prefix + own.tokens].unflatten(1, sides).flatten(4)

    def post(self, *tensors: torch.Tensor) -> None:
        """Send the rows that others need of some sequences [B, S, ...], and begin to receive theirs."""
        views = [self.rows(x) for x in tensors]
        # Values may have other channels than keys.
        self._channels = [x.shape[4] for x in views]
        batch, outer, _, inner, _ = views[0].shape
        row = batch * outer * inner * sum(self._channels)
        sends = {to: views[0].new_empty(row * len(rows)) for to, rows in self.needs.give.items()}
        for to, message in sends.items():
            rows = self.needs.give[to]
            for part, x in zip(self.parts(message, batch, len(rows)), views, strict=True):
                part.copy_(_chosen(x, rows))
        takes = {of: views[0].new_empty(row * len(rows)) for of, rows in self.needs.fetch.items()}
        self.given, self.received = sends, takes
        self._start(sends, takes)

    def parts(self, message: torch.Tensor, batch: int, rows: int) -> list[torch.Tensor]:
        """The rows of each tensor in a message: [B, outer, rows, inner, C]."""
        grid, axis = self._own.grid, self.needs.slabs.axis
        sides = batch, math.prod(grid[:axis]), rows, math.prod(grid[axis + 1 :])
        found = message.split([math.prod(sides) * channels for channels in self._channels])
        return [part.view(*sides, channels) for part, channels in zip(found, self._channels, strict=True)]

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

    def back(self, shapes: Sequence[torch.Size]) -> list[torch.Tensor | None]:
        """The gradients of the sequences whose rows were given, from what `post_back` received; None if none were."""
        if not self.given:
            return [None for _ in shapes]
        like = next(iter(self.given.values()))
        found = [like.new_zeros(shape) for shape in shapes]
        for to, message in self.given.items():
            rows = self.needs.give[to]
            for x, grad in zip(found, self.parts(message, shapes[0][0], len(rows)), strict=True):
                # `rows` gives views of contiguous tensors.
                _add(self.rows(x), rows, grad)
        return [*found]


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
        ctx.exchange, ctx.shapes = exchange, (k.shape, v.shape)
        return k.new_zeros(())

    @staticmethod
    @once
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """What the others' queries add to the gradients of the rows that they were given."""
        ctx.exchange.wait()
        return None, *ctx.exchange.back(ctx.shapes)


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
        # Where keys and values want no gradient, nobody waits for what is posted here.
        if ctx.needs_input_grad[1]:
            exchange.post_back(dict(zip(exchange.received, grads[1:], strict=True)))
        return None, grads[0].new_zeros(()), grads[0]


def buffers(
    border: Border, exchange: Exchange, messages: dict[int, torch.Tensor], *tensors: torch.Tensor
) -> list[torch.Tensor]:
    """Sequences [B, tokens, ...] of a border from messages, or on a small ring from the slab itself.

    Args:
        border: The border.
        exchange: What has brought the messages.
        messages: Them, by rank.
        tensors: The sequences of this rank, in the order in which they were posted.
    """
    needs = exchange.needs
    grid, axis = border.layout.keys.grid, needs.slabs.axis
    owners = {source[0] for source in border.sources if source is not None}
    parts = {of: exchange.parts(messages[of], len(tensors[0]), len(needs.fetch[of])) for of in owners - {needs.rank}}
    if len(parts) == len(owners) == 1:
        ((owner, found),) = parts.items()
        if border.sources == tuple((owner, i) for i in range(len(needs.fetch[owner]))):
            return [part.flatten(1, 3).unflatten(-1, x.shape[2:]) for part, x in zip(found, tensors, strict=True)]
    found = []
    for number, x in enumerate(tensors):
        own = exchange.rows(x) if needs.rank in owners else None
        rows = [_row(source, needs.rank, parts, own, number, x, grid, axis) for source in border.sources]
        found.append(torch.cat(rows, 2).flatten(1, 3).unflatten(-1, x.shape[2:]))
    return found


def _row(
    source: tuple[int, int] | None,
    rank: int,
    parts: dict[int, list[torch.Tensor]],
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
    return parts[owner][number].narrow(2, place, 1)
