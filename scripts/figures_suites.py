"""The tables and plots of docs/performance.md on the suites after LongCA-bench and CAB, measured by suites_gpu."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from scripts.results import RESULTS, ROOT, result, table
from visattn.bench import DENSE, Line
from visattn.canvas import column
from visattn.cli.bench_suite import charts
from visattn.files import written_whole
from visattn.suites import Measured

PICTURES = ROOT / "docs" / "pictures"
SUITES = ("longca", "cab")


def measured(name: str, on: str = "cpu") -> list[Measured]:
    """What was measured of a suite on a kind of device, short sequences first."""
    found = [Measured.of(each) for each in result(f"{on}-{name}")["results"]]
    return sorted((each for each in found if each is not None), key=lambda each: each.entry.products)


def suite_table(name: str, on: str = "cpu") -> str:
    """Every mask and kind of attention at the longest sequence that was measured, at the larger scale."""
    if not (RESULTS / f"{on}-{name}.json").is_file():
        return "Not measured yet."
    longest = {each.entry.key: each for each in measured(name, on) if each.entry.scale == "large"}
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
    shape = f"Batch {case.batch}, {case.heads} heads of {case.dim}, {case.dtype}, forward; *: taken by `auto`."
    heads = ["mask", "attention", "pattern", "tokens", "density", DENSE, *backends]
    gpus = [each["name"] for each in result(f"{on}-{name}")["devices"] if each["device"] != "cpu"]
    return f"{table(heads, rows)}\n\n{shape}" + f" {', '.join(gpus)}." * bool(gpus)


def _cell(line: Line | None) -> str:
    """Time of a backend, and how much faster than dense attention that is."""
    if line is None or line.timing is None:
        return ""
    faster = "" if line.speedup is None or line.backend == DENSE else f", {line.speedup:.1f}x"
    return f"{line.timing.median * 1e3:.3g} ms{faster}{'*' * line.chosen}"


def draw_suites() -> None:
    """The plots: time of the backend that `auto` takes, and of dense attention, against tokens."""
    for name in SUITES:
        with written_whole(PICTURES / f"suite-{name}.png") as path:
            column(charts(measured(name)), gap=8).quantize(256).save(path, format="png", optimize=True)


def suite_tables() -> dict[str, Callable[[], str]]:
    """Each table by its name."""
    found: dict[str, Callable[[], str]] = {f"suite-{name}": partial(suite_table, name) for name in SUITES}
    return found | {f"suite-{name}-gpu": partial(suite_table, name, "h200") for name in SUITES}
