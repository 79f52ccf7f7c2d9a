"""What one patched model knows while it runs: where its tokens sit, at which step, and who calls attention."""

from __future__ import annotations

import threading
import warnings
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from visattn.attend import attention
from visattn.dispatch import Call, Problem
from visattn.layout import Layout
from visattn.patterns import Dense, Pattern
from visattn.pipelines import operators
from visattn.pipelines.families.base import Family, Seen, Where
from visattn.pipelines.operators import Decision, Stock, key_validity
from visattn.report import Row, SiteReport, Tally
from visattn.schedule import Schedule


@dataclass
class Forward:
    """One forward of the model.

    Attributes:
        where: Where its tokens sit.
        dense: Whether the schedule keeps its step dense.
        hits: Modules that ran their pattern, in compiled code the same name again and again.
        reasons: Why others did not.
        layouts: Layouts of sequence lengths, resolved once.
    """

    where: Where
    dense: bool
    hits: list[str] = field(default_factory=list)
    reasons: dict[str, str] = field(default_factory=dict)
    layouts: dict[int, Layout | str] = field(default_factory=dict)

    def layout(self, length: int) -> Layout | str:
        """The layout of a sequence of `length` tokens, or why there is none."""
        if length not in self.layouts:
            self.layouts[length] = self.where.layout(length)
        return self.layouts[length]


class _Here(threading.local):
    """The forward and the attention module that a thread is in."""

    forward: Forward | None = None
    site: str | None = None


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
        self.number = operators.register(self)
        self._here = _Here()
        self._latest: Forward | None = None
        self._read: tuple[weakref.ref[torch.Tensor], int, Seen, tuple[Any, ...]] | None = None
        self._warned = False

    @property
    def forward(self) -> Forward | None:
        """The forward that this thread is in. Autograd recomputes blocks in threads of its own: the latest one."""
        return self._here.forward or self._latest

    @property
    def site(self) -> str | None:
        """The attention module that this thread is in."""
        return self._here.site

    def enter(self, site: str) -> None:
        """This thread enters an attention module."""
        self._here.site = site

    def begin(self, seen: Seen, compiled: bool = False) -> None:
        """A forward of the model begins; compiled code does not tell when it ends."""
        if compiled and self._here.forward is not None:
            self.finish()
        self.check_sites()
        dense = self.schedule.is_dense(*self._step())
        self._here.forward = self._latest = Forward(self._where(seen), dense)
        self._here.site = None

    def finish(self) -> None:
        """A forward of the model is over: see whether it reached what was selected."""
        forward, self._here.forward = self._here.forward, None
        if forward is None or forward.dense or not self.sparse_sites:
            return
        anonymous = sum(site in self.compiled_patterns for site in forward.hits)
        missed = [site for site in self.sparse_sites if site not in forward.hits]
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
        if not self.schedule.dense_steps:
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
        return Where(grid, int(seen.prefix), int(seen.suffix), self.family.levels, seen.why)

    def _reading(self, ids: torch.Tensor, seen: Seen) -> Seen:
        """Read a tensor's values, which waits for the GPU, once for all steps that pass the same tensor."""
        known, version = self._read, ids._version if not ids.is_inference() else 0
        if known is None or known[0]() is not ids or known[1] != version or known[3] != seen[:3]:
            assert self.family.read is not None
            known = (weakref.ref(ids), version, self.family.read(ids, seen)._replace(ids=None), seen[:3])
            self._read = known
        return known[2]


class Group:
    """Attention modules of one model that share a pattern and the attention to fall back to.

    A group is what compiled code knows: layers of one group share a graph.
    """

    def __init__(self, run: Run, pattern: Pattern, backend: str, stock: Stock) -> None:
        self.run, self.pattern, self.backend, self.stock = run, pattern, backend, stock
        self.number = operators.register(self)
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
    ) -> tuple[torch.Tensor, Decision]:
        """Run the pattern on q, k, v [B, S, H, D] if it fits, else the stock attention, and count which.

        Returns:
            Output [B, S, H, D], and what was run.
        """
        tally, name = self.run.tally, site or self._anonymous
        layout, keys, why = self._fits(q, k, v, mask, dropout, causal)
        decision = Decision(layout, self.pattern, self.backend, self.run.family.mask_row, self.stock)
        if layout is None or (self.backend == "auto" and self.pattern.covers(layout.grid)):
            with tally.timed(name, "dense" if layout is None else "sparse", q.device):
                out = self.stock(q, k, v, mask, scale, grouped, dropout, causal)
            decision = decision._replace(layout=None)
        else:
            with tally.timed(name, "sparse", q.device):
                out = attention(q, k, v, self.pattern, layout, scale=scale, key_mask=keys, backend=self.backend)
        self._count(name, layout, why, lambda at: Problem.of(q, k, v, Call(self.pattern, at, 1.0, keys)))
        return out, decision

    def _fits(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: Any, dropout: float, causal: bool
    ) -> tuple[Layout | None, torch.Tensor | None, str]:
        """Layout and valid keys of a call that can run the pattern; else None and why not ("" if it is to be dense)."""
        forward = self.run.forward
        if forward is None:
            return None, None, "called outside of the model's forward"
        if forward.dense or isinstance(self.pattern, Dense):
            return None, None, ""
        if q.ndim != 4 or k.shape[1] != q.shape[1] or v.shape != k.shape:
            return None, None, f"q {list(q.shape)} and k {list(k.shape)} are not self-attention of one sequence"
        layout = forward.layout(q.shape[1])
        if isinstance(layout, str):
            return None, None, layout
        if causal or dropout:
            return None, None, "it is causal" if causal else f"it has dropout {dropout}"
        if mask is not None and not isinstance(mask, torch.Tensor):
            return None, None, f"its mask is a {type(mask).__name__}"
        keys = key_validity(mask, q, self.run.family.mask_row)
        return (None, None, keys) if isinstance(keys, str) else (layout, keys, "")

    def _count(self, name: str, layout: Layout | None, why: str, problem: Callable[[Layout], Problem]) -> None:
        tally, forward = self.run.tally, self.run.forward
        if layout is not None:
            tally.hit(name, problem(layout))
            if forward is not None:
                forward.hits.append(name)
        elif why:
            tally.fallback(name, why)
            if forward is not None:
                forward.reasons.setdefault(name, why)
        else:
            tally.dense(name)


def site_reports(run: Run, sites: Mapping[str, Pattern], backend: str) -> list[SiteReport]:
    """The report of every patched module by its path, and of compiled code, which does not tell its module."""
    rows = run.tally.rows()
    found = [SiteReport.of(run.name, path, pattern, backend, rows.get(path, Row())) for path, pattern in sites.items()]
    compiled = [(name, pattern) for name, pattern in run.compiled_patterns.items() if name in rows]
    return [*found, *(SiteReport.of(run.name, name, p, backend, rows[name], compiled=True) for name, p in compiled)]
