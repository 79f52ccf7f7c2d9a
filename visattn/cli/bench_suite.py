"""`visattn bench --suite`: masks x lengths x kinds of attention x scale, as one table and one plot."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import typer

if TYPE_CHECKING:
    from visattn.suites import Entry, Measured


def run(
    name: str, device: str, backend: str, budget: float, repeats: int, patience: float, quiet: bool, **options: Any
) -> list[Measured]:
    """Time a suite within a budget of seconds."""
    from visattn.bench import backend_names
    from visattn.environment import chosen_device
    from visattn.suites import run_suite, suite

    device = chosen_device(device)
    names, entries = backend_names(backend), suite(name, device, **options)

    def tell(number: int, entry: Entry) -> None:
        if not quiet:
            typer.echo(f"[{number}/{len(entries)}] {entry.kind}, {entry.scale}: {entry.case}", err=True)

    with warnings.catch_warnings():
        # Libraries warn about their own fallbacks; the times show what those cost.
        warnings.simplefilter("ignore")
        return run_suite(entries, names, budget=budget, repeats=repeats, patience=patience, tell=tell)


def show(found: Sequence[Measured]) -> None:
    """Print one table, a case a line, and what was not measured."""
    from rich.console import Console
    from rich.table import Table

    from visattn.bench import FAILED
    from visattn.chart import duration
    from visattn.dispatch import load

    done = [each for each in found if each.result is not None]
    names = [name for name in _backends(done) if any(_line(each, name) for each in done)]
    table = Table(box=None, padding=(0, 2, 0, 0))
    for name in ("mask", "attention", "scale", "tokens", "density", *names):
        table.add_column(name, justify="left" if name in ("mask", "attention", "scale") else "right", no_wrap=True)
    for each in done:
        assert each.result is not None
        layout, density = each.entry.case.layout, each.result.density
        tokens = f"{layout.length}" if layout.key_layout is None else f"{layout.length} x {layout.keys.length}"
        cells = []
        for name in names:
            line = _line(each, name)
            faster = "" if line is None or name == "dense" else f" {line.speedup:.2f}x{'*' * line.chosen}"
            cells.append("" if line is None else f"{duration(line.timing.median)}{faster}")
        shown = "" if density is None else f"{density:.1%}"
        table.add_row(each.entry.mask, each.entry.kind, each.entry.scale, tokens, shown, *cells)
    # As wide as it is: a table of a benchmark is read in files too.
    Console(highlight=False, width=400).print(table)
    typer.echo("x: against plain SDPA in the same turns (its causal kernel where all is causal); *: taken by auto")
    others = []
    for name in _backends(done):
        if name in names:
            continue
        lines = [line for each in done if each.result is not None for line in each.result.lines if line.backend == name]
        failed = [line.reason for line in lines if line.reason.startswith(FAILED)]
        if failed or not load(name).available().ok:
            typer.echo(f"{name} runs none: {failed[0] if failed else load(name).available().reason}")
        else:
            others.append(name)
    if others:
        typer.echo(f"for other patterns or calls: {', '.join(others)}")
    left = len(found) - len(done)
    if left:
        typer.echo(f"{left} of {len(found)} cases were left out, as the budget would be over: pass a larger --budget")


def charts(found: Sequence[Measured]) -> list[Any]:
    """Time of the backend that auto takes against tokens, a line for each mask and kind, a panel for each scale."""
    from visattn.canvas import row
    from visattn.chart import Point, chart

    panels = []
    done = [each for each in found if each.result is not None]
    for scale in dict.fromkeys(each.entry.scale for each in done):
        here = [each for each in done if each.entry.scale == scale]
        for cross, causal in sorted({(each.entry.cross, each.entry.causal) for each in here}):
            mine = [each for each in here if (each.entry.cross, each.entry.causal) == (cross, causal)]
            series: dict[str, list[Point]] = {"dense": []}
            for each in mine:
                assert each.result is not None
                tokens = each.entry.case.layout.length
                for name, line in (("dense", each.result.lines[0]), (each.entry.mask, each.best)):
                    if (
                        line is not None
                        and line.timing is not None
                        and (name != "dense" or tokens not in _tokens(series))
                    ):
                        point = Point(tokens, line.timing.median, *line.timing.spread)
                        series.setdefault(name, []).append(point)
            case = mine[0].entry.case
            shape = f"batch {case.batch}, {case.heads} heads x {case.dim}, {case.dtype}, {case.device}"
            panels.append(chart(f"{mine[0].entry.kind}, {shape}", series))
    if not panels:
        raise ValueError("nothing was measured, so there is nothing to plot: pass a larger --budget")
    return [row(panels[i : i + 2]) for i in range(0, len(panels), 2)]


def _tokens(series: dict[str, list[Any]]) -> set[int]:
    return {point.tokens for point in series["dense"]}


def _backends(done: Sequence[Measured]) -> list[str]:
    """Everyone in the results, dense first."""
    return list(dict.fromkeys(line.backend for each in done if each.result for line in each.result.lines))


def _line(each: Measured, name: str) -> Any:
    """The line of a backend with a time, or None."""
    lines = () if each.result is None else each.result.lines
    return next((line for line in lines if line.backend == name and line.timing is not None), None)
