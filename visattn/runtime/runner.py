"""Runs a pattern at the attention modules of a model where a call fits it, else what the model would run."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping
from dataclasses import replace
from typing import Any, Literal, NamedTuple

import torch

from visattn.attend import attention
from visattn.counts import Cell
from visattn.dispatch import load
from visattn.layout import Layout
from visattn.outdone import Outdone
from visattn.parameters import following
from visattn.patterns import Dense, Pattern
from visattn.patterns.choice.memory import placing
from visattn.patterns.kinds import StaticPattern, reads_products
from visattn.problem import Call, Problem
from visattn.runtime.call import AttentionCall
from visattn.runtime.forward import Forward
from visattn.runtime.masks import key_validity
from visattn.runtime.rest import Mark, Rested
from visattn.runtime.run import Run
from visattn.runtime.sequences import Sequences, with_keys, with_queries
from visattn.runtime.verdict import MANY, Mode, Ready, Verdict, judge
from visattn.runtime.watching import show
from visattn.schedule import Given
from visattn.staged import Staged
from visattn.straight import attention_through
from visattn.tally import tells


class Fit(NamedTuple):
    """Whether a call can run a pattern.

    Attributes:
        layouts: Where its tokens sit, of each sample where they differ; empty if it cannot.
        keys: Valid keys, or a bias, see `key_validity`.
        why: Why it cannot, "" if it is to be dense.
    """

    layouts: tuple[Layout, ...] = ()
    keys: torch.Tensor | None = None
    why: str = ""


class Runner:
    """Attention modules of one model that share a pattern and the attention to fall back to.

    Attributes:
        run: The state of the model.
        given: The pattern, or patterns by step.
        backend: "auto" or the name of a backend.
        stock: What the model runs without visattn, as a function of the call.
        parameters: Learnable parameters of the pattern by name.
        precision: What the pattern computes in, None for the dtype of a call.
        unnamed: What stands for a module in reports where the caller does not know it.
    """

    def __init__(
        self,
        run: Run,
        given: Given,
        backend: str,
        stock: Callable[[AttentionCall], torch.Tensor],
        parameters: torch.nn.ParameterDict | None = None,
        precision: str | None = None,
    ) -> None:
        self.precision = precision
        self.run, self.given, self.backend, self.stock = run, given, backend, stock
        self.parameters = torch.nn.ParameterDict() if parameters is None else parameters
        self.unnamed = f"compiled code: {given}{f' in {precision}' if precision else ''}"

    @property
    def pattern(self) -> Pattern:
        """The pattern, in the forward that this thread is in; dense outside of one where it depends on the step."""
        given = self.given
        if not isinstance(given, Staged):
            return given
        forward = self.run.forward
        return Dense() if forward is None else forward.pattern(given)

    def attend(
        self,
        call: AttentionCall,
        site: str | None,
        parameters: Mapping[str, torch.Tensor] | None = None,
        key: Hashable = None,
        mode: Mode = "eager",
    ) -> tuple[torch.Tensor, tuple[Layout, ...]]:
        """Run the pattern if the call fits it, else the stock attention, and count which.

        Args:
            call: The call.
            site: Path of the module, None where that is unknown.
            parameters: Learnable parameters, the runner's own if None; an operator passes those it got, as its
                gradients are theirs.
            key: Of calls that are to be decided like this one, see `key`; None for no others.
            mode: How the call is made.

        Returns:
            Output [B, S, H, D], and the layouts that the pattern ran on, () if the stock attention ran.
        """
        self.run.here.rested = False
        if self._strange(site) or self._is_piece(call):
            return self.stock(call), ()
        if self.run.here.perturbed is not None:
            out = self.run.here.stand_in(call, site)
            if out is not None:
                return out, ()
        device, name = call.q.device, site or self.unnamed
        if parameters is None:
            parameters = following(self.parameters, device)
        fit = self.fit(call)
        sequences = Sequences.of(call, fit.keys, fit.layouts[0]) if fit.layouts else None
        verdict = ran = self._verdict(call, fit, sequences, parameters, mode)
        tally = self.run.tally
        cells = verdict.cells(tally, name, device)
        place = self.run.place(name, self.pattern)
        begun = tally.begin(cells[0])
        if verdict.layouts:
            assert sequences is not None
            how = verdict.layouts, verdict.backend, parameters, verdict.precision
            try:
                with tally.hearing(cells, begun), placing(place), verdict.weighing():
                    out = sequences.attend(self.pattern, *how)
            except Outdone as lists:
                ran, out = verdict.outdone(lists.listed), self.stock(call)
                cells = ran.cells(tally, name, device)
        else:
            out = self.stock(call)
        tally.end(cells, begun)
        if self.run.watcher is not None and site is not None and not (fit.why or call.causal or call.dropout):
            # Who looks sees what was kept.
            layouts = () if ran.slower else fit.layouts
            with placing(place):
                show(self.run, site, self.pattern, call, out, layouts, fit.keys, parameters)
        forward = self.run.forward
        if forward is None:
            # No forward ends, after which nobody is in a module.
            self.run.here.site = None
        else:
            self.note(forward, name, ran)
            padded = sequences is not None and sequences.rows is not None
            if key is not None and not (parameters or verdict.why or padded or len(verdict.layouts) > 1):
                if len(forward.ready) >= MANY:
                    forward.ready.clear()
                plain = not (tells(self.pattern) or self.pattern.remembers)
                forward.ready[key] = Ready(verdict, plain)
        return out, ran.layouts

    def key(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float | None, heads_first: bool, mode: Mode
    ) -> Hashable:
        """What calls without a mask that are decided alike have in common; None if such a call is always looked at.

        Args:
            q: Queries.
            k: Keys.
            v: Values.
            scale: Factor on the logits or None.
            heads_first: Whether they are [B, H, S, D] rather than [B, S, H, D].
            mode: How the call is made.
        """
        library = torch._C
        run = self.run
        if run.watcher is not None or run.here.perturbed is not None or library._is_any_autocast_enabled():
            return None
        if library._current_graph_task_id() >= 0:
            return None
        grad = torch.is_grad_enabled()
        learns = grad and (q.requires_grad or k.requires_grad or v.requires_grad)
        return self, q.shape, k.shape, v.shape, q.dtype, k.dtype, q.device, scale, heads_first, learns, mode

    def attend_alike(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        scale: float | None,
        heads_first: bool,
        mode: Mode,
        stock: Callable[[], torch.Tensor],
    ) -> tuple[torch.Tensor, tuple[Layout, ...]] | None:
        """Attention of a call that is like an earlier one of its forward or one like it; None if there was none.

        It runs at every module, so each function that it calls counts.

        Args:
            q: Queries; there is no mask.
            k: Keys.
            v: Values.
            scale: Factor on the logits or None.
            heads_first: Whether they are [B, H, S, D] rather than [B, S, H, D]; the output is as they are.
            mode: How the call is made; compiled code does not know its module.
            stock: Runs the stock attention on them.
        """
        run, library = self.run, torch._C
        here, tally = run.here, run.tally
        forward = here.forward
        if (
            forward is None
            or run.watcher is not None
            or here.perturbed is not None
            or library._is_any_autocast_enabled()
            or library._current_graph_task_id() >= 0
        ):
            return None
        learns = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
        # What `key` gives.
        ready = forward.ready.get(
            (self, q.shape, k.shape, v.shape, q.dtype, k.dtype, q.device, scale, heads_first, learns, mode)
        )
        if ready is None:
            return None
        name, verdict = (here.site if mode == "eager" else None) or self.unnamed, ready.verdict
        cells = ready.cells.get(name)
        if cells is None:
            ready.cells[name] = cells = verdict.cells(tally, name, q.device)
        begun = tally.begin(cells[0])
        if not verdict.layouts:
            here.rested = self._rested(verdict, cells) if here.rested is None and cells[0].on_gpu else False
            out = stock()
        else:
            try:
                own = (q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)) if heads_first else (q, k, v)
                out = self._listed(*own, scale, name, ready, cells, begun)
                out = out.transpose(1, 2) if heads_first else out
            except Outdone as lists:
                out, verdict = stock(), verdict.outdone(lists.listed)
                cells = verdict.cells(tally, name, q.device)
        tally.end(cells, begun)
        if verdict.kind == "sparse" or verdict.slower or isinstance(self.given, Staged):
            self.note(forward, name, verdict)
        return out, verdict.layouts

    def _rested(self, verdict: Verdict, cells: tuple[Cell, ...]) -> Rested | Literal[False]:
        """What a dense call is, if it counts in one place."""
        mark: Mark = "excused" if verdict.slower else "resting" if isinstance(self.given, Staged) else ""
        return Rested(self.run, cells[0], mark) if len(cells) == 1 else False

    def _listed(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        scale: float | None,
        name: str,
        ready: Ready,
        cells: tuple[Cell, ...],
        begun: Any,
    ) -> torch.Tensor:
        """The pattern of q, k, v [B, S, H, D] without a mask."""
        self.run.here.rested = False
        pattern, verdict = self.pattern, ready.verdict
        options: dict[str, Any] = {"scale": scale, "backend": verdict.backend, "precision": verdict.precision}
        run = attention if verdict.precision is None else attention_through
        if ready.plain:
            return run(q, k, v, pattern, verdict.layouts[0], **options)
        with self.run.tally.hearing(cells, begun), placing(self.run.place(name, pattern)), verdict.weighing():
            return run(q, k, v, pattern, verdict.layouts[0], **options)

    def leave(self, call: AttentionCall, site: str | None, why: str) -> torch.Tensor:
        """Run the stock attention and count it, with the reason ("" means that it was to be dense)."""
        self.run.here.rested = False
        if self._strange(site):
            return self.stock(call)
        name, tally = site or self.unnamed, self.run.tally
        verdict = Verdict("dense", shapes=call.shapes, why=why)
        cells = verdict.cells(tally, name, call.q.device)
        begun = tally.begin(cells[0])
        out = self.stock(call)
        tally.end(cells, begun)
        self.note(self.run.forward, name, verdict)
        return out

    def pass_by(self, site: str | None, why: str) -> None:
        """Count a call of a module that attended without calling this."""
        if self._strange(site):
            return
        name = site or self.unnamed
        self.run.tally.count(name, why)
        self.note(self.run.forward, name, Verdict("dense", why=why))

    def _strange(self, site: str | None) -> bool:
        """Whether a call is none of this model's: a processor that also serves another one, which is not patched."""
        return site is None and self.run.forward is None

    def _is_piece(self, call: AttentionCall) -> bool:
        """Whether a call is one of text alone, beside those of the grid."""
        forward = self.run.forward
        if not self.run.pieces or forward is None or not forward.where.grid:
            return False
        return call.causal or isinstance(forward.layouts(call.k.shape[1]), str)

    def fit(self, call: AttentionCall) -> Fit:
        """Whether the pattern can stand for a call."""
        forward = self.run.forward
        if forward is not None and self._rests(forward):
            return Fit()
        if forward is not None and (why := call.refusal(self.run.wider)):
            return Fit(why=why)
        layouts = self.places(call)
        if isinstance(layouts, str):
            return Fit(why=layouts)
        if len(layouts) not in (1, call.q.shape[0]):
            return Fit(why=f"its batch of {call.q.shape[0]} is not the {len(layouts)} samples of the forward")
        if call.q.shape[1] < call.k.shape[1]:
            wider = with_queries(call.q.shape[1], layouts)
            if isinstance(wider, str):
                return Fit(why=wider)
            layouts = wider if self._takes_keys() else layouts
        elif self.run.apart and call.mask is not None:
            found = self._apart(layouts)
            if isinstance(found, str):
                return Fit(why=found)
            layouts = found
        keys = key_validity(call.mask, call.q, self.run.mask_row, call.k.shape[1])
        if isinstance(keys, str):
            return Fit(why=keys)
        if keys is not None and keys.dtype != torch.bool and not reads_products(self.pattern):
            given = () if call.mask is None else call.mask.shape
            return Fit(why=f"its mask {list(given)} is a bias, which {self.pattern.name} cannot add")
        return Fit(layouts, keys)

    def places(self, call: AttentionCall) -> tuple[Layout, ...] | str:
        """Where the tokens of a call's keys sit, of each sample where they differ, or why nothing tells."""
        forward = self.run.forward
        if forward is None:
            return "called outside of the model's forward"
        return forward.layouts(call.k.shape[1]) if call.layouts is None else call.layouts

    def _rests(self, forward: Forward) -> bool:
        """Whether calls of a forward are to be dense."""
        return forward.dense or isinstance(self.pattern, Dense)

    @property
    def _always(self) -> bool:
        """Whether the pattern runs also where dense attention is estimated to be faster."""
        return self.run.always

    def _takes_keys(self) -> bool:
        """Whether the pattern runs keys beyond the queries as such, without queries for them."""
        known = isinstance(self.pattern, StaticPattern) and not self.parameters
        return known and (self.backend == "auto" or load(self.backend).key_layouts)

    def _apart(self, layouts: tuple[Layout, ...]) -> tuple[Layout, ...] | str:
        """The layout of the grid's queries with all keys, where those before it keep the model's mask."""
        layout = next(iter(layouts))
        if len(layouts) > 1 or layout.suffix or not self._takes_keys():
            return f"the text before its grid has a mask of its own, which {self.pattern.name} cannot leave alone here"
        return (with_keys(slice(layout.prefix, layout.length), layout),) if layout.prefix else layouts

    def _verdict(
        self,
        call: AttentionCall,
        fit: Fit,
        sequences: Sequences | None,
        parameters: Mapping[str, torch.Tensor],
        mode: Mode,
    ) -> Verdict:
        """What runs for a call that fits, or does not, and how it counts."""
        if sequences is None:
            return Verdict("dense", shapes=call.shapes, why=fit.why)
        forward = self.run.forward
        precision = None if forward is None or forward.precise else self._precision(forward, call)
        problems = tuple(self._problems(sequences, fit.layouts, parameters, mode, precision))
        always = self._always or bool(parameters)
        found = judge(self.pattern, problems, fit.layouts, self.backend, always, not call.local)
        if found.precision is not None and problems[0].device == "cpu":
            self.run.tell_simulated(found.precision)
        return found

    def _precision(self, forward: Forward, call: AttentionCall) -> str | None:
        """What the pattern of a call is computed in, in a forward."""
        given = self.given
        own = self.run.precision(given, forward, call.q, call.k, call.v) if isinstance(given, Staged) else None
        return own or self.precision

    def _problems(
        self,
        sequences: Sequences,
        layouts: tuple[Layout, ...],
        parameters: Mapping[str, torch.Tensor],
        mode: Mode,
        precision: str | None,
    ) -> Iterator[Problem]:
        """What a call poses, once for each layout."""
        for i, layout in enumerate(layouts):
            q, k, v, keys, scale, *_, rpb = sequences if len(layouts) == 1 else sequences.sample(i)
            call = Call(self.pattern, layout, scale, keys, rpb, parameters=parameters, precision=precision)
            found = Problem.of(q, k, v, call)
            yield found if mode == "eager" else replace(found, mode=mode)

    def note(self, forward: Forward | None, name: str, verdict: Verdict) -> None:
        """Remember with a forward what happened at a module."""
        if forward is not None:
            forward.note(name, verdict, name == self.unnamed, isinstance(self.given, Staged))
