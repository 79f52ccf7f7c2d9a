"""What happened at the attention modules of a patched model: counted while it runs, explained afterwards."""

from __future__ import annotations

import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Literal

import torch

from visattn.dispatch import Problem, candidates, choose
from visattn.patterns import ListedPattern, MergingPattern, Pattern
from visattn.plans import plan

Kind = Literal["sparse", "dense"]
# Pairs of CUDA events kept before the finished ones are summed up.
MANY_EVENTS = 4096


@dataclass
class Row:
    """The counts of one attention module.

    Attributes:
        hits: Calls that ran the pattern, by problem.
        dense: Calls that a schedule kept dense.
        fallbacks: Calls that could not run the pattern, by reason.
        seconds: Time inside attention by kind of call; fallbacks count as dense.
        events: CUDA events around calls that are not yet in `seconds`.
    """

    hits: Counter[Problem] = field(default_factory=Counter)
    dense: int = 0
    fallbacks: Counter[str] = field(default_factory=Counter)
    seconds: dict[str, float] = field(default_factory=lambda: {"sparse": 0.0, "dense": 0.0})
    events: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = field(default_factory=list)

    def settle(self, wait: bool) -> None:
        """Move the time between finished events to `seconds`."""
        left = []
        for kind, start, end in self.events:
            if wait:
                end.synchronize()
            if end.query():
                self.seconds[kind] += start.elapsed_time(end) / 1000
            else:
                left.append((kind, start, end))
        self.events = left


class Tally:
    """Counts of every attention module of one model; safe to use from several threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._rows: dict[str, Row] = {}

    def hit(self, site: str, problem: Problem) -> None:
        """Count a call that ran the pattern."""
        with self._lock:
            self._row(site).hits[problem] += 1

    def dense(self, site: str) -> None:
        """Count a call that a schedule kept dense."""
        with self._lock:
            self._row(site).dense += 1

    def fallback(self, site: str, reason: str) -> None:
        """Count a call that could not run the pattern."""
        with self._lock:
            self._row(site).fallbacks[reason] += 1

    def timed(self, site: str, kind: Kind, device: torch.device) -> Clock:
        """A context that adds the time of its body: wall time on a CPU, time between events on a GPU."""
        return Clock(self, site, kind, device)

    def add_seconds(self, site: str, kind: Kind, seconds: float) -> None:
        """Add time of a call."""
        with self._lock:
            self._row(site).seconds[kind] += seconds

    def add_events(self, site: str, kind: Kind, start: torch.cuda.Event, end: torch.cuda.Event) -> None:
        """Add the events around a call; their time is read later, without waiting."""
        with self._lock:
            row = self._row(site)
            row.events.append((kind, start, end))
            if len(row.events) >= MANY_EVENTS:
                row.settle(wait=False)

    def rows(self) -> dict[str, Row]:
        """The counts so far, as a copy; waits for the GPU."""
        with self._lock:
            for row in self._rows.values():
                row.settle(wait=True)
            return {
                name: Row(Counter(r.hits), r.dense, Counter(r.fallbacks), dict(r.seconds))
                for name, r in self._rows.items()
            }

    def _row(self, site: str) -> Row:
        return self._rows.setdefault(site, Row())


class Clock:
    """Times the body of a `with` statement for a `Tally`."""

    __slots__ = ("device", "kind", "site", "start", "tally")

    def __init__(self, tally: Tally, site: str, kind: Kind, device: torch.device) -> None:
        self.tally, self.site, self.device = tally, site, device
        self.kind: Kind = kind
        self.start: Any = None

    def __enter__(self) -> None:
        if self.device.type != "cuda":
            self.start = time.perf_counter()
        elif not torch.cuda.is_current_stream_capturing():
            self.start = torch.cuda.Event(enable_timing=True)
            self.start.record()

    def __exit__(
        self, raised: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if raised is not None or self.start is None:
            return
        if self.device.type != "cuda":
            self.tally.add_seconds(self.site, self.kind, time.perf_counter() - self.start)
        else:
            end = torch.cuda.Event(enable_timing=True)
            end.record()
            self.tally.add_events(self.site, self.kind, self.start, end)


@dataclass(frozen=True)
class CallReport:
    """The calls of one module that posed the same problem.

    Attributes:
        problem: Shapes, pattern and layout.
        hits: How many calls.
        backend: Who ran them.
        reason: Why that one.
        density: Visible share of all (query, key) pairs; None if the pattern does not say.
    """

    problem: Problem
    hits: int
    backend: str
    reason: str
    density: float | None

    @classmethod
    def of(cls, problem: Problem, hits: int, backend: str) -> CallReport:
        """Explain calls after the fact: the choice of a backend is a function of the problem."""
        if isinstance(problem.pattern, MergingPattern):
            return cls(problem, hits, problem.pattern.name, "the only one that merges tokens", None)
        if backend == "auto" and problem.pattern.covers(problem.layout.grid):
            return cls(problem, hits, "stock", "the pattern covers the whole grid", 1.0)
        name = choose(problem, backend).name
        return cls(problem, hits, name, _why(problem, name, backend), density(problem))

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers and texts."""
        layout = self.problem.layout
        return {
            "grid": list(layout.grid),
            "prefix": layout.prefix,
            "suffix": layout.suffix,
            "batch": self.problem.batch,
            "heads": self.problem.heads,
            "head_dim": self.problem.head_dim,
            "hits": self.hits,
            "backend": self.backend,
            "reason": self.reason,
            "density": self.density,
        }


