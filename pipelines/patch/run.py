"""What one patched model knows while it runs: where its tokens sit, at which step, and who calls attention."""

from __future__ import annotations

import math
import threading
import warnings
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from visattn.dispatch import Call, Problem
from visattn.layout import Layout
from visattn.parameters import following
from visattn.patterns import Dense, Pattern
from visattn.pipelines.families.base import Family, Seen, Where
from visattn.pipelines.patch import operators, parallel
from visattn.pipelines.patch.masks import carry_bias, key_validity
from visattn.pipelines.patch.operators import Decision, Sequences, Stock
from visattn.report import Row, SiteReport, Tally
from visattn.schedule import Schedule
from visattn.watch import Watched, Watcher


@dataclass
class Forward:
    """One forward of the model.

    Attributes:
        where: Where its tokens sit.
        dense: Whether the schedule keeps its step dense.
        step: Index of the denoising step, None where nothing depends on it.
        total: Number of steps, None if unknown.
        hits: Modules that ran their pattern, in compiled code the same name again and again.
        reasons: Why others did not.
        excused: Modules that a pattern leaves as they are on purpose.
        resolved: Layouts of sequence lengths, resolved once.
    """

    where: Where
    dense: bool
    step: int | None = None
    total: int | None = None
    hits: list[str] = field(default_factory=list)
    reasons: dict[str, str] = field(default_factory=dict)
    excused: set[str] = field(default_factory=set)
    resolved: dict[int, tuple[Layout, ...] | str] = field(default_factory=dict)

    def layouts(self, length: int) -> tuple[Layout, ...] | str:
        """The layout of a sequence of `length` tokens, of each sample where they differ, or why there is none."""
        if length not in self.resolved:
            self.resolved[length] = self.where.layouts(length)
        return self.resolved[length]


class Here(threading.local):
    """Where a thread is.

    Attributes:
        forward: The forward.
        site: The attention module.
        merged: What a merging group has made of its tokens, None where it leaves them.
        kept: Why it leaves them, see `merging`.
    """

    forward: Forward | None = None
    site: str | None = None
    merged: Any = None
    kept: str = ""


class Run:
    """The state of one patched model, shared by its groups; safe to use from several threads."""

    def __init__(
        self,
        name: str,
        family: Family,
        config: Any,
        schedule: Schedule,
        layout: Layout | None,
        strict: bool,
        steps: Sequence[Callable[[], tuple[int | None, int | None]]],
    ) -> None:
        self.name, self.family, self.config, self.schedule = name, family, config, schedule
        self.layout, self.strict, self.steps = layout, strict, steps
        self.tally = Tally()
        self.step: tuple[int | None, int | None] = (None, None)
        self.sparse_sites: list[str] = []
        self.compiled_patterns: dict[str, Pattern] = {}
        self.check_sites: Callable[[], None] = lambda: None
        self.watcher: Watcher | None = None
        self.number = operators.register(self)
        self.here = Here()
        self._latest: Forward | None = None
        self._read: tuple[weakref.ref[torch.Tensor], int, Seen, tuple[Any, ...]] | None = None
        self._warned = False

    @property
    def forward(self) -> Forward | None:
        """The forward that this thread is in. Autograd recomputes blocks in threads of its own: the latest one."""
        return self.here.forward or self._latest

    @property
    def site(self) -> str | None:
        """The attention module that this thread is in."""
        return self.here.site

    def enter(self, site: str) -> None:
        """This thread enters an attention module."""
        self.here.site = site

    def begin(self, seen: Seen, compiled: bool = False) -> None:
        """A forward of the model begins; compiled code does not tell when it ends."""
        if compiled and self.here.forward is not None:
            self.finish()
        self.check_sites()
        step, total = self._step()
        dense = self.schedule.is_dense(step, total)
        self.here.forward = self._latest = Forward(self._where(seen), dense, step, total)
        self.here.site = None

    def finish(self) -> None:
        """A forward of the model is over: see whether it reached what was selected."""
        forward, self.here.forward = self.here.forward, None
        if forward is None or forward.dense or not self.sparse_sites:
            return
        anonymous = sum(site in self.compiled_patterns for site in forward.hits)
        done = {*forward.hits, *(forward.excused if forward.hits else ())}
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
            warnings.warn(f"no attention module of {self.name} ran its pattern: {why}", stacklevel=3)

    def _step(self) -> tuple[int | None, int | None]:
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

    def _where(self, seen: Seen) -> Where:
        if self.layout is not None:
            return Where(self.layout.grid, self.layout.prefix, self.layout.suffix)
        if self.family.read is not None and seen.ids is not None:
            seen = self._reading(seen.ids, seen)
        grid = tuple(int(n) for n in seen.grid)
        return Where(grid, int(seen.prefix), int(seen.suffix), self.family.levels, seen.why, seen.samples)

    def _reading(self, ids: torch.Tensor, seen: Seen) -> Seen:
        """Read a tensor's values, which waits for the GPU, once for all steps that pass the same tensor."""
        known, version = self._read, ids._version if not ids.is_inference() else 0
        if known is None or known[0]() is not ids or known[1] != version or known[3] != seen[:3]:
            assert self.family.read is not None
            known = (weakref.ref(ids), version, self.family.read(self.config, ids, seen)._replace(ids=None), seen[:3])
            self._read = known
        return known[2]


