"""The tables and plots of docs/performance.md on the suites after LongCA-bench and CAB, measured by suites_gpu."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from scripts.results import ROOT, result, table
from visattn.bench import DENSE, Line
from visattn.canvas import column
from visattn.cli.bench_suite import charts
from visattn.files import written_whole
from visattn.suites import Measured

PICTURES = ROOT / "docs" / "pictures"


def measured(name: str) -> list[Measured]:
    """What was measured of a suite on a machine ("cpu-cab"), short sequences first."""
    found = [Measured.of(each) for each in result(name)["results"]]
    return sorted((each for each in found if each is not None), key=lambda each: each.entry.products)


def suite_table(name: str) -> str:
    """Every mask and kind of attention at the longest sequence that was measured, at the larger scale."""
    longest = {each.entry.key: each for each in measured(name) if each.entry.scale == "large"}
    assert longest, f"nothing of the larger scale was measured: measure {name} with a larger budget"
    first = next(iter(longest.values()))
    assert first.result is not None
    backends = [line.backend for line in first.result.lines if line.backend != DENSE]
    rows = []
    for each in longest.values():
        assert each.result is not None
        times = {line.backend: line for line in each.result.lines}
        density = each.result.density
        cells = [each.entry.mask, each.entry.kind, f"`{each.entry.case.pattern}`", str(each.entry.case.layout)]
        cells.append("" if density is None else f"{density:.1%}")
        for backend in (DENSE, *backends):
            cells.append(_cell(times.get(backend)))
        rows.append(cells)
    case = first.entry.case
    cards = [each["name"] for each in result(name)["devices"] if each["device"].startswith("cuda")][:1]
    start = f"{cards[0]}, batch" if cards else "Batch"
    shape = f"{start} {case.batch}, {case.heads} heads of {case.dim}, {case.dtype}, forward; *: taken by `auto`."
    heads = ["mask", "attention", "pattern", "tokens", "density", DENSE, *backends]
    return f"{table(heads, rows)}\n\n{shape}"


def _cell(line: Line | None) -> str:
    """Time of a backend, and how much faster than dense attention that is."""
    if line is None or line.timing is None:
        return ""
    faster = "" if line.speedup is None or line.backend == DENSE else f", {line.speedup:.1f}x"
    return f"{line.timing.median * 1e3:.3g} ms{faster}{'*' * line.chosen}"


def draw_suites() -> None:
    """The plots: time of the backend that `auto` takes, and of dense attention, against tokens."""
    for name in ("longca", "cab"):
        with written_whole(PICTURES / f"suite-{name}.png") as path:
            column(charts(measured(f"cpu-{name}")), gap=8).quantize(256).save(path, format="png", optimize=True)


def suite_tables() -> dict[str, Callable[[], str]]:
    """Each table by its name."""
    return {f"suite-{name}": partial(suite_table, name) for name in ("cpu-longca", "cpu-cab", "h200-cab")}
