"""What happened at the attention modules of a patched model: counted while it runs, explained afterwards."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from visattn.call_report import CallReport, density, why_kept
from visattn.counts import Row
from visattn.crossing import slower_in_8_bits
from visattn.patterns import Pattern
from visattn.reached import Reached
from visattn.report_text import as_text
from visattn.staged import Staged

__all__ = ["CallReport", "Report", "SiteReport", "density"]


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
        exact: Calls that ran the pattern and that `auto` computed in their own dtype because 8 bits are estimated to
            take longer, likewise.
        first_seconds: Time of first calls, which plan and compile.
        timed: How many calls the estimated times are from, first ones not among them.
        called: How many calls there were.
        caught: Share of the exact attention of sampled queries on what the pattern lists, if `apply` was asked to look.
        choosing_seconds: What of `sparse_seconds` went into choosing what is listed, 0 where nothing is chosen.
        moved: Bytes that this process sent to others for it (`apply(..., parallel=...)`).
        labels: What the schedule says of itself for the runs so far, where it goes by grid and number of steps.
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
    exact: dict[str, int] = field(default_factory=dict)
    first_seconds: float = 0.0
    timed: int = 0
    called: int = 0
    caught: Reached | None = None
    choosing_seconds: float = 0.0
    moved: int = 0
    labels: tuple[str, ...] = ()

    @classmethod
    def of(
        cls, model: str, site: str, pattern: Pattern | Staged, backend: str, row: Row, compiled: bool = False
    ) -> SiteReport:
        """The report of one row of a tally."""
        calls = tuple(
            CallReport.of(
                problem, hits, backend, row.reached.get(problem), row.skipped.get(problem), row.shared.get(problem)
            )
            for problem, hits in row.hits.most_common()
        )
        seconds = row.seconds["sparse"], row.seconds["dense"]
        kept, exact = Counter[str](), Counter[str]()
        for problem, count in row.kept.items():
            kept[f"{why_kept(problem)} on {problem.layout}"] += count
        for problem, count in row.exact.items():
            exact[f"{slower_in_8_bits(problem)} on {problem.layout}"] += count
        rest = dict(kept), dict(exact), row.first_seconds, row.timed, row.calls, None, row.choosing_seconds
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
        left, found = list(self.calls), dict[str, list[CallReport]]()
        for staged in self.pattern.choices:
            here = [c for c in left if staged.span is None or staged.span.has_grid(c.problem.layout.grid)]
            for pattern in dict.fromkeys(stage.pattern for stage in staged.stages):
                steps = ", ".join(stage.steps for stage in staged.stages if stage.pattern == pattern)
                index = next(i for i, stage in enumerate(staged.stages) if stage.pattern == pattern)
                ran = [c for c in here if c.problem.pattern == staged.pattern(index, c.problem.layout.grid)]
                found.setdefault(steps, []).extend(ran)
                # What two choices have in common counts once.
                left = [c for c in left if not any(c is each for each in ran)]
        return tuple((steps, tuple(calls)) for steps, calls in found.items() if calls)

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
            "exact": dict(self.exact),
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
    def exact(self) -> int:
        """Calls that `auto` computed in their own dtype because 8 bits are estimated to take longer."""
        return sum(sum(site.exact.values()) for site in self.sites)

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
            "exact": self.exact,
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
        """A page: modules that did the same are one line, reasons stand once below (`visattn.report_text`)."""
        return as_text(self.to_dict())
