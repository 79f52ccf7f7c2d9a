"""What the swapped attention modules of one timm model share: where the tokens sit now, and what was counted."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn import functional as F

from visattn.attend import attention
from visattn.counts import Cell
from visattn.layout import Layout
from visattn.models.swap.sources import between
from visattn.models.swap.weights import show_weights
from visattn.outside import Outside
from visattn.parameters import following
from visattn.patterns import Dense, Pattern
from visattn.problem import Call, Problem
from visattn.recompute import Carrier
from visattn.tally import Tally
from visattn.watch import Watched, Watcher


class Place(NamedTuple):
    """Where the tokens of a forward sit.

    Attributes:
        layout: That, or why it is unknown.
        samples: Layouts of the samples of a NaFlexViT batch; the masks of that forward should hide their padding.
    """

    layout: Layout | str
    samples: tuple[Layout, ...] = ()


# Kinds of calls of a module whose place among the counts is kept.
MANY = 256
UNPLACED = Place("the model has not embedded an image yet")


class Runtime:
    """The state of one swapped model, or of those of its modules whose tokens sit on one of its grids.

    Attributes:
        name: What errors call the model.
        backend: "auto" or the name of a backend.
        fixed: The layout that the user gave, or None.
        tally: What happened at each module of the model.
        prefix: Dense tokens before the grid.
        watcher: Sees every call that ran a pattern without position bias, or None.
        forwards: The place of every forward and recomputation outside of compiled code.
        outside: Before the modules that are compiled one by one, or None where nobody asks for a place.
    """

    def __init__(self, name: str, backend: str, fixed: Layout | None, prefix: int, tally: Tally | None = None) -> None:
        self.name, self.backend, self.fixed, self.prefix = name, backend, fixed, prefix
        self.tally = Tally() if tally is None else tally
        self.watcher: Watcher | None = None
        self.forwards: Carrier[Place] = Carrier()
        self.outside: Outside | None = None
        self._last = UNPLACED
        # By length of the sequence, for who gets tokens that no forward is remembered with.
        self._places: dict[int, set[Place]] = {}

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
        self._last = place
        if not torch.compiler.is_compiling():
            self.forwards.begin(place, torch.is_grad_enabled())
            if self.outside is not None and torch.is_grad_enabled():
                self.outside.stand()
            known = self._places.setdefault(tokens, set())
            # Two say as well as many that they differ.
            if len(known) < 2:
                known.add(place)

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
        """Where the tokens of a sequence of that length sit.

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
        known = self._places.get(tokens, set())
        if len(known) > 1:
            raise ValueError(
                f"{self.name}: {tokens} tokens came without the forward that they belong to, and they may be "
                f"{' or '.join(sorted(str(place.layout) for place in known))}: let gradient checkpointing run whole "
                "blocks again, or pass layout=Layout(...)"
            )
        return next(iter(known), self._last)


