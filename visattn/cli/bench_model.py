"""`visattn bench-model`: a timm model stock against swapped."""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from visattn.cli.measured import PlotOption, SaveOption, check_files, give
from visattn.cli.options import ForceOption, JsonOption

if TYPE_CHECKING:
    from visattn.models.measure import Comparison


def bench_model(
    name: Annotated[str, typer.Argument(help="A model of timm, or transformers:KIND like transformers:dinov2.")],
    pattern: Annotated[str, typer.Option(help='A pattern, like "na(window=15x15)".')],
    size: Annotated[str, typer.Option(help="Sides of the image in pixels, with commas.")] = "512,1024,2048",
    batch: Annotated[int, typer.Option(min=1, help="Images per forward.")] = 1,
    repeats: Annotated[int, typer.Option(min=1, help="Measurements of each; times are medians.")] = 3,
    device: Annotated[str, typer.Option(help="Like cpu or cuda:1; auto takes a GPU if there is one.")] = "auto",
    backend: Annotated[str, typer.Option(help="Who runs the pattern.")] = "auto",
    save: SaveOption = None,
    plot: PlotOption = None,
    force: ForceOption = False,
    json: JsonOption = False,
) -> None:
    """Time, peak memory and operations of a model, stock against swapped, with random weights."""
    if not re.fullmatch(r"\s*0*[1-9]\d*\s*(,\s*0*[1-9]\d*\s*)*", size):
        raise ValueError(f"--size {size!r} must be whole numbers of pixels with commas, like 512,1024")
    check_files(save, plot, force)
    sides = [int(part) for part in size.split(",")]
    results = _run(name, sides, pattern, batch, repeats, device, backend, quiet=json)
    give(results, _print, _charts, save, plot, json)


def _run(
    name: str, sides: Sequence[int], pattern: str, batch: int, repeats: int, device: str, backend: str, quiet: bool
) -> list[Comparison]:
    from visattn.environment import chosen_device
    from visattn.models.measure import check_size, compare

    device = chosen_device(device)
    for side in sides:
        check_size(name, side)
    results: list[Comparison] = []
    for side in sides:
        if not quiet:
            typer.echo(f"{name} at {side} x {side} pixels", err=True)
        try:
            results.append(compare(name, side, pattern, batch=batch, repeats=repeats, device=device, backend=backend))
        except MemoryError as error:
            if not results:
                raise
            typer.echo(f"warning: {error}; the sizes before it are reported", err=True)
            break
    return results


def _charts(results: Sequence[Comparison]) -> list[Any]:
    from visattn.chart import Point, chart

    charts = []
    for what in ("seconds", "attention"):
        series: dict[str, list[Point]] = {"stock": [], "swapped": []}
        for result in results:
            for kind in series:
                timing = getattr(getattr(result, kind), what)
                if timing is None:
                    continue
                series[kind].append(Point(result.tokens, timing.median, *timing.spread))
        series = {kind: points for kind, points in series.items() if points}
        title = "a forward" if what == "seconds" else "one attention call"
        charts.append(chart(f"{results[0].name}, {results[0].pattern}: {title}", series))
    return charts


def _print(results: Sequence[Comparison]) -> None:
    from rich.console import Console
    from rich.table import Table

    from visattn.chart import duration

    table = Table(box=None, padding=(0, 3, 0, 0))
    for name in ("size", "tokens", "", "forward", "gain", "peak memory", "GFLOP", "attention", "gain", "note"):
        table.add_column(name, justify="left" if name in ("", "note") else "right", no_wrap=True)
    for result in results:
        stock, swapped = result.stock, result.swapped
        for kind, side in (("stock", stock), ("swapped", swapped)):
            gains = [""] * 2
            if kind == "swapped":
                whole = stock.seconds.median / side.seconds.median
                gains = [f"{whole:.2f}x", ""]
                if stock.attention is not None and side.attention is not None:
                    gains[1] = f"{stock.attention.median / side.attention.median:.2f}x"
            note = "" if kind == "stock" else f"{result.backend}, density {result.density or 0:.2%}"
            table.add_row(
                f"{result.size}" if kind == "stock" else "",
                f"{result.tokens}" if kind == "stock" else "",
                kind,
                duration(side.seconds.median),
                gains[0],
                "unknown" if side.memory is None else f"{side.memory / 2**20:.0f} MiB",
                f"{side.flops / 1e9:,.2f}",
                "not dense" if side.attention is None else duration(side.attention.median),
                gains[1],
                note,
            )
    typer.echo(f"{results[0].name}, {results[0].pattern}")
    # Without a terminal there is no width to keep to.
    Console(highlight=False, width=None if sys.stdout.isatty() else 160).print(table)
