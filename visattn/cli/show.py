"""`visattn show`: a pattern as a picture."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from visattn.cli.options import (
    ForceOption,
    KeyGridOption,
    KeyPrefixOption,
    KeySuffixOption,
    PrefixOption,
    SuffixOption,
    TileOption,
    output_file,
    position,
    tiles,
    tokens,
    unused,
)


def show(
    pattern: Annotated[
        str, typer.Argument(help='A pattern, like "na(window=9x9)", or a schedule that `visattn tune` wrote (.json).')
    ],
    grid: Annotated[
        str | None,
        typer.Option(help="Tokens per axis: 4096, 64x64 (H x W) or 8x32x32 (T x H x W); a pattern needs it."),
    ] = None,
    out: Annotated[Path, typer.Option(help="The picture to write: .png.")] = Path("mask.png"),
    query: Annotated[
        str | None, typer.Option(help="Position of the query, like 12,40.", show_default="the middle of the grid")
    ] = None,
    tile: TileOption = None,
    prefix: PrefixOption = 0,
    suffix: SuffixOption = 0,
    key_grid: KeyGridOption = None,
    key_prefix: KeyPrefixOption = 0,
    key_suffix: KeySuffixOption = 0,
    force: ForceOption = False,
) -> None:
    """Draw what one query sees, and which tiles are visited in full, in part or not at all; or layers x steps."""
    if pattern.lower().endswith(".json"):
        from visattn.cli.show_schedule import show_schedule

        sides = {"prefix": prefix, "suffix": suffix, "key_prefix": key_prefix, "key_suffix": key_suffix}
        drawn = {"grid": grid, "query": query, "tile": tile, "key_grid": key_grid, "out": out != Path("mask.png")}
        unused(f"for the picture of a pattern, and {pattern} is shown as a table in the terminal", **drawn, **sides)
        show_schedule(Path(pattern))
        return
    if grid is None:
        raise ValueError(f"pass --grid to draw {pattern}: tokens per axis, like 64x64")
    layout, where, box = tokens(grid, prefix, suffix, key_grid, key_prefix, key_suffix), position(query), tiles(tile)
    output_file(out, (".png",), force)
    from visattn.files import written_whole
    from visattn.show import draw

    picture = draw(pattern, layout, query=where, tile=box)
    with written_whole(out) as temporary:
        picture.save(temporary)
    typer.echo(f"{out}  ({picture.width} x {picture.height} px)")