def density(problem: Problem) -> float | None:
    """Visible share of all (query, key) pairs, None for a composed pattern that is no list of pairs."""
    listed = isinstance(problem.pattern, ListedPattern)
    return plan(problem.pattern, problem.layout).density if listed else None


def _why(problem: Problem, name: str, asked: str) -> str:
    if asked != "auto":
        return "asked for"
    reasons = []
    for backend, support, cost in candidates(problem):
        if backend.name == name:
            reasons.insert(0, f"cheapest: {cost / problem.dense_pairs:.2f} of dense (estimate)")
        elif not support.ok:
            reasons.append(f"{backend.name}: {support.reason}")
    return "; ".join(reasons)


@dataclass(frozen=True)
class SiteReport:
    """One attention module.

    Attributes:
        model: Name of the model in its pipeline, or its class.
        site: Path of the module, or a text for all calls inside compiled code, which do not tell their module.
        pattern: What the module was given.
        calls: Calls that ran the pattern, one entry per problem.
        dense: Calls that a schedule kept dense.
        fallbacks: Calls that could not run the pattern, by reason.
        sparse_seconds: Time of calls that ran the pattern.
        dense_seconds: Time of the other calls.
        compiled: Whether this is not one module but compiled code.
    """

    model: str
    site: str
    pattern: Pattern
    calls: tuple[CallReport, ...]
    dense: int
    fallbacks: dict[str, int]
    sparse_seconds: float
    dense_seconds: float
    compiled: bool = False

    @classmethod
    def of(cls, model: str, site: str, pattern: Pattern, backend: str, row: Row, compiled: bool = False) -> SiteReport:
        """The report of one row of a tally."""
        calls = tuple(CallReport.of(problem, hits, backend) for problem, hits in row.hits.most_common())
        seconds = row.seconds["sparse"], row.seconds["dense"]
        return cls(model, site, pattern, calls, row.dense, dict(row.fallbacks), *seconds, compiled)

    @property
    def hits(self) -> int:
        """Calls that ran the pattern."""
        return sum(call.hits for call in self.calls)

    @property
    def density(self) -> float | None:
        """Mean density of the calls that ran the pattern."""
        known = [(call.density, call.hits) for call in self.calls if call.density is not None]
        return sum(d * n for d, n in known) / sum(n for _, n in known) if known else None

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers and texts; backend, reason and grid are those of the most frequent call."""
        most = self.calls[0].to_dict() if self.calls else {}
        return {
            "model": self.model,
            "site": self.site,
            "compiled": self.compiled,
            "pattern": str(self.pattern),
            "backend": most.get("backend"),
            "reason": most.get("reason"),
            "grid": most.get("grid"),
            "density": self.density,
            "hits": self.hits,
            "dense": self.dense,
            "fallbacks": dict(self.fallbacks),
            "sparse_seconds": self.sparse_seconds,
            "dense_seconds": self.dense_seconds,
            "calls": [call.to_dict() for call in self.calls],
        }


@dataclass(frozen=True)
class Report:
    """What a handle's models did since they were patched.

    Attributes:
        sites: Every patched attention module; modules that a schedule keeps dense are among them.
        dense_steps: First steps that stay dense, as given.
    """

    sites: tuple[SiteReport, ...]
    dense_steps: int | float = 0

    @property
    def hits(self) -> int:
        """Calls that ran a pattern."""
        return sum(site.hits for site in self.sites)

    @property
    def modules(self) -> tuple[SiteReport, ...]:
        """The patched modules, without what stands for compiled code."""
        return tuple(site for site in self.sites if not site.compiled)

    @property
    def sites_hit(self) -> int:
        """Modules at which a pattern ran at least once; calls in compiled code do not tell their module."""
        return sum(site.hits > 0 for site in self.modules)

    @property
    def dense(self) -> int:
        """Calls that a schedule kept dense."""
        return sum(site.dense for site in self.sites)

    @property
    def fallbacks(self) -> dict[str, int]:
        """Calls that could not run their pattern, by reason."""
        total: Counter[str] = Counter()
        for site in self.sites:
            total.update(site.fallbacks)
        return dict(total)

    @property
    def sparse_seconds(self) -> float:
        """Time of calls that ran a pattern."""
        return sum(site.sparse_seconds for site in self.sites)

    @property
    def dense_seconds(self) -> float:
        """Time of calls that did not."""
        return sum(site.dense_seconds for site in self.sites)

    @property
    def density(self) -> float | None:
        """Mean density of the calls that ran a pattern."""
        known = [(s.density, s.hits) for s in self.sites if s.density is not None]
        return sum(d * n for d, n in known) / sum(n for _, n in known) if known else None

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers, texts, lists and dicts: ready for JSON."""
        return {
            "sites_patched": len(self.modules),
            "sites_hit": self.sites_hit,
            "hits": self.hits,
            "dense": self.dense,
            "dense_steps": self.dense_steps,
            "fallbacks": self.fallbacks,
            "density": self.density,
            "sparse_seconds": self.sparse_seconds,
            "dense_seconds": self.dense_seconds,
            "sites": [site.to_dict() for site in self.sites],
        }

    def __str__(self) -> str:
        share = "" if self.density is None else f", density {self.density:.3f}"
        lines = [
            f"{self.sites_hit} of {len(self.modules)} attention modules ran a pattern: {self.hits} calls{share}, "
            f"{self.sparse_seconds:.3f} s; {self.dense} dense and {sum(self.fallbacks.values())} fallback calls, "
            f"{self.dense_seconds:.3f} s"
        ]
        width = max((len(site.site) for site in self.sites), default=0)
        for site in self.sites:
            head = f"  {site.site:<{width}}  {site.pattern}: {site.hits} hits, {site.dense} dense"
            shown = site.calls[:1]
            for call in shown:
                share = "" if call.density is None else f", density {call.density:.3f}"
                head += f", {call.backend} on {call.problem.layout}{share} ({call.reason})"
            lines.append(head)
            lines += [f"  {'':<{width}}    {count} x fell back: {why}" for why, count in site.fallbacks.items()]
        return "\n".join(lines)
