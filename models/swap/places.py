"""Where the tokens of a swapped timm model sit: of each forward, and wherever its blocks run again."""

from __future__ import annotations

import threading
from typing import NamedTuple

import torch

from visattn.layout import Layout
from visattn.outside import Outside
from visattn.recompute import Carrier


class Place(NamedTuple):
    """Where the tokens of a forward sit.

    Attributes:
        layout: That, or why it is unknown.
        samples: Layouts of the samples of a NaFlexViT batch; the masks of that forward should hide their padding.
    """

    layout: Layout | str
    samples: tuple[Layout, ...] = ()


# Two grids say as well as many that they differ, and some may be of forwards that will raise.
FEW = 8
UNPLACED = Place("the model has not embedded an image yet")
ALONE = Place(
    "it was called outside of a forward of the model, and nothing tells the grid of its tokens: pass layout=Layout(...)"
)
FAILED = Place("the last forward raised, and nothing tells the grid of these tokens")


class Own(threading.local):
    """What the forward of a thread has told.

    Attributes:
        place: Where its tokens sit, None outside of forwards.
        new: Length of its sequences, if no forward before had sequences of that length on that grid.
    """

    place: Place | None = None
    new: int | None = None


class Places:
    """Where the tokens of the modules sit that are on one grid of a swapped model.

    Attributes:
        name: What errors call the model.
        fixed: The layout that the user gave, or None.
        prefix: Dense tokens before the grid.
        forwards: The place of every forward and recomputation outside of compiled code.
        outside: Before the modules that are compiled one by one, or None where nobody asks for a place.
    """

    def __init__(self, name: str, fixed: Layout | None, prefix: int) -> None:
        self.name, self.fixed, self.prefix = name, fixed, prefix
        self.forwards: Carrier[Place] = Carrier()
        self.outside: Outside | None = None
        # The last place, and whether compiled code told it, parts of which may be left to the interpreter.
        self._last, self._compiled = UNPLACED, False
        # By length of the sequence, for who gets tokens that no forward is remembered with.
        self._places: dict[int, set[Place]] = {}
        self._here = Own()

    def place(self, grid: tuple[int, int]) -> None:
        """Say at which rows and columns the tokens of this thread's forward sit."""
        layout = Layout(grid, prefix=self.prefix)
        self._begin(Place(layout), layout.length)

    def place_samples(self, grids: tuple[tuple[int, int], ...] | str, tokens: int) -> None:
        """Say where the tokens of each sample sit; what the sequence has beyond them is padding.

        Args:
            grids: Rows and columns of each sample, or why they are unknown.
            tokens: Length of the sequence, padding and prefix included.
        """
        if isinstance(grids, str):
            self._begin(Place(grids), tokens)
            return
        layouts = tuple(Layout(grid, prefix=self.prefix) for grid in grids)
        even = layouts[0] if len(set(layouts)) == 1 else "the samples of the batch have several grids"
        self._begin(Place(even, layouts), tokens)

    def _begin(self, place: Place, tokens: int) -> None:
        self._last, self._compiled = place, torch.compiler.is_compiling()
        if not self._compiled:
            self.forwards.begin(place, torch.is_grad_enabled())
            if self.outside is not None and torch.is_grad_enabled():
                self.outside.stand()
            known = self._places.setdefault(tokens, set())
            self._here.place, self._here.new = place, None
            if place not in known and len(known) < FEW:
                self._here.new = tokens
                known.add(place)

    def finish(self) -> None:
        """The forward of this thread is over: what is called next is outside of it."""
        self.forwards.end()
        self._here.place = self._here.new = None

    def fail(self, told: bool = True) -> None:
        """The forward of this thread raised, before or after it had `told` its place, which is nobody else's."""
        place, new = (self._here.place, self._here.new) if told else (None, None)
        if place is not None and new is not None:
            self._places[new].discard(place)
        if place is None or self._last == place:
            self._last = FAILED
        self.finish()

    def resume(self, place: Place) -> None:
        """The backward pass of a forward begins: compiled code is there again."""
        self._last = place

    def pass_by(self, x: torch.Tensor) -> None:
        """A module gets the tokens x: compiled code inside of it finds the place of their forward, if that is known."""
        self.forwards.pass_by(x)
        self._last = self.forwards.value or self._last

    def bring(self, x: torch.Tensor) -> None:
        """A module that is compiled on its own gets the tokens x: its code is to find the place of their forward.

        Raises:
            ValueError: See `here`.
        """
        self.forwards.pass_by(x)
        self._last = self.here(x.shape[1])

    def here(self, tokens: int) -> Place:
        """Where the tokens of a sequence of that length sit; outside of forwards and backward passes nobody knows.

        Raises:
            ValueError: If no forward is known that these tokens belong to, and forwards of several grids had as many.
        """
        if self.fixed is not None:
            return Place(self.fixed)
        if torch.compiler.is_compiling():
            return self._last
        found = self.forwards.value
        if found is not None:
            return found
        if torch._C._current_graph_task_id() < 0:
            return ALONE if self._places and not self._compiled else self._last
        known = self._places.get(tokens, set())
        if len(known) > 1:
            raise ValueError(
                f"{self.name}: {tokens} tokens came without the forward that they belong to, and they may be "
                f"{' or '.join(sorted(str(place.layout) for place in known))}: let gradient checkpointing run whole "
                "blocks again, or pass layout=Layout(...)"
            )
        return next(iter(known), self._last)