class Swapped:
    """What a swapped module knows.

    Attributes:
        runtime: Of its model.
        path: Of the module in its model.
        pattern: What it was given.
        parameters: Learnable parameters of the pattern by name.
        attention: The module that has the stock attention, whose attn_drop the weights would pass.
        order: How the module's tokens become a map, and back; None where they come row by row.
    """

    def __init__(
        self,
        runtime: Runtime,
        path: str,
        pattern: Pattern,
        parameters: nn.ParameterDict | None = None,
        attention: nn.Module | None = None,
        order: Any = None,
    ) -> None:
        self.runtime, self.path, self.pattern, self.attention = runtime, path, pattern, attention
        self.order: Any = order
        # A plain dict: torch.compile follows it, and the model's state dict does not.
        self.parameters: dict[str, torch.Tensor] = {} if parameters is None else dict(parameters.items())
        self._cells: dict[Hashable, Cell] = {}

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Copies of the module that copy its attributes one by one have no patch; see `visattn.copies`."""
        return _undone, ()

    def _parameters(self, device: torch.device) -> dict[str, torch.Tensor]:
        """The parameters on the device of a call."""
        if torch.compiler.is_compiling():
            return {name: value.to(device) for name, value in self.parameters.items()}
        return following(self.parameters, device)

    def enter(self, x: torch.Tensor) -> None:
        """The module gets its tokens: they may say which forward they belong to."""
        if not torch.compiler.is_compiling() and isinstance(x, torch.Tensor) and self.runtime.fixed is None:
            self.runtime.forwards.pass_by(x)

    def keeps_stock(self, refusal: str | None) -> bool:
        """Whether the module's own attention runs, for a schedule or the reason given; counts it if so."""
        counted = not torch.compiler.is_compiling()
        if isinstance(self.pattern, Dense):
            if counted:
                self.runtime.tally.count(self.path)
            return True
        if refusal is not None and counted:
            self.runtime.tally.count(self.path, refusal)
        return refusal is not None

    def stays_stock(self, refusal: str | None, tokens: int) -> Layout | None:
        """The layout if the pattern is to run, None if the module's own attention is; counts the latter.

        Args:
            refusal: Why this call cannot run a pattern, or None.
            tokens: Length of the sequence.

        Raises:
            ValueError: If the sequence is not what the model embedded.
        """
        layout = self.runtime.here(tokens).layout
        if self.keeps_stock(layout if isinstance(layout, str) else refusal) or isinstance(layout, str):
            return None
        layout.check_length(tokens)
        return layout

    def on_map(
        self,
        refusal: str | None,
        grid: Sequence[int],
        heads: tuple[int, int],
        x: torch.Tensor,
        keys: Sequence[int] | None = None,
    ) -> Layout | None:
        """The layout if the pattern is to run where the module's own attention is dense on a map, else None.

        Counts what the module's own attention runs: for a reason, or because it is the pattern.

        Args:
            refusal: Why this call cannot run a pattern, or None.
            grid: Rows and columns.
            heads: Their number and width.
            x: What the module got; its batch comes first.
            keys: Rows and columns of the keys, those of the queries if None.
        """
        if self.keeps_stock(refusal):
            return None
        layout = between(grid, grid if keys is None else keys)
        if self.covered(layout):
            self.count_stock((x.shape[0], heads[0], layout.length, heads[1]), x, layout)
            return None
        return layout

    def padded(self, tokens: int) -> tuple[Layout, ...]:
        """The layouts of the samples of a NaFlexViT batch, whose mask should hide their padding, else ()."""
        return self.runtime.here(tokens).samples

    def samples(self, tokens: int) -> tuple[Layout, ...]:
        """The layouts of the samples where they differ or leave padding, else ()."""
        place = self.runtime.here(tokens)
        ragged = isinstance(place.layout, str) or place.layout.length < tokens
        return place.samples if ragged else ()

    def covered(self, layout: Layout) -> bool:
        """Whether the module's own dense attention is the pattern, and nobody asked for a backend."""
        return self.runtime.backend == "auto" and _covers(self.pattern, layout)

    def attend(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        layout: Layout,
        scale: float,
        key_mask: torch.Tensor | None = None,
        rpb: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The pattern on q, k [B, heads, S, D] and v [B, heads, S, Dv], one of which may be narrower; as v is."""
        width = v.shape[-1]
        wide = max(width, q.shape[-1])
        q, k, v = (F.pad(t, (0, wide - t.shape[-1])) if t.shape[-1] < wide else t for t in (q, k, v))
        return self._attend(q, k, v, layout, scale, key_mask, rpb)[..., :width]

    def _attend(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        layout: Layout,
        scale: float,
        key_mask: torch.Tensor | None,
        rpb: torch.Tensor | None,
    ) -> torch.Tensor:
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        arguments: dict[str, Any] = {"scale": scale, "key_mask": key_mask, "rpb": rpb, "backend": self.runtime.backend}
        own = self._parameters(q.device)
        if own:
            arguments["parameters"] = own
        if torch.compiler.is_compiling():
            return attention(q, k, v, self.pattern, layout, **arguments).transpose(1, 2)
        tally = self.runtime.tally
        call = Call(self.pattern, layout, scale, key_mask, rpb, parameters=own)
        cell = self._cell(q, k, v, call)
        begun = tally.begin(cell)
        with tally.hearing((cell,), begun):
            out = attention(q, k, v, self.pattern, layout, **arguments)
        tally.end((cell,), begun)
        show_weights(self.attention, self.path, q, k, call)
        if self.runtime.watcher is not None and rpb is None:
            self.runtime.watcher(Watched(self.path, q, k, v, out, self.pattern, (layout,), scale, key_mask, own))
        return out.transpose(1, 2)

    def attend_lse(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layout: Layout, scale: float, rpb: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """As `attend` with a position bias, and the log-sum-exp [B, heads, S]."""
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        arguments: dict[str, Any] = {"scale": scale, "rpb": rpb, "backend": self.runtime.backend, "return_lse": True}
        if self.parameters:
            arguments["parameters"] = self._parameters(q.device)
        if torch.compiler.is_compiling():
            out, lse = attention(q, k, v, self.pattern, layout, **arguments)
        else:
            tally, call = self.runtime.tally, Call(self.pattern, layout, scale, None, rpb, True)
            cell = self._cell(q, k, v, call)
            begun = tally.begin(cell)
            out, lse = attention(q, k, v, self.pattern, layout, **arguments)
            tally.end((cell,), begun)
            show_weights(self.attention, self.path, q, k, call)
        return out.transpose(1, 2), lse.transpose(1, 2)

    def count_stock(self, q_shape: tuple[int, int, int, int], like: torch.Tensor, layout: Layout) -> None:
        """Count a call that the module's own attention ran because it is the pattern.

        Args:
            q_shape: Batch, heads, tokens and head_dim.
            like: Tensor with the dtype and device of the call.
            layout: Where the tokens sit.
        """
        if not torch.compiler.is_compiling():
            batch, heads, _, head_dim = q_shape
            problem = Problem(self.pattern, layout, batch, heads, heads, head_dim, like.dtype, like.device.type)
            tally = self.runtime.tally
            tally.end((tally.cell(self.path, "sparse", None, like.device, problem),), None)

    def _cell(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, call: Call) -> Cell:
        """Where a call counts; that is known of calls like earlier ones."""
        learns = torch.is_grad_enabled() and any(
            t is not None and t.requires_grad for t in (q, k, v, call.rpb, *call.parameters.values())
        )
        given = call.key_mask is None, call.rpb is None, call.lse
        key = q.shape, k.shape[2], q.dtype, q.device, call.layout, learns, given
        found = self._cells.get(key)
        if found is None:
            if len(self._cells) >= MANY:
                self._cells.clear()
            problem = Problem.of(q, k, v, call)
            self._cells[key] = found = self.runtime.tally.cell(self.path, "sparse", None, q.device, problem)
        return found


@lru_cache(maxsize=1024)
def _covers(pattern: Pattern, layout: Layout) -> bool:
    """Whether a pattern shows every token of a grid all others: asked at every call."""
    return pattern.covers(*layout.grids)


class Undone(Swapped):
    """What a module knows whose patch was removed: nothing, and its own attention runs.

    A class that others have derived from a swapped one has no other way back.
    """

    def __init__(self) -> None:
        self.path, self.attention, self.order = "", None, None

    def enter(self, x: torch.Tensor) -> None:
        """Nobody asks."""

    def keeps_stock(self, refusal: str | None) -> bool:
        """Always."""
        return True

    def stays_stock(self, refusal: str | None, tokens: int) -> Layout | None:
        """Always."""
        return None

    def on_map(
        self,
        refusal: str | None,
        grid: Sequence[int],
        heads: tuple[int, int],
        x: torch.Tensor,
        keys: Sequence[int] | None = None,
    ) -> Layout | None:
        """None: the module's own."""
        return None

    def padded(self, tokens: int) -> tuple[Layout, ...]:
        """None."""
        return ()

    def samples(self, tokens: int) -> tuple[Layout, ...]:
        """None."""
        return ()


UNDONE = Undone()


def _undone() -> Undone:
    return UNDONE


def is_swapped(module: nn.Module) -> bool:
    """Whether a module has a pattern to run."""
    return getattr(module, "visattn_site", UNDONE) is not UNDONE
