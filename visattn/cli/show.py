"""`visattn show`: a pattern as a picture."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from visattn.cli.options import (
    ForceOption,
    GridOption,
    KeyGridOption,
    KeyPrefixOption,
    KeySuffixOption,
    PatternArgument,
    PrefixOption,
    SuffixOption,
    TileOption,
    output_file,
    position,
    tiles,
    tokens,
)


def show(
    pattern: PatternArgument,
    grid: GridOption,
    out: Annotated[Path, typer.Option(help="The picture to write: .png.")] = Path("mask.png"),
    query: Annotated[
        str | None, typer.Option(help="Position of the query, like 12,40; the middle of the grid if not given.")
    ] = None,
    tile: TileOption = None,
    prefix: PrefixOption = 0,
    suffix: SuffixOption = 0,
    key_grid: KeyGridOption = None,
    key_prefix: KeyPrefixOption = 0,
    key_suffix: KeySuffixOption = 0,
    force: ForceOption = False,
) -> None:
    """Draw what one query sees, and which tiles are visited in full, in part or not at all."""
    layout, where, box = tokens(grid, prefix, suffix, key_grid, key_prefix, key_suffix), position(query), tiles(tile)
    output_file(out, (".png",), force)
    from visattn.files import written_whole
    from visattn.show import draw

    picture = draw(pattern, layout, query=where, tile=box)
    with written_whole(out) as temporary:
        picture.save(temporary)
    typer.echo(f"{out}  ({picture.width} x {picture.height} px)")
