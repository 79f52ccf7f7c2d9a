"""Telling whoever listens how many pairs of tokens a choice lists, on the device, and how long choosing takes."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar

import torch

from visattn.patterns.choice.blocks import Blocks, block_tokens
from visattn.patterns.choice.causal import pairs_on
from visattn.patterns.routes import Routes

Listener = Callable[[torch.Tensor], None]
Clock = Callable[[], AbstractContextManager[None]]
# Gets whether a call computed its output anew, and the bytes that are kept for later steps.
Sharing = Callable[[bool, int], None]

_listener: ContextVar[Listener | None] = ContextVar("listener", default=None)
_skips: ContextVar[Listener | None] = ContextVar("skips", default=None)
_clock: ContextVar[Clock | None] = ContextVar("clock", default=None)
_sharing: ContextVar[Sharing | None] = ContextVar("sharing", default=None)


@contextmanager
def listening(
    listener: Listener, skips: Listener | None = None, clock: Clock | None = None, sharing: Sharing | None = None
) -> Iterator[None]:
    """Inside, every choice gives `listener` the listed share of all pairs of grid tokens: [B, H].

    `skips` gets the share that was listed and then passed over, of patterns that do so. Choices are made inside of what
    `clock` returns; without one they stay inside of that of the listener before. `sharing` is told what patterns do
    that share between steps.
    """
    before, others, shared = _listener.set(listener), _skips.set(skips), _sharing.set(sharing)
    timed = None if clock is None else _clock.set(clock)
    try:
        yield
    finally:
        _listener.reset(before)
        _skips.reset(others)
        _sharing.reset(shared)
        if timed is not None:
            _clock.reset(timed)


@contextmanager
def choosing() -> Iterator[None]:
    """Around what a choice takes; inside of another choice nothing is timed again."""
    clock = _clock.get()
    if clock is None:
        yield
        return
    timed = _clock.set(None)
    try:
        with clock():
            yield
    finally:
        _clock.reset(timed)


def hears() -> bool:
    """Whether anybody listens."""
    return _listener.get() is not None


def tell_shares(shares: torch.Tensor, skipped: bool = False) -> None:
    """Tell who listens the listed, or skipped, share of all pairs of grid tokens: [B, H]."""
    listener = _skips.get() if skipped else _listener.get()
    if listener is not None and not (shares.is_cuda and torch.cuda.is_current_stream_capturing()):
        listener(shares)


def tell_sharing(refreshed: bool, nbytes: int) -> None:
    """Tell who listens whether a call computed its output anew, and how many bytes are kept for later steps."""
    listener = _sharing.get()
    if listener is not None:
        listener(refreshed, nbytes)


def tell(choice: Routes, blocks: Blocks, before: Routes | None = None) -> None:
    """Tell who listens what is listed, and what was `before` some of it was skipped."""
    if not hears():
        return
    shares = _share(choice, blocks)
    tell_shares(shares)
    if before is not None:
        tell_shares(_share(before, blocks) - shares, True)


def tell_met(choice: Routes, met: torch.Tensor, blocks: Blocks) -> None:
    """Tell who listens what a kernel met of what is listed, and what it passed over.

    Args:
        choice: What is listed.
        met: Which entries were added: bool [B, H, query blocks, n], H a multiple of the lists per sample.
        blocks: The blocks.
    """
    if hears():
        shares = _share(choice, blocks, met)
        tell_shares(shares)
        tell_shares(_share(choice, blocks, torch.ones_like(met)) - shares, True)


def _share(choice: Routes, blocks: Blocks, met: torch.Tensor | None = None) -> torch.Tensor:
    if any(blocks.causal):
        # Of what passes over blocks there is nothing causal.
        pairs, listed = pairs_on(blocks, choice.tiles.device), choice.listed()
        own = pairs[torch.arange(blocks.rows, device=pairs.device)[:, None], choice.tiles.long()]
        own = own if listed is None else own.masked_fill(~listed, 0)
        return own.sum((-2, -1)) / math.prod(blocks.grid) ** 2
    rows, columns = (
        block_tokens(blocks.grid, box, choice.tiles.device).double() for box in (blocks.queries, blocks.keys)
    )
    tokens, listed = columns[choice.tiles.long()], choice.listed()
    if met is not None:
        each = met.shape[1] // choice.groups
        tokens = tokens.repeat_interleave(each, 1).masked_fill(~met, 0)
        listed = None if listed is None else listed.repeat_interleave(each, 1)
    seen = tokens.sum(-1) if listed is None else tokens.masked_fill(~listed, 0).sum(-1)
    return (seen * rows).sum(-1) / (rows.sum() * columns.sum())
