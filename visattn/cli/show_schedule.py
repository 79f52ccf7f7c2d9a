"""`visattn show tuned.json`: a schedule as layers x steps."""

from __future__ import annotations

import itertools
from pathlib import Path

import typer


def show_schedule(path: Path) -> None:
    """Layers x steps in the terminal, each stage as the share of pairs that its pattern lists."""
    from rich.console import Console
    from rich.table import Table

    from visattn.staged import with_precision
    from visattn.tuned import Tuned
    from visattn.tuning.density import density
    from visattn.tuning.verified import in_words

    tuned = Tuned.read(path)
    edges = sorted(
        {float(e) for row in tuned.layers.values() for each in row for e in each.split("-") if e} | {0.0, 1.0}
    )
    # A table of one column is narrower than a title.
    typer.echo(f"{tuned.model} on {'x'.join(map(str, tuned.grid))}, density by layer and share of the run")
    table = Table()
    table.add_column("layer", justify="right")
    for first, end in itertools.pairwise(edges):
        table.add_column(f"{first:g}-{end:g}", justify="right")
    for layer, row in tuned.layers.items():
        spans = [(float(s.partition("-")[0]), float(s.partition("-")[2] or 1), text) for s, text in row.items()]
        cells = []
        for first in edges[:-1]:
            text = next((text for a, b, text in spans if a <= first < b), "dense")
            share = density(with_precision(text)[0], tuned.grid)
            # The 24 greys of a terminal, the darker the denser.
            grey = 252 - round(16 * (0.0 if share is None else share) ** 0.5)
            ink = "black" if grey > 243 else "white"
            cells.append(f"[{ink} on color({grey})]{'?' if share is None else f'{share:.0%}'}[/]")
        table.add_row(layer, *cells)
    Console().print(table)
    counts: dict[str, int] = {}
    for row in tuned.layers.values():
        for text in row.values():
            counts[text] = counts.get(text, 0) + 1
    for text, count in sorted(counts.items(), key=lambda item: -item[1]):
        typer.echo(f"  {count} x {text}")
    if tuned.verified:
        typer.echo("verified on samples held out:")
    for name, value in in_words(tuned.verified):
        typer.echo(f"  {name}: {value}")
