"""What a swapped attention module of a timm model knows: whose it is, what it runs, and how that counts."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from visattn.attend import attention
from visattn.autocast import is_on
from visattn.counts import Cell
from visattn.crossing import crossing
from visattn.forwards import check_loaded
from visattn.layout import Layout
from visattn.models.swap.places import ALONE, Places
from visattn.models.swap.sources import between
from visattn.models.swap.weights import show_weights
from visattn.operands import wants_gradient
from visattn.outdone import Outdone
from visattn.parameters import following
from visattn.patterns import Dense, DynamicPattern, Pattern
from visattn.patterns.traced import constant
from visattn.problem import Call, Problem
from visattn.registry import REGISTRY
from visattn.runtime.run import Run
from visattn.runtime.verdict import Verdict, judge, why_exact
from visattn.straight import attention_through
from visattn.watch import Watched

# Kinds of calls of a module that are decided once.
MANY = 256
# Batches by which compiled code, which is for all of them, decides: where few and many would be slower, all are.
BATCHES = (1, 64)


class SwapRun(Run):
    """The state of one swapped model."""

    def finish(self) -> None:
        """A forward is over; one whose modules all are in compiled code, which notes nothing, missed none."""
        forward = self.here.forward
        quiet = forward is not None and not (forward.hits or forward.reasons)
        if quiet and not self.strict:
            self.leave()
        else:
            super().finish()


class Swapped:
    """What a swapped module knows.

    Attributes:
        run: The state of its model.
        places: Where its tokens sit.
        path: Of the module in its model.
        pattern: What it was given.
        backend: "auto" or the name of a backend.
        parameters: Learnable parameters of the pattern by name.
        attention: The module that has the stock attention, whose attn_drop the weights would pass.
        order: How the module's tokens become a map, and back; None where they come row by row.
        precision: What the pattern computes in, None for the dtype of a call.
    """

    def __init__(
        self,
        run: Run,
        places: Places,
        path: str,
        pattern: Pattern,
        backend: str,
        parameters: nn.ParameterDict | None = None,
        attention: nn.Module | None = None,
        order: Any = None,
        precision: str | None = None,
    ) -> None:
        self.run, self.places, self.path, self.pattern, self.backend = run, places, path, pattern, backend
        self.attention, self.order, self.precision = attention, order, precision
        # A plain dict: torch.compile follows it, and the model's state dict does not.
        self.parameters: dict[str, torch.Tensor] = {} if parameters is None else dict(parameters.items())
        self._ran: dict[Hashable, tuple[Cell, ...]] = {}
        self._own: dict[Hashable, tuple[Verdict, tuple[Cell, ...]]] = {}

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
        if not torch.compiler.is_compiling() and isinstance(x, torch.Tensor) and self.places.fixed is None:
            self.places.forwards.pass_by(x)

    def keeps_stock(self, refusal: str | None) -> bool:
        """Whether the module's own attention runs, for a schedule or the reason given; counts it if so."""
        if refusal is None and not isinstance(self.pattern, Dense):
            if self.attention is not None:
                check_loaded(self.attention, self.path)
            return False
        if not torch.compiler.is_compiling():
            why = "" if isinstance(self.pattern, Dense) else refusal or ""
            self.run.tally.count(self.path, why)
            self._note(Verdict("dense", why=why))
        return True

    def _note(self, verdict: Verdict) -> None:
        """Remember with the forward of this thread what happened."""
        forward = self.run.here.forward
        if forward is not None:
            forward.note(self.path, verdict)

    def stays_stock(self, refusal: str | None, tokens: int) -> Layout | None:
        """The layout if the pattern is to run, None if the module's own attention is; counts the latter.

        Args:
            refusal: Why this call cannot run a pattern, or None.
            tokens: Length of the sequence.

        Raises:
            ValueError: If the sequence is not what the model embedded.
        """
        layout = self.places.here(tokens).layout
        unknown = layout if isinstance(layout, str) else None
        # Of a module called on its own the call itself says more.
        why = refusal or unknown if layout == ALONE.layout else unknown or refusal
        if self.keeps_stock(why) or isinstance(layout, str):
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
        rpb: bool = False,
    ) -> Layout | None:
        """The layout if the pattern is to run where the module's own attention is dense on a map, else None.

        Counts what the module's own attention runs: for a reason, or because it is the pattern.

        Args:
            refusal: Why this call cannot run a pattern, or None.
            grid: Rows and columns.
            heads: Their number and width.
            x: What the module got; its batch comes first.
            keys: Rows and columns of the keys, those of the queries if None.
            rpb: Whether the pattern would get a position bias.
        """
        if self.keeps_stock(refusal):
            return None
        layout = between(grid, grid if keys is None else keys)
        return None if self.runs_own(layout, heads, x, rpb=rpb) else layout

    def padded(self, tokens: int) -> tuple[Layout, ...]:
        """The layouts of the samples of a NaFlexViT batch, whose mask should hide their padding, else ()."""
        return self.places.here(tokens).samples

    def samples(self, tokens: int) -> tuple[Layout, ...]:
        """The layouts of the samples where they differ or leave padding, else ()."""
        place = self.places.here(tokens)
        ragged = isinstance(place.layout, str) or place.layout.length < tokens
        return place.samples if ragged else ()

    def runs_own(
        self, layout: Layout, heads: tuple[int, int], x: torch.Tensor, masked: bool = False, rpb: bool = False
    ) -> bool:
        """Whether the module's own attention, dense on its map, runs; counts it if so.

        It does where it is the pattern, unless keys are hidden, and where `auto` estimates that it is the faster one.

        Args:
            layout: Where the tokens sit.
            heads: Their number and width.
            x: What the module got; its batch comes first.
            masked: Whether a mask hides keys.
            rpb: Whether the pattern would get a position bias.
        """
        if self.backend != "auto":
            return False
        always = self.run.always or bool(self.parameters)
        device = x.device
        if torch.compiler.is_compiling():
            if self.precision is None and self.pattern.covers(*layout.grids):
                return not masked
            told = heads, x.dtype, device.type, torch.is_grad_enabled(), masked, rpb
            return not always and constant(_dense_pays_compiled, self.pattern, _sides(layout), told)
        dtype = torch.get_autocast_dtype(device.type) if is_on(device) else x.dtype
        key = layout, x.shape[0], heads, dtype, device, torch.is_grad_enabled(), masked, rpb, REGISTRY.version
        found = self._own.get(key)
        if found is None:
            if len(self._own) >= MANY:
                self._own.clear()
            problem = Problem(
                self.pattern, layout, x.shape[0], heads[0], heads[0], heads[1], dtype, device.type, masked, rpb, key[5],
                precision=self.precision,
            )  # fmt: skip
            verdict = judge(self.pattern, (problem,), (layout,), self.backend, always)
            if not verdict.layouts:
                # Whatever bias the module has, its own code adds.
                verdict = verdict._replace(problems=(replace(problem, rpb=False),))
            self._own[key] = found = verdict, verdict.cells(self.run.tally, self.path, device)
        verdict, cells = found
        if verdict.layouts or (masked and not verdict.slower):
            return False
        if self.run.watcher is not None and verdict.kind == "sparse" and not rpb:
            # The module's own attention, which is the pattern, shows no call: SDPA computes the same.
            return False
        self.run.tally.end(cells, None)
        self._note(verdict)
        return True

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
        out, _ = self._run(q, k, v, layout, scale, key_mask, rpb)
        return out[..., :width]

    def attend_lse(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layout: Layout, scale: float, rpb: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """As `attend` with a position bias, and the log-sum-exp [B, heads, S]."""
        out, lse = self._run(q, k, v, layout, scale, None, rpb, True)
        assert lse is not None
        return out, lse

    def _run(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        layout: Layout,
        scale: float,
        key_mask: torch.Tensor | None,
        rpb: torch.Tensor | None,
        lse: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The pattern on tensors of equal width, counted: output and, if asked for, log-sum-exp, heads first."""
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        options: dict[str, Any] = {"scale": scale, "key_mask": key_mask, "rpb": rpb, "backend": self.backend}
        own, run, precision = self._parameters(q.device), attention, self.precision
        if own:
            options["parameters"] = own
        if lse:
            options["return_lse"] = True
        found: Any
        if torch.compiler.is_compiling():
            found = run(q, k, v, self.pattern, layout, precision=precision, **options)
        else:
            tally = self.run.tally
            call = Call(self.pattern, layout, scale, key_mask, rpb, lse, own, precision)
            cells = self._cells(q, k, v, call)
            begun = tally.begin(cells[0])
            precision = None if cells[0].kept else precision
            if precision is not None:
                run = attention_through
            ran = self._weighed(q.shape[0], layout, rpb)
            try:
                with tally.hearing(cells, begun), ran.weighing():
                    found = run(q, k, v, self.pattern, layout, precision=precision, **options)
            except Outdone as lists:
                ran = ran.outdone(lists.listed)
                found, cells = attention(q, k, v, Dense(), layout, **options), ran.cells(tally, self.path, q.device)
            tally.end(cells, begun)
            self._note(ran)
            show_weights(self.attention, self.path, q, k, call)
            if self.run.watcher is not None and rpb is None:
                self.run.watcher(Watched(self.path, q, k, v, found, self.pattern, (layout,), scale, key_mask, own))
        out, sums = found if lse else (found, None)
        return out.transpose(1, 2), None if sums is None else sums.transpose(1, 2)

    def _weighed(self, batch: int, layout: Layout, rpb: torch.Tensor | None) -> Verdict:
        """What runs for calls on a layout: what was decided where the module's own attention could, if lists weigh."""
        if rpb is None and self.run.watcher is None and isinstance(self.pattern, DynamicPattern):
            for verdict, _ in self._own.values():
                if verdict.weighs and verdict.layouts == (layout,) and verdict.problems[0].batch == batch:
                    return verdict
        return _RAN

    def _cells(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, call: Call) -> tuple[Cell, ...]:
        """Where a call that runs the pattern counts; that is known of calls like earlier ones."""
        learns = wants_gradient(q, k, v, call.rpb, *call.parameters.values())
        given = call.key_mask is None, call.rpb is None, call.lse
        key = q.shape, k.shape[2], q.dtype, q.device, call.layout, learns, given
        found = self._ran.get(key)
        if found is None:
            if len(self._ran) >= MANY:
                self._ran.clear()
            problems, always = (Problem.of(q, k, v, call),), self.run.always or bool(call.parameters)
            verdict = _RAN._replace(problems=problems, exact=why_exact(problems, self.backend, always))
            self._ran[key] = found = verdict.cells(self.run.tally, self.path, q.device)
        return found


_RAN = Verdict("sparse")
Sides = tuple[tuple[int, ...], int, int]


def _sides(layout: Layout) -> tuple[Sides, Sides]:
    """Grid, prefix and suffix of queries and keys, in plain numbers."""
    own, keys = ((each.grid, each.prefix, each.suffix) for each in (layout, layout.keys))
    return own, keys


def _dense_pays_compiled(pattern: Pattern, sides: tuple[Sides, Sides], told: tuple[Any, ...]) -> bool:
    """Whether dense attention is estimated to be faster in compiled code, for few samples and for many."""
    (heads, width), dtype, device, grad, masked, rpb = told
    layout = Layout(*sides[0])
    layout = layout if sides[0] == sides[1] else layout.with_keys(Layout(*sides[1]))
    for batch in BATCHES:
        problem = Problem(
            pattern, layout, batch, heads, heads, width, dtype, device, masked, rpb, grad, mode="compiled"
        )
        found = crossing(problem)
        if found is None or not found.dense_pays_inside:
            return False
    return True


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
        rpb: bool = False,
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
