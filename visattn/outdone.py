"""Lists that q and k have made so long that dense attention is faster: told before they are run."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from visattn.layout import Layout

# Gets the layout of a call and the share of its key tiles that are visited; says whether dense attention is faster.
Weigher = Callable[[Layout, float], bool]

_weigher: ContextVar[Weigher | None] = ContextVar("weigher", default=None)


class Outdone(Exception):
    """Raised inside `weighing` by an engine that was about to run lists that dense attention outdoes.

    Args:
        listed: The share of key tiles that query tiles visit.
    """

    def __init__(self, listed: float) -> None:
        super().__init__(f"dense attention is estimated to be faster where {listed:.2f} of the keys are visited")
        self.listed = listed


@contextmanager
def weighing(weigher: Weigher) -> Iterator[None]:
    """Inside, engines ask before they run lists whose length depends on what is in q and k."""
    before = _weigher.set(weigher)
    try:
        yield
    finally:
        _weigher.reset(before)


def weighed() -> bool:
    """Whether somebody wants to be asked."""
    return _weigher.get() is not None


def weigh(layout: Layout, listed: float) -> None:
    """Ask whether lists are to be run.

    Args:
        layout: The tokens.
        listed: The share of key tiles that query tiles visit.

    Raises:
        Outdone: If they are not.
    """
    weigher = _weigher.get()
    if weigher is not None and weigher(layout, listed):
        raise Outdone(listed)
