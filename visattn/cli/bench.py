"""`visattn bench`: time the backends on a pattern."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from visattn.cli.measured import PlotOption, SaveOption, check_files, give, say_who_cannot
from visattn.cli.options import ForceOption, JsonOption, PrefixOption, SuffixOption, check_above, sizes, unused

if TYPE_CHECKING:
    from visattn.bench import Case, Result


def bench(
    patterns: Annotated[
        list[str] | None, typer.Argument(help="Patterns, or names of suites: small, image, video, growth.")
    ] = None,
    suite: Annotated[
        str | None,
        typer.Option(help="longca or cab instead: masks x lengths x self and cross x causal and not x scale."),
    ] = None,
    budget: Annotated[float, typer.Option(help="Of --suite: seconds for all cases, short sequences first.")] = 120.0,
    grid: Annotated[str, typer.Option(help="Tokens per axis, several with commas: 32x32,64x64,128x128.")] = "",
    prefix: PrefixOption = 0,
    suffix: SuffixOption = 0,
    batch: Annotated[int, typer.Option(help="Batch size.")] = 1,
    heads: Annotated[int, typer.Option(help="Heads.")] = 4,
    dim: Annotated[int, typer.Option("--head-dim", "--dim", help="Channels per head.")] = 64,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "float32",
    device: Annotated[str, typer.Option(help="Like cpu or cuda:1; auto takes a GPU if there is one.")] = "auto",
    backend: Annotated[str, typer.Option(help="Names with commas; all is every one but the reference.")] = "all",
    backward: Annotated[bool, typer.Option("--backward", help="Time forward and backward together.")] = False,
    calls: Annotated[
        bool, typer.Option("--calls", help="GPU, host and wall time of a call, and from how many tokens on it pays.")
    ] = False,
    repeats: Annotated[int, typer.Option(min=1, help="Measurements of each; times are medians.")] = 5,
    patience: Annotated[float, typer.Option(help="Measure only once what takes more seconds than this.")] = 10.0,
    save: SaveOption = None,
    plot: PlotOption = None,
    force: ForceOption = False,
    json: JsonOption = False,
) -> None:
    """Time the backends on patterns, with dense SDPA in the same turns: medians and quartiles."""
    check_above("--patience", patience, 0)
    check_above("--budget", budget, 0)
    if suite is not None:
        if patterns or grid or prefix or suffix or calls or (heads, dim) != (4, 64):
            raise ValueError(
                f"--suite {suite} has its own patterns, grids, heads and channels: leave them and --calls out"
            )
        from visattn.cli import bench_suite

        check_files(save, plot, force)
        options = {"batch": batch, "dtype": dtype, "backward": backward}
        timed = bench_suite.run(suite, device, backend, budget, repeats, patience, json, **options)
        give(timed, bench_suite.show, bench_suite.charts, save, plot, json)
        return
    unused("for --suite", budget=budget != 120.0)
    if not patterns:
        raise ValueError("pass a pattern with --grid, the name of a suite, or --suite longca or cab")
    grids = [sizes(part, "--grid") for part in grid.split(",")] if grid else []
    check_files(save, plot, force)
    options = {"batch": batch, "heads": heads, "dim": dim, "dtype": dtype, "backward": backward}
    if calls:
        from visattn.cli import bench_calls

        cases, names = _cases(patterns, bench_calls.grids(patterns, grids), (prefix, suffix), backend, device, options)
        timed = [bench_calls.one(case, names, repeats, f"[{i}/{len(cases)}]", json) for i, case in enumerate(cases, 1)]
        give(timed, bench_calls.show, bench_calls.charts, save, plot, json)
        return
    results = _run(patterns, grids, (prefix, suffix), backend, device, repeats, patience, json, **options)
    give(results, _print, _charts, save, plot, json)


def _cases(
    patterns: Sequence[str],
    grids: Sequence[tuple[int, ...]],
    dense: tuple[int, int],
    backend: str,
    device: str,
    options: Mapping[str, Any],
) -> tuple[list[Case], Sequence[str]]:
    """Every case, checked before any is timed, and the names of the backends."""
    import dataclasses

    from visattn.bench import backend_names, cases, check_case
    from visattn.environment import chosen_device

    device = chosen_device(device)
    names = backend_names(backend)
    found = [dataclasses.replace(case, device=device, **options) for case in cases(patterns, grids, *dense)]
    for case in found:
        check_case(case)
    return found, names


def _run(
    patterns: Sequence[str],
    grids: Sequence[tuple[int, ...]],
    dense: tuple[int, int],
    backend: str,
    device: str,
    repeats: int,
    patience: float,
    quiet: bool,
    **options: Any,
) -> list[Result]:
    """Time the cases one after the other."""
    from visattn.bench import run_case

    todo, names = _cases(patterns, grids, dense, backend, device, options)
    results = []
    for i, case in enumerate(todo, 1):
        if not quiet:
            typer.echo(f"[{i}/{len(todo)}] {case}", err=True)
        with warnings.catch_warnings():
            # Libraries warn about their own fallbacks; the times show what those cost.
            warnings.simplefilter("ignore")
            results.append(run_case(case, names, repeats=repeats, patience=patience))
    return results


def _charts(results: Sequence[Result]) -> list[Any]:
    return [_chart(pattern, results) for pattern in dict.fromkeys(r.case.pattern for r in results)]


def _chart(pattern: str, results: Sequence[Result]) -> Any:
    from visattn.chart import Point, chart

    mine = [result for result in results if result.case.pattern == pattern]
    series: dict[str, list[Point]] = {}
    for result in mine:
        for line in result.lines:
            if line.timing is not None:
                point = Point(result.case.layout.length, line.timing.median, *line.timing.spread)
                series.setdefault(line.backend, []).append(point)
    return chart(f"{pattern}, {_shape(mine[0])}", series)


def _shape(result: Result) -> str:
    case = result.case
    way = "forward and backward" if case.backward else "forward"
    return f"batch {case.batch}, {case.heads} heads x {case.dim}, {case.dtype}, {case.device}, {way}"


def _print(results: Sequence[Result]) -> None:
    from rich.console import Console

    console = Console(highlight=False)
    for result in results:
        typer.echo(f"{result.case}, {result.case.layout.length} tokens\n{_shape(result)}")
        if result.tile_bound is not None:
            bounds = f"{result.flop_bound:.1f}x by visible pairs, {result.tile_bound:.1f}x by visited tiles"
            typer.echo(f"density {result.density:.2%}, bounds on the gain: {bounds}")
        console.print(_table(result))
        say_who_cannot([line for line in result.lines if line.timing is None])
        typer.echo()


def _table(result: Result) -> Any:
    from rich.table import Table

    from visattn.chart import duration

    table = Table(box=None, padding=(0, 3, 0, 0))
    for name in ("", "median", "quartiles", "against dense", "note"):
        table.add_column(name, justify="left" if name in ("", "note") else "right", no_wrap=True)
    for line in result.lines:
        if line.timing is not None:
            low, high = map(duration, line.timing.spread)
            note = ", ".join(["taken by auto"] * line.chosen + [line.reason] * bool(line.reason))
            cells = duration(line.timing.median), f"{low} .. {high}", f"{line.speedup:.2f}x", note
            table.add_row(line.backend, *cells)
    return table
