"""What happened at the attention modules of a patched model: counted while it runs, explained afterwards."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import torch

from visattn.counts import Row
from visattn.crossing import crossing
from visattn.dispatch import candidates, choose
from visattn.patterns import ListedPattern, MergingPattern, Pattern
from visattn.plans import plan
from visattn.problem import Problem
from visattn.reached import Reached
from visattn.staged import Staged


@dataclass(frozen=True)
class CallReport:
    """The calls of one module that posed the same problem.

    Attributes:
        problem: Shapes, pattern and layout.
        hits: How many calls.
        backend: Who ran them.
        reason: Why that one.
        density: Visible share of all (query, key) pairs; None if the pattern does not say.
        reached: The same as it was, where q and k choose; `density` is its mean then.
        skipped: Mean share of all pairs that was listed and then passed over (`skip`), None where nothing can be.
    """

    problem: Problem
    hits: int
    backend: str
    reason: str
    density: float | None
    reached: Reached | None = None
    skipped: float | None = None

    @classmethod
    def of(
        cls,
        problem: Problem,
        hits: int,
        backend: str,
        sums: torch.Tensor | None = None,
        skips: torch.Tensor | None = None,
    ) -> CallReport:
        """Explain calls after the fact: the choice of a backend is a function of the problem."""
        if isinstance(problem.pattern, MergingPattern):
            return cls(problem, hits, problem.pattern.name, "the only one that merges tokens", None)
        # A model's own attention stands for a pattern on plain tensors alone.
        plain = problem.precision is None and not problem.rpb
        if backend == "auto" and plain and problem.pattern.covers(*problem.layout.grids):
            return cls(problem, hits, "stock", "the pattern covers the whole grid", 1.0)
        name = choose(problem, backend).name
        reached = None if sums is None else Reached.of(sums, problem.layout)
        share = density(problem) if reached is None else reached.mean
        skipped = None
        if skips is not None:
            skipped = float(skips[0] / skips[1]) * problem.layout.tokens**2 / problem.layout.length**2
        return cls(problem, hits, name, _why(problem, name, backend), share, reached, skipped)

    def __str__(self) -> str:
        share = "" if self.density is None else f", density {self.density:.3f}"
        if self.reached is not None:
            share += f" ({self.reached.least:.3f} to {self.reached.most:.3f} over heads and calls)"
        if self.skipped is not None:
            share += f", {self.skipped:.3f} skipped"
        return f"{self.backend}{self._precision()} on {self.problem.layout}{share}"

    def _precision(self) -> str:
        """What the calls were computed in, in words; nothing for the model's own dtype."""
        precision = self.problem.precision
        if precision is None:
            return ""
        return f" in {precision}, simulated for its errors" if self.backend == "tiles" else f" in {precision}"

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers and texts."""
        layout = self.problem.layout
        return {
            "pattern": str(self.problem.pattern),
            "grid": list(layout.grid),
            "prefix": layout.prefix,
            "suffix": layout.suffix,
            "batch": self.problem.batch,
            "heads": self.problem.heads,
            "head_dim": self.problem.head_dim,
            "hits": self.hits,
            "backend": self.backend,
            "precision": self.problem.precision,
            "reason": self.reason,
            "density": self.density,
            "reached": None if self.reached is None else self.reached._asdict(),
            "skipped": self.skipped,
        }


def density(problem: Problem) -> float | None:
    """Visible share of all (query, key) pairs, None for a composed pattern that is no list of pairs."""
    listed = isinstance(problem.pattern, ListedPattern)
    return plan(problem.pattern, problem.layout).density if listed else None


def _why_kept(problem: Problem) -> str:
    found = crossing(problem)
    return "" if found is None else found.reason


def _why(problem: Problem, name: str, asked: str) -> str:
    if asked != "auto":
        return "asked for"
    reasons = []
    for backend, support, cost in candidates(problem):
        if backend.name == name:
            reasons.insert(0, f"cheapest: {cost / problem.dense_pairs:.2f} of dense (estimate)")
            found = crossing(problem)
            if found is not None:
                reasons[0] += f", {found}"
        elif not support.ok and not support.other:
            reasons.append(f"{backend.name}: {support.reason}")
    return "; ".join(reasons)


@dataclass(frozen=True)
class SiteReport:
    """One attention module.

    Attributes:
        model: Name of the model in its pipeline, or its class.
        site: Path of the module, or a text for all calls inside compiled code, which do not tell their module.
        pattern: What the module was given, for each step where it is `Staged`.
        calls: Calls that ran the pattern, one entry per problem.
        dense: Calls that a schedule or `auto` kept dense.
        fallbacks: Calls that could not run the pattern, by reason.
        sparse_seconds: Estimated time of calls that ran the pattern, as if none were a first one.
        dense_seconds: Likewise of the other calls.
        compiled: Whether this is not one module but compiled code.
        kept: Calls that `auto` kept dense because the pattern is estimated to take longer, by estimates.
        first_seconds: Time of first calls, which plan and compile.
        timed: How many calls the estimated times are from, first ones not among them.
        called: How many calls there were.
        caught: Share of the exact attention of sampled queries on what the pattern lists, if `apply` was asked to look.
        choosing_seconds: What of `sparse_seconds` went into choosing what is listed, 0 where nothing is chosen.
        moved: Bytes that this process sent to others for it (`apply(..., parallel=...)`).
    """

    model: str
    site: str
    pattern: Pattern | Staged
    calls: tuple[CallReport, ...]
    dense: int
    fallbacks: dict[str, int]
    sparse_seconds: float
    dense_seconds: float
    compiled: bool = False
    kept: dict[str, int] = field(default_factory=dict)
    first_seconds: float = 0.0
    timed: int = 0
    called: int = 0
    caught: Reached | None = None
    choosing_seconds: float = 0.0
    moved: int = 0

    @classmethod
    def of(
        cls, model: str, site: str, pattern: Pattern | Staged, backend: str, row: Row, compiled: bool = False
    ) -> SiteReport:
        """The report of one row of a tally."""
        calls = tuple(
            CallReport.of(problem, hits, backend, row.reached.get(problem), row.skipped.get(problem))
            for problem, hits in row.hits.most_common()
        )
        seconds = row.seconds["sparse"], row.seconds["dense"]
        kept: Counter[str] = Counter()
        for problem, count in row.kept.items():
            kept[f"{_why_kept(problem)} on {problem.layout}"] += count
        rest = dict(kept), row.first_seconds, row.timed, row.calls, None, row.choosing_seconds
        return cls(model, site, pattern, calls, row.dense, dict(row.fallbacks), *seconds, compiled, *rest)

    @property
    def hits(self) -> int:
        """Calls that ran the pattern."""
        return sum(call.hits for call in self.calls)

    @property
    def density(self) -> float | None:
        """Mean density of the calls that ran the pattern."""
        known = [(call.density, call.hits) for call in self.calls if call.density is not None]
        return sum(d * n for d, n in known) / sum(n for _, n in known) if known else None

    @property
    def stages(self) -> tuple[tuple[str, tuple[CallReport, ...]], ...]:
        """Texts of steps and the calls that ran their pattern; equal patterns together, without dense ones."""
        if not isinstance(self.pattern, Staged):
            return ()
        staged, found = self.pattern, dict[str, tuple[CallReport, ...]]()
        for pattern in staged.patterns:
            steps = ", ".join(stage.steps for stage in staged.stages if stage.pattern == pattern)
            index = next(i for i, stage in enumerate(staged.stages) if stage.pattern == pattern)
            calls = (c for c in self.calls if c.problem.pattern == staged.pattern(index, c.problem.layout.grid))
            found[steps] = tuple(calls)
        return tuple((steps, calls) for steps, calls in found.items() if calls)

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers and texts; backend, reason and grid are those of the most frequent call."""
        most = self.calls[0].to_dict() if self.calls else {}
        return {
            "model": self.model,
            "site": self.site,
            "compiled": self.compiled,
            "pattern": str(self.pattern),
            "backend": most.get("backend"),
            "precision": most.get("precision"),
            "reason": most.get("reason"),
            "grid": most.get("grid"),
            "density": self.density,
            "hits": self.hits,
            "dense": self.dense,
            "kept": dict(self.kept),
            "fallbacks": dict(self.fallbacks),
            "sparse_seconds": self.sparse_seconds,
            "dense_seconds": self.dense_seconds,
            "choosing_seconds": self.choosing_seconds,
            "first_seconds": self.first_seconds,
            "timed": self.timed,
            "called": self.called,
            "caught": None if self.caught is None else self.caught._asdict(),
            "moved": self.moved,
            "calls": [call.to_dict() for call in self.calls],
            "stages": [{"steps": steps, "calls": [call.to_dict() for call in calls]} for steps, calls in self.stages],
        }


