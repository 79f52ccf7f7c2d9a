"""`visattn bench --calls`: what a call costs device, host and wall, and from how many tokens on a pattern pays."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import typer

from visattn.cli.measured import say_who_cannot

if TYPE_CHECKING:
    from visattn.bench import Case
    from visattn.calls import CallTimes


def grids(patterns: Sequence[str], given: Sequence[tuple[int, ...]]) -> Sequence[tuple[int, ...]]:
    """The grids that were asked for, or for patterns without one a sweep from few to many tokens."""
    from visattn.bench import SUITES
    from visattn.calls import sweep

    if given or any(text in SUITES for text in patterns):
        return given
    return sweep(patterns)


def one(case: Case, names: Sequence[str], repeats: int, number: str, quiet: bool) -> CallTimes:
    """Time the calls of one case."""
    from visattn.calls import time_calls

    if not quiet:
        typer.echo(f"{number} {case}", err=True)
    with warnings.catch_warnings():
        # Libraries warn about their own fallbacks; the times show what those cost.
        warnings.simplefilter("ignore")
        return time_calls(case, names, repeats=repeats)


def show(results: Sequence[CallTimes]) -> None:
    """Print a table for each case, and the crossings of each pattern."""
    from rich.console import Console

    from visattn.calls import crossings

    console = Console(highlight=False)
    for result in results:
        typer.echo(f"{result.case}, {result.case.layout.length} tokens")
        console.print(_table(result))
        say_who_cannot([line for line in result.lines if line.reason])
        typer.echo()
    for pattern in dict.fromkeys(result.case.pattern for result in results):
        found = crossings([result for result in results if result.case.pattern == pattern])
        for name, tokens in found.items():
            pays = "is not faster than dense at the largest grid" if tokens is None else f"overtakes dense: {tokens:,}"
            typer.echo(f"{pattern}, {name} {pays}{'' if tokens is None else ' tokens'}")


def charts(results: Sequence[CallTimes]) -> list[Any]:
    """Wall time against tokens, one chart for each pattern."""
    from visattn.chart import Point, chart

    found = []
    for pattern in dict.fromkeys(result.case.pattern for result in results):
        series: dict[str, list[Point]] = {}
        for result in results:
            for line in result.lines:
                if result.case.pattern == pattern and line.wall is not None:
                    point = Point(result.case.layout.length, line.wall, line.wall, line.wall)
                    series.setdefault(line.backend, []).append(point)
        found.append(chart(f"{pattern}, wall time of a call", series))
    return found


def _table(result: CallTimes) -> Any:
    from rich.table import Table

    from visattn.chart import duration

    table = Table(box=None, padding=(0, 3, 0, 0))
    for name in ("", "GPU", "host", "wall", "against dense", "note"):
        table.add_column(name, justify="left" if name in ("", "note") else "right", no_wrap=True)
    dense = next(line.wall for line in result.lines if line.wall is not None)
    for line in result.lines:
        if line.wall is None or line.host is None:
            continue
        times = ["" if seconds is None else duration(seconds) for seconds in (line.gpu, line.host, line.wall)]
        table.add_row(line.backend, *times, f"{dense / line.wall:.2f}x", "taken by auto" * line.chosen)
    return table
