"""Telling whoever listens how many pairs of tokens a choice lists: numbers on the device, nobody waits for them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch

from visattn.patterns.choice.blocks import Blocks, block_tokens
from visattn.patterns.routes import Routes

Listener = Callable[[torch.Tensor], None]

_listener: ContextVar[Listener | None] = ContextVar("listener", default=None)


@contextmanager
def listening(listener: Listener) -> Iterator[None]:
    """Inside, every choice gives `listener` the listed share of all pairs of grid tokens: [B, H]."""
    before = _listener.set(listener)
    try:
        yield
    finally:
        _listener.reset(before)


def hears() -> bool:
    """Whether anybody listens."""
    return _listener.get() is not None


def tell_shares(shares: torch.Tensor) -> None:
    """Tell who listens the listed share of all pairs of grid tokens: [B, H]."""
    listener = _listener.get()
    if listener is not None and not (shares.is_cuda and torch.cuda.is_current_stream_capturing()):
        listener(shares)


def tell(choice: Routes, blocks: Blocks) -> None:
    """Tell who listens."""
    if not hears():
        return
    rows, columns = (
        block_tokens(blocks.grid, box, choice.tiles.device).double() for box in (blocks.queries, blocks.keys)
    )
    tokens, listed = columns[choice.tiles.long()], choice.listed()
    seen = tokens.sum(-1) if listed is None else tokens.masked_fill(~listed, 0).sum(-1)
    tell_shares((seen * rows).sum(-1) / (rows.sum() * columns.sum()))