@dataclass(frozen=True)
class Report:
    """What a handle's models did since they were patched.

    Attributes:
        sites: Every patched attention module; modules that a schedule keeps dense are among them.
        dense_steps: First steps that stay dense, as given.
        dense_last_steps: Last steps that stay dense, as given.
        schedule: What a preset says about itself, "" for other schedules.
    """

    sites: tuple[SiteReport, ...]
    dense_steps: int | float = 0
    dense_last_steps: int | float = 0
    schedule: str = ""

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
        """Calls that a schedule or `auto` kept dense."""
        return sum(site.dense for site in self.sites)

    @property
    def kept(self) -> int:
        """Those of them that `auto` kept dense because the pattern is estimated to take longer."""
        return sum(sum(site.kept.values()) for site in self.sites)

    @property
    def fallbacks(self) -> dict[str, int]:
        """Calls that could not run their pattern, by reason."""
        total: Counter[str] = Counter()
        for site in self.sites:
            total.update(site.fallbacks)
        return dict(total)

    @property
    def sparse_seconds(self) -> float:
        """Estimated time of calls that ran a pattern, as if none were a first one."""
        return sum(site.sparse_seconds for site in self.sites)

    @property
    def dense_seconds(self) -> float:
        """Estimated time of calls that did not."""
        return sum(site.dense_seconds for site in self.sites)

    @property
    def choosing_seconds(self) -> float:
        """What of `sparse_seconds` went into choosing what is listed."""
        return sum(site.choosing_seconds for site in self.sites)

    @property
    def first_seconds(self) -> float:
        """Time of first calls, which plan and compile."""
        return sum(site.first_seconds for site in self.sites)

    @property
    def moved(self) -> int:
        """Bytes that this process sent to others."""
        return sum(site.moved for site in self.sites)

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
            "kept": self.kept,
            "dense_steps": self.dense_steps,
            "dense_last_steps": self.dense_last_steps,
            "fallbacks": self.fallbacks,
            "density": self.density,
            "sparse_seconds": self.sparse_seconds,
            "dense_seconds": self.dense_seconds,
            "choosing_seconds": self.choosing_seconds,
            "first_seconds": self.first_seconds,
            "timed": sum(site.timed for site in self.sites),
            "called": sum(site.called for site in self.sites),
            "moved": self.moved,
            "schedule": self.schedule,
            "sites": [site.to_dict() for site in self.sites],
        }

    def __str__(self) -> str:
        share = "" if self.density is None else f", density {self.density:.3f}"
        ran = f"{self._who()}: {self.hits} calls{share}, {self.sparse_seconds:.3f} s"
        others = f"{self.dense} dense and {sum(self.fallbacks.values())} fallback calls, {self.dense_seconds:.3f} s"
        lines = [f"{ran}; {others}{self._timing()}{self._moving()}"]
        lines += [f"  {self.schedule}"] if self.schedule else []
        width = max((len(site.site) for site in self.sites), default=0)
        said = None  # most modules have the reason of the one before, which is not repeated
        for site in self.sites:
            head = f"  {site.site:<{width}}  {site.pattern}: {site.hits} hits, {site.dense} dense"
            for call in () if site.stages else site.calls[:1]:
                head += f", {call}" + f" ({call.reason})" * (call.reason != said)
                said = call.reason
            if site.choosing_seconds and site.sparse_seconds:
                head += f"; {site.choosing_seconds / site.sparse_seconds:.0%} of the time is choosing"
            if site.caught is not None:
                head += f"; {site.caught.mean:.3f} of the attention caught ({site.caught.least:.3f} at least)"
            if site.moved:
                head += f"; sent {_bytes(site.moved / max(1, site.called))} a call"
            lines.append(head)
            lines += [
                f"  {'':<{width}}    steps {steps}: {call.problem.pattern}, {call.hits} hits, {call}"
                for steps, calls in site.stages
                for call in calls[:1]
            ]
            lines += [f"  {'':<{width}}    {count} x kept dense: {why}" for why, count in site.kept.items()]
            lines += [f"  {'':<{width}}    {count} x fell back: {why}" for why, count in site.fallbacks.items()]
        return "\n".join(lines)

    def _who(self) -> str:
        """Who ran a pattern, in words."""
        modules = f"{self.sites_hit} of {len(self.modules)} attention modules"
        compiled = sum(site.hits for site in self.sites if site.compiled)
        if not compiled:
            return f"{modules} ran a pattern"
        found = f"compiled code, which does not tell its {len(self.modules)} modules, ran a pattern {compiled} times"
        return f"{found}, outside of it {modules}" if self.sites_hit else found

    def _moving(self) -> str:
        """What went to other processes, in words."""
        return f"; {_bytes(self.moved)} sent to other processes" if self.moved else ""

    def _timing(self) -> str:
        """What the times are, in words, where that is not plain."""
        timed, called = (sum(getattr(site, name) for site in self.sites) for name in ("timed", "called"))
        if not self.first_seconds:
            return ""
        sampled = f", estimated from {timed} of {called} calls" if timed else ""
        return f" (first calls apart: {self.first_seconds:.3f} s{sampled})"


def _bytes(number: float) -> str:
    """A number of bytes in the largest unit below it."""
    for unit in ("B", "KB", "MB"):
        if number < 1000:
            return f"{number:.3g} {unit}"
        number /= 1000
    return f"{number:.3g} GB"
