"""Suites along the axes of published benchmarks: masks x lengths x self and cross x causal and not x scale.

LongCA-bench (Bu et al., "Long-Context Attention Benchmark: From Kernel Efficiency to Distributed Context Parallelism",
2025) times masks over lengths of one long sequence; CAB (Zhang et al., "CAB: Comprehensive Attention Benchmarking on
Long Sequence Modeling", ICML 2023) tells four kinds of attention apart: self and cross, each causal and not. Here they
are masks of this package: `longca` on a line, `cab` on grids of images and clips, whose cross attention reads a coarser
grid and whose causal axis is time.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from visattn.bench import Case, Line, Result, check_case, run_case
from visattn.layout import Layout

NAMES = ("longca", "cab")
# Tokens of a line, and grids, on a CPU and on a GPU.
LINES = {"cpu": (1024, 4096, 16384), "cuda": (4096, 16384, 65536, 262144)}
IMAGES = {"cpu": ((32, 32), (64, 64), (128, 128)), "cuda": ((64, 64), (128, 128), (256, 256), (512, 512))}
CLIPS = {"cpu": ((4, 16, 16), (8, 24, 24), (8, 40, 40)), "cuda": ((8, 32, 32), (16, 48, 48), (24, 80, 80))}
# Heads and channels by device.
SCALES = {"cpu": {"small": (2, 64), "large": (8, 128)}, "cuda": {"small": (8, 64), "large": (24, 128)}}
# Tokens before the line that all see and that see all.
GLOBAL = 64


@dataclass(frozen=True)
class Entry:
    """One case of a suite.

    Attributes:
        mask: What queries see, in a word or two.
        cross: Whether keys are other tokens than queries.
        causal: Whether a query sees nothing behind itself on the causal axis.
        scale: Name of heads and channels.
        case: What is timed.
    """

    mask: str
    cross: bool
    causal: bool
    scale: str
    case: Case

    @property
    def kind(self) -> str:
        """Of attention, as CAB names it."""
        return f"{'causal' if self.causal else 'noncausal'} {'cross' if self.cross else 'self'}"

    @property
    def key(self) -> tuple[str, str, str]:
        """What it shares with cases of other lengths."""
        return self.mask, self.kind, self.scale

    @property
    def products(self) -> float:
        """Products of dense attention."""
        layout = self.case.layout
        return float(layout.length * layout.keys.length * self.case.heads * self.case.dim)


@dataclass(frozen=True)
class Measured:
    """What was measured on one case.

    Attributes:
        entry: The case.
        result: The times; None where the budget was over before.
    """

    entry: Entry
    result: Result | None

    @property
    def best(self) -> Line | None:
        """The line of the backend that `auto` takes, the fastest where it was left out; None without any."""
        if self.result is None:
            return None
        lines = [line for line in self.result.lines[1:] if line.timing is not None]
        taken = [line for line in lines if line.chosen]
        return min(taken or lines, key=lambda line: line.timing.median if line.timing else math.inf, default=None)

    def to_dict(self) -> dict[str, Any]:
        """As JSON."""
        entry = self.entry
        about = {"mask": entry.mask, "kind": entry.kind, "scale": entry.scale}
        if self.result is None:
            return about | {"case": str(entry.case), "lines": [], "reason": "the budget was over"}
        return about | self.result.to_dict()

    @classmethod
    def of(cls, found: dict[str, Any]) -> Measured | None:
        """From what `to_dict` gave; None where nothing was measured."""
        if not found["lines"]:
            return None
        result = Result.of(found)
        layout, causal = result.case.layout, found["kind"].startswith("causal")
        entry = Entry(found["mask"], layout.key_layout is not None, causal, found["scale"], result.case)
        return cls(entry, result)


def suite(name: str, device: str, **options: Any) -> list[Entry]:
    """The cases of a suite, short sequences first.

    Args:
        name: "longca" or "cab".
        device: Where they are to run, which decides how long they are.
        options: Further fields of each `Case`.

    Raises:
        ValueError: If there is no such suite.
    """
    if name not in NAMES:
        raise ValueError(f"suite {name!r} does not exist: pass one of {', '.join(NAMES)}")
    kind = "cuda" if device.startswith("cuda") else "cpu"
    rows = list(_longca(LINES[kind]) if name == "longca" else _cab(IMAGES[kind], CLIPS[kind]))
    found = [
        Entry(
            mask,
            cross,
            causal,
            scale,
            Case(pattern=pattern, layout=layout, heads=heads, dim=dim, device=device, **options),
        )
        for scale, (heads, dim) in SCALES[kind].items()
        for mask, cross, causal, pattern, layout in rows
    ]
    for entry in found:
        check_case(entry.case)
    return sorted(found, key=lambda entry: (entry.case.layout.length, entry.products))


def _longca(lengths: Sequence[int]) -> Iterator[tuple[str, bool, bool, str, Layout]]:
    for n in lengths:
        line, window = Layout(n), min(1024, n // 8)
        yield "full", False, False, "dense", line
        yield "full", False, True, "na(window=-1, causal=true)", line
        yield "sliding window", False, False, f"na(window={window})", line
        yield "sliding window", False, True, f"na(window={window}, causal=true)", line
        yield "strided window", False, False, f"na(window={window}, stride={min(64, window)})", line
        yield "documents", False, False, f"halo(block={n // 8}, halo=0)", line
        yield "global and window", False, False, f"na(window={window})", Layout(n - GLOBAL, GLOBAL)
        yield "dilated window", False, False, f"na(window={window // 4}, dilation=4)", line
        yield "top blocks", False, False, "topk(keep=0.125)", line


def _cab(
    images: Sequence[tuple[int, ...]], clips: Sequence[tuple[int, ...]]
) -> Iterator[tuple[str, bool, bool, str, Layout]]:
    for grid in images:
        coarse = Layout(tuple(n // 2 for n in grid))
        window = max(2, grid[0] // 4)
        for layout in (Layout(grid), Layout(grid, key_layout=coarse)):
            cross = layout.key_layout is not None
            wide = window // 2 if cross else window
            yield "full image", cross, False, "dense", layout
            yield "window of an image", cross, False, f"na(window={wide}x{wide})", layout
            yield "blocks of an image", cross, False, f"halo(block={window}, halo={window // 2})", layout
            yield "circle of an image", cross, False, f"clear(radius={max(1, wide // 2)})", layout
    for grid in clips:
        coarse = Layout((grid[0], *(n // 2 for n in grid[1:])))
        time_of, window = max(2, grid[0] // 2), max(2, grid[1] // 4)
        for layout in (Layout(grid), Layout(grid, key_layout=coarse)):
            cross = layout.key_layout is not None
            wide = window // 2 if cross else window
            yield "full clip", cross, True, "na(window=-1x-1x-1, causal=1x0x0)", layout
            yield "window of a clip", cross, False, f"na(window={time_of}x{wide}x{wide})", layout
            yield "window of a clip", cross, True, f"na(window={time_of}x{wide}x{wide}, causal=1x0x0)", layout


def run_suite(
    entries: Sequence[Entry],
    backends: Sequence[str],
    *,
    budget: float,
    repeats: int = 5,
    patience: float = 10.0,
    tell: Callable[[int, Entry], None] | None = None,
    done: Callable[[list[Measured]], None] | None = None,
    clock: Callable[[], float] = time.monotonic,
) -> list[Measured]:
    """Time cases one after the other, as many as fit into a budget.

    A case is left out when it would be over, and a backend when a call of it would take longer than `patience`: both by
    what calls took for a shorter sequence of the same mask, times the products that there are more, and by what that
    case took beside its calls (compilers, mostly).

    Args:
        entries: What `suite` gave.
        backends: Names of backends.
        budget: Seconds.
        repeats: Measurements of each.
        patience: Seconds.
        tell: Called with the number of a case before it is measured.
        done: Called with everything so far after a case was measured.
        clock: Seconds that pass.

    Raises:
        ValueError: If the budget is not above 0.
    """
    if not budget > 0:
        raise ValueError(f"budget {budget} must be seconds above 0")
    begun, found = clock(), []
    # Products of the last case of a kind, its whole time and that of a call of each backend.
    before: dict[tuple[str, str, str], tuple[float, float, dict[str, float]]] = {}
    for number, entry in enumerate(entries, 1):
        products, whole, calls = before.get(entry.key, (entry.products, 0.0, {}))
        growth = entry.products / products
        # A case is tried, compared with the others, warmed up and timed once before it is measured.
        called = min(whole, (repeats + 4) * sum(calls.values()))
        start = clock()
        if start - begun + whole + (growth - 1) * called > budget:
            found.append(Measured(entry, None))
            continue
        if tell is not None:
            tell(number, entry)
        slow = [name for name in backends if growth * calls.get(name, 0.0) > patience]
        result = run_case(entry.case, [n for n in backends if n not in slow], repeats=repeats, patience=patience)
        left = tuple(Line(name, None, f"a call would take more than {patience:g} s") for name in slow)
        found.append(Measured(entry, dataclasses.replace(result, lines=result.lines + left)))
        times = {line.backend: line.timing.median for line in result.lines if line.timing is not None}
        before[entry.key] = entry.products, clock() - start, calls | times
        if done is not None:
            done(found)
    return found