class Group:
    """Attention modules of one model that share a pattern and the attention to fall back to.

    A group is what compiled code knows: layers of one group share a graph.
    """

    def __init__(
        self,
        run: Run,
        pattern: Pattern,
        backend: str,
        stock: Stock,
        parameters: torch.nn.ParameterDict | None = None,
    ) -> None:
        self.run, self.pattern, self.backend, self.stock = run, pattern, backend, stock
        self.parameters = torch.nn.ParameterDict() if parameters is None else parameters
        self.number = operators.register(self)
        operators.register_tensors(self.number, self.parameters.values())
        self._anonymous = f"compiled code: {pattern}"
        run.compiled_patterns[self._anonymous] = pattern

    def attend(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        mask: Any,
        scale: float | None,
        grouped: bool,
        site: str | None,
        dropout: float = 0.0,
        causal: bool = False,
        parameters: Mapping[str, torch.Tensor] | None = None,
    ) -> tuple[torch.Tensor, Decision]:
        """Run the pattern on q, k, v [B, S, H, D] if it fits, else the stock attention, and count which.

        Learnable parameters are the group's own; an operator passes those it got, as its gradients are theirs.

        Returns:
            Output [B, S, H, D], and what was run.
        """
        if parameters is None:
            parameters = following(self.parameters, q.device)
        tally, name = self.run.tally, site or self._anonymous
        layouts, keys, why = self._fits(q, k, v, mask, dropout, causal)
        names = tuple(self.parameters)
        decision = Decision(layouts, self.pattern, self.backend, self.run.family.mask_row, self.stock, names)
        covered = self.backend == "auto" and all(self.pattern.covers(layout.grid) for layout in layouts)
        sequences = Sequences(q, k, v, keys, 1.0, v.shape[-1])
        if not layouts or covered:
            with tally.timed(name, "sparse" if layouts else "dense", q.device):
                out = self.stock(q, k, v, mask, scale, grouped, dropout, causal)
            decision = decision._replace(layouts=())
        else:
            with tally.timed(name, "sparse", q.device):
                sequences = Sequences.of(q, k, v, keys, scale)
                out = sequences.attend(self.pattern, layouts, self.backend, parameters)
        if self.run.watcher is not None and site is not None and not (why or causal or dropout):
            self._show(name, q, k, v, out, mask, scale, layouts, keys, parameters)
        if layouts:
            self._hit(name, sequences, layouts, parameters)
        else:
            self._miss(name, why)
        return out, decision

    def leave(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        mask: Any,
        scale: float | None,
        grouped: bool,
        dropout: float,
        causal: bool,
        why: str,
        config: Any = None,
    ) -> torch.Tensor:
        """Run the stock attention and count it, with the reason ("" means that it was to be dense)."""
        name = self.run.site or self._anonymous
        with self.run.tally.timed(name, "dense", q.device):
            out = self.stock(q, k, v, mask, scale, grouped, dropout, causal, config)
        self._miss(name, why)
        return out

    def attend_in_parallel(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        mask: Any,
        scale: float | None,
        grouped: bool,
        dropout: float,
        causal: bool,
        config: Any,
    ) -> torch.Tensor:
        """`attend` on one of several devices that share the sequence: q, k, v [B, S / devices, H, D].

        What does not run the pattern is left to diffusers, which exchanges tokens for heads by itself.
        """
        devices = parallel.degree(config)
        whole = [parallel.whole(t, devices) for t in (q, k, v)]
        layouts, _, why = self._fits(whole[0], whole[1], whole[2], None, dropout, causal)
        if layouts:
            heads = math.gcd(q.shape[2], k.shape[2])
            why = parallel.SPLIT_MASK if mask is not None else parallel.uneven(layouts, heads, devices)
        if not layouts or why:
            return self.leave(q, k, v, mask, scale, grouped, dropout, causal, why, config)
        q, k, v = (parallel.gather(t, layouts[0], config) for t in (q, k, v))
        out, _ = self.attend(q, k, v, None, scale, grouped, self.run.site)
        return parallel.scatter(out, layouts[0], config)

    def _fits(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: Any, dropout: float, causal: bool
    ) -> tuple[tuple[Layout, ...], torch.Tensor | None, str]:
        """Layouts and valid keys of a call that can run the pattern; else () and why not ("" if it is to be dense)."""
        forward = self.run.forward
        if forward is None:
            return (), None, "called outside of the model's forward"
        if forward.dense or isinstance(self.pattern, Dense):
            return (), None, ""
        if q.ndim != 4 or k.shape[1] != q.shape[1] or v.shape != k.shape:
            return (), None, f"q {list(q.shape)} and k {list(k.shape)} are not self-attention of one sequence"
        layouts = forward.layouts(q.shape[1])
        if isinstance(layouts, str):
            return (), None, layouts
        if len(layouts) not in (1, q.shape[0]):
            return (), None, f"its batch of {q.shape[0]} is not the {len(layouts)} samples of the forward"
        if causal or dropout:
            return (), None, "it is causal" if causal else f"it has dropout {dropout}"
        if mask is not None and not isinstance(mask, torch.Tensor):
            return (), None, f"its mask is a {type(mask).__name__}"
        keys = key_validity(mask, q, self.run.family.mask_row)
        is_bias = isinstance(keys, torch.Tensor) and keys.dtype != torch.bool
        if mask is not None and is_bias and not self.pattern.of_products:
            return (), None, f"its mask {list(mask.shape)} is a bias, which {self.pattern.name} cannot add"
        return ((), None, keys) if isinstance(keys, str) else (layouts, keys, "")

    def _show(
        self,
        name: str,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        out: torch.Tensor,
        mask: Any,
        scale: float | None,
        layouts: tuple[Layout, ...],
        keys: torch.Tensor | None,
        parameters: Mapping[str, torch.Tensor],
    ) -> None:
        """Show a call that ran its pattern, or was to be dense, to the handle's watcher."""
        pattern = self.pattern
        if not layouts:
            valid = key_validity(mask, q, self.run.family.mask_row)
            if isinstance(valid, str) or k.shape[1] != q.shape[1]:
                return
            pattern, layouts, keys, parameters = Dense(), (Layout(q.shape[1]),), valid, {}
        factor = float(q.shape[3] ** -0.5 if scale is None else scale)
        if keys is not None and keys.dtype != torch.bool:
            q, k, _ = carry_bias(q, k, v, keys, factor)
            keys = None
        assert self.run.watcher is not None
        self.run.watcher(Watched(name, q, k, v, out, pattern, layouts, factor, keys, parameters))

    def _hit(
        self, name: str, sequences: Sequences, layouts: tuple[Layout, ...], parameters: Mapping[str, torch.Tensor]
    ) -> None:
        """Count a call that ran the pattern, once for each layout."""
        for i, layout in enumerate(layouts):
            q, k, v, keys, scale, _ = sequences if len(layouts) == 1 else sequences.sample(i)
            call = Call(self.pattern, layout, scale, keys, parameters=parameters)
            self.run.tally.hit(name, Problem.of(q, k, v, call))
        if self.run.forward is not None:
            self.run.forward.hits.append(name)

    def _miss(self, name: str, why: str) -> None:
        """Count a call that did not; "" means that it was to be dense."""
        if not why:
            self.run.tally.dense(name)
            return
        self.run.tally.fallback(name, why)
        if self.run.forward is not None:
            self.run.forward.reasons.setdefault(name, why)


def site_reports(run: Run, sites: Mapping[str, Pattern], backend: str) -> list[SiteReport]:
    """The report of every patched module by its path, and of compiled code, which does not tell its module."""
    rows = run.tally.rows()
    found = [SiteReport.of(run.name, path, pattern, backend, rows.get(path, Row())) for path, pattern in sites.items()]
    compiled = [(name, pattern) for name, pattern in run.compiled_patterns.items() if name in rows]
    return [*found, *(SiteReport.of(run.name, name, p, backend, rows[name], compiled=True) for name, p in compiled)]
