"""What a part of a call lists, heard by the backend that runs it: that one tells of the whole call."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from visattn.layout import Layout
from visattn.patterns import ListedPattern, Pattern
from visattn.patterns.choice.listening import hears, listening
from visattn.plans import plan


@contextmanager
def hearing(pattern: Pattern, layout: Layout, q: torch.Tensor) -> Iterator[Callable[[], torch.Tensor | None]]:
    """Inside, who listens hears nothing; gives a function with the listed share of grid pairs of each head [B, H].

    Where nothing was told, that is what the plan says; None for a pattern that is no list.

    Args:
        pattern: Of the part.
        layout: Its tokens.
        q: Its queries.
    """
    heard: list[torch.Tensor] = []

    def share() -> torch.Tensor | None:
        shape = q.shape[0], q.shape[2]
        if heard:
            return heard[-1].expand(*shape)
        if not isinstance(pattern, ListedPattern):
            return None
        listed = grid_share(plan(pattern, layout).density, layout)
        return torch.full(shape, listed, dtype=torch.float64, device=q.device)

    if not hears():
        yield share
        return
    with listening(heard.append):
        yield share


def grid_share(density: float, layout: Layout) -> float:
    """The share of grid pairs that makes a share of all pairs, where all pairs with a dense token are counted."""
    grid, every = layout.tokens**2, layout.length**2
    return (density * every - (every - grid)) / grid
