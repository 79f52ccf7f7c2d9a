"""What one patched model knows while it runs: the forward and step it is at, who calls attention, what happened."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import replace

import torch

from visattn.counts import Row
from visattn.environment import precisions_of
from visattn.operands import wants_gradient
from visattn.patterns import Pattern
from visattn.patterns.choice.memory import Memory, Place
from visattn.problem import is_strict
from visattn.recompute import Carrier
from visattn.registry import REGISTRY
from visattn.report import SiteReport
from visattn.runtime.forward import Forward, Here, Where
from visattn.runtime.rest import Rest
from visattn.runtime.verdict import Ready
from visattn.schedule import Given, Schedule
from visattn.staged import Staged
from visattn.steps import known_step
from visattn.tally import Tally
from visattn.watch import Watcher

Step = tuple[int | None, int | None]
# Kinds of forwards whose decisions are kept: grids, each with dense and sparse steps.
MANY = 16


class Run:
    """The state of one patched model, shared by its runners; safe to use from several threads.

    Attributes:
        name: What reports and errors call the model.
        schedule: Which layers and steps get which pattern.
        strict: Whether a forward that misses a selected module raises.
        always: Whether the pattern runs also where dense attention is estimated to be faster.
        steps: Sources of the step and the number of steps, the surest first.
        mask_row: Row of a full mask [B, 1, S, S] that tells which keys are valid, None if there is none.
        wider: Whether calls may have keys beyond their queries.
        pieces: Whether modules also attend among text alone: such calls are left alone and not counted.
        apart: Whether the masks of calls are those of the text before the grid, which keeps them.
        tally: What happened at each module.
        step: Step and number of steps that the user said, None for "find out".
        sparse_sites: Paths of the modules that are to run a pattern.
        compiled_patterns: What was given to what stands for compiled code, by name.
        watcher: Sees attention calls, or None.
        moved: Bytes that this process sent to others, by module.
        here: Where each thread is.
        forwards: Every forward, also in the recomputations of its blocks.
        labels: What the schedule says of itself where runs decide, of all runs so far.
    """

    def __init__(
        self,
        name: str,
        schedule: Schedule,
        strict: bool = False,
        steps: Sequence[Callable[[], Step]] = (),
        mask_row: int | None = None,
        always: bool = False,
        wider: bool = False,
        pieces: bool = False,
        apart: bool = False,
    ) -> None:
        self.always, self.wider, self.pieces, self.apart = always, wider, pieces, apart
        self.name, self.schedule, self.strict, self.steps, self.mask_row = name, schedule, strict, steps, mask_row
        self.tally = Tally()
        self.step: Step = (None, None)
        self.sparse_sites: list[str] = []
        self.compiled_patterns: dict[str, Given] = {}
        self.watcher: Watcher | None = None
        self.moved: Counter[str] = Counter()
        self.here = Here()
        self.forwards: Carrier[Forward] = Carrier()
        # Two say as well as many that they differ.
        self._kinds: dict[object, Forward] = {}
        self._known: dict[Hashable, tuple[dict[Hashable, Ready], dict[str, Rest]]] = {}
        self.labels: dict[str, None] = {}
        self._warned = self._simulates = False

    @property
    def forward(self) -> Forward | None:
        """The forward that this thread is in, or recomputes a block of.

        Raises:
            ValueError: If it recomputes a block and nothing tells of which forward, where several differ.
        """
        if torch._C._current_graph_task_id() < 0:
            # No backward pass.
            return self.here.forward
        found = self.forwards.value
        if found is None and len(self._kinds) > 1:
            raise ValueError(
                f"{self.name} recomputes a block of one of several forwards with other grids or steps, and neither its "
                "inputs nor its graph tell which: leave gradient checkpointing of that block out, or, if the whole "
                "model is compiled, compile its blocks instead (compile_repeated_blocks())"
            )
        return found or next(iter(self._kinds.values()), None)

    @property
    def site(self) -> str | None:
        """The attention module that this thread is in."""
        return self.here.site

    def enter(self, site: str) -> None:
        """This thread enters an attention module."""
        self.here.site = site

    def start(
        self, where: Where, learns: bool | None = None, gradients: bool | None = None, dense: bool = False
    ) -> None:
        """A forward of the model begins.

        Args:
            where: Where its tokens sit.
            learns: Whether blocks of it may be recomputed for gradients; None if gradients are switched on.
            gradients: Whether gradients are switched on around the model, None for what they are here.
            dense: Whether the client keeps it dense, whatever the schedule says.
        """
        step, total = self._step()
        scheduled = self.schedule.is_dense(step, total)
        dense = dense or scheduled
        if step == 0 and total:
            self._tell_steps(scheduled, total)
        gradients = torch.is_grad_enabled() if gradients is None else gradients
        learns = gradients if learns is None else learns
        stage = self.schedule.stage(step, total, where.grid)
        if self.schedule.staged and (label := self.schedule.staged[0].on(total, where.grid).label):
            self.labels[label] = None
        # Asked at every forward, and mostly there is none.
        precise = self.schedule.precision is not None and self.schedule.is_precise(step, total)
        ready, rests = self._known_in((where, dense, stage, precise, is_strict(), REGISTRY.version))
        self.here.forward = forward = Forward(
            where, dense, step, total, ready=ready, rests=rests, learns=learns, precise=precise
        )
        self._remember(step, total, where.grid, gradients)
        self.here.site = None
        self.forwards.begin(forward, learns)
        if len(self._kinds) < 2:
            self._kinds[where, dense, step, total] = forward

    def _tell_steps(self, dense: bool, total: int) -> None:
        """Warn at the first step of a run of so many of what the schedule says of steps, and the run has not.

        Args:
            dense: Whether the schedule keeps this step dense.
            total: The number of steps.
        """
        if dense and all(self.schedule.is_dense(at, total) for at in range(1, total)):
            first, last = self.schedule.dense_steps, self.schedule.dense_last_steps
            warnings.warn(
                f"no step of this run of {self.name} is sparse: dense_steps={first}"
                f"{f' and dense_last_steps={last}' if last else ''} covers all {total} steps that run",
                stacklevel=4,
            )
        elif beyond := self.schedule.beyond(total):
            warnings.warn(
                f"this run of {self.name} has {total} steps, and {', '.join(beyond)} of its schedule count more: give "
                "steps that it has, an open end like 4- or shares like 0.25-0.5",
                stacklevel=4,
            )

    def precision(self, given: Staged, forward: Forward, *tensors: torch.Tensor) -> str | None:
        """What the part of a schedule that a forward has is computed in, with such queries, keys and values."""
        found = forward.precision(given)
        if found is None or self.schedule.simulates:
            return found
        learns = wants_gradient(*tensors)
        return found if found in precisions_of(tensors[0].device) and not learns else None

    def tell_simulated(self, precision: str) -> None:
        """Warn, once, of 8 bits on a CPU that a schedule brings, and nobody asked for by `precision=`."""
        if not self._simulates and self.schedule.precision is None:
            self._simulates = True
            warnings.warn(
                f"the schedule of {self.name} has parts in {precision}, which a CPU simulates for its errors: they "
                "take several times as long as without; use a GPU, or a schedule that was tuned on a CPU",
                stacklevel=4,
            )

    def leave(self) -> None:
        """This thread is in no forward any more."""
        self.here.forward = self.here.site = None

    def finish(self) -> None:
        """A forward of the model is over: see whether it reached what was selected."""
        forward = self.here.forward
        self.leave()
        if self.here.memory is not None:
            self.here.memory.finish()
        if forward is None or forward.dense or not self.sparse_sites:
            return
        anonymous = sum(site in self.compiled_patterns for site in forward.hits) + forward.kept
        done = {*forward.hits, *forward.resting, *(forward.excused if forward.hits else ())}
        missed = [site for site in self.sparse_sites if site not in done]
        if len(missed) <= anonymous:
            return
        why = "; ".join(sorted({forward.reasons[s] for s in missed if s in forward.reasons})) or "they were not called"
        if self.strict:
            raise ValueError(
                f"strict: {len(missed)} of {len(self.sparse_sites)} selected attention modules of {self.name} did not "
                f"run their pattern ({why}): {', '.join(missed[:4])}"
            )
        if not forward.hits and not self._warned:
            self._warned = True
            all_kept = all(site in forward.excused for site in missed)
            hint = "; apply(..., always=True) runs it all the same" * all_kept
            warnings.warn(f"no attention module of {self.name} ran its pattern: {why}{hint}", stacklevel=3)

    def place(self, site: str, pattern: Pattern) -> Place | None:
        """Where a call of a module keeps what its pattern keeps from step to step, None where it keeps nothing."""
        if not pattern.remembers:
            return None
        # A backward recomputes blocks: their choices are those of the queries and keys that it sees.
        memory = self.here.memory if torch._C._current_graph_task_id() < 0 else None
        return Place(memory, None if memory is None else memory.key(self.here.told or site))

    def _remember(self, step: int | None, total: int | None, grid: tuple[int, ...], gradients: bool) -> None:
        """What this thread's patterns keep, in the forward that begins."""
        if not any(pattern.remembers for pattern in self.schedule.patterns):
            return
        if step is None and (kept := self.schedule.keeps_on(total, grid)) is not None:
            known_step(str(kept), step, total, False)
        if gradients or step is None:
            self.here.memory = None
            return
        if self.here.memory is None:
            self.here.memory = Memory()
        # A guider leaves forwards out in some steps: the second one is not the same in all.
        self.here.memory.begin(self.run_token(), step, total, (self.forward_name(), self.here.perturbed is not None))

    def run_token(self) -> Hashable:
        """What tells one run of a pipeline from another, as far as anything but the steps does."""
        return None

    def forward_name(self) -> Hashable:
        """What tells the forwards of a step from each other, as far as anything but their order does."""
        return None

    def reports(self, sites: Mapping[str, Given], backend: str) -> list[SiteReport]:
        """The report of every module by its path, and of compiled code, which does not tell its module."""
        rows = self.tally.rows()

        def one(name: str, pattern: Given, compiled: bool = False) -> SiteReport:
            row = rows.get(name, Row())
            found = SiteReport.of(self.name, name, pattern, backend, row, compiled)
            return replace(found, moved=self.moved[name], labels=tuple(self.labels))

        compiled = [(name, pattern) for name, pattern in self.compiled_patterns.items() if name in rows]
        return [*(one(*site) for site in sites.items()), *(one(*code, compiled=True) for code in compiled)]

    def _known_in(self, kind: Hashable) -> tuple[dict[Hashable, Ready], dict[str, Rest]]:
        """What was decided in forwards of a kind, and what rested; other backends decide anew."""
        found = self._known.get(kind)
        if found is None:
            if len(self._known) >= MANY:
                self._known = {}
            self._known[kind] = found = {}, {}
        return found

    def _step(self) -> Step:
        """Step and number of steps from the first source that knows; what the user says comes first."""
        if not self.schedule.needs_steps:
            return None, None
        step, total = self.step
        for source in self.steps:
            if step is not None and total is not None:
                break
            found, of = source()
            step, total = (found if step is None else step), (of if total is None else total)
        return step, total
