"""`visattn simulate`: what a pattern costs before anything runs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from visattn.cli.options import (
    GridOption,
    JsonOption,
    KeyGridOption,
    KeyPrefixOption,
    KeySuffixOption,
    PatternArgument,
    PrefixOption,
    SuffixOption,
    TileOption,
    print_json,
    tiles,
    tokens,
    unused,
)

if TYPE_CHECKING:
    from visattn.kernels.triton.estimate import Estimate
    from visattn.kernels.triton.scaling import Scaling
    from visattn.simulate import Advice, Simulation


def simulate(
    pattern: PatternArgument,
    grid: GridOption,
    tile: TileOption = None,
    prefix: PrefixOption = 0,
    suffix: SuffixOption = 0,
    key_grid: KeyGridOption = None,
    key_prefix: KeyPrefixOption = 0,
    key_suffix: KeySuffixOption = 0,
    advise: Annotated[
        bool, typer.Option("--advise", help="Propose strides and tiles that need no mask at the same window.")
    ] = False,
    volume: Annotated[int, typer.Option(min=1, help="With --advise: tokens per tile that suit the hardware.")] = 64,
    gpu: Annotated[
        str | None, typer.Option(help="Estimate the time on a GPU: h100, a100, ...; says what is measured or assumed.")
    ] = None,
    heads: Annotated[int, typer.Option(min=1, help="With --gpu or --gpus: query heads.")] = 24,
    head_dim: Annotated[int, typer.Option(min=1, help="With --gpu or --gpus: channels per head.")] = 128,
    gpus: Annotated[
        int | None,
        typer.Option(min=2, help="A layer on 1 to so many GPUs (h100 without --gpu), strong and weak scaling."),
    ] = None,
    parallel: Annotated[str, typer.Option(help="With --gpus: halo or ulysses.")] = "halo",
    link: Annotated[str, typer.Option(help="With --gpus: nvlink, pcie or ib.")] = "nvlink",
    layers: Annotated[int, typer.Option(min=1, help="With --gpus: layers of a step, 1 for one layer alone.")] = 1,
    json: JsonOption = False,
) -> None:
    """Count what a pattern visits: density, bounds on the gain over dense attention, masks, planning time."""
    from visattn.simulate import advise as search
    from visattn.simulate import simulate as count

    layout = tokens(grid, prefix, suffix, key_grid, key_prefix, key_suffix)
    box = tiles(tile)
    if gpus is None:
        unused("for --gpus", parallel=parallel != "halo", link=link != "nvlink", layers=layers != 1)
    if gpus is None and gpu is None:
        unused("for --gpu or --gpus", heads=heads != 24, head_dim=head_dim != 128)
    else:
        unused("not for times on GPUs, whose kernels have tiles of their own", advise=advise, tile=tile)
    if not advise:
        unused("for --advise", volume=volume != 64)
    if gpus is not None:
        from visattn.kernels.triton.scaling import scaling

        shape = {"heads": heads, "head_dim": head_dim, "layers": layers}
        found = scaling(pattern, layout, gpus, parallel, (gpu or "h100").lower(), link.lower(), **shape)
        print_json(found.to_dict()) if json else _print_scaling(found, layers)
    elif gpu is not None:
        from visattn.kernels.triton.estimate import estimate

        expected = estimate(pattern, layout, gpu.lower(), heads=heads, head_dim=head_dim)
        print_json(expected.to_dict()) if json else _print_estimate(expected, heads, head_dim)
    elif advise:
        advice = search(pattern, layout, box, volume=volume)
        if json:
            print_json(advice.to_dict())
        else:
            _print(advice.now)
            _print_advice(advice)
    else:
        result = count(pattern, layout, box)
        print_json(result.to_dict()) if json else _print(result)


def text(box: tuple[int, ...]) -> str:
    """A box as 8x8."""
    return "x".join(map(str, box))


def tile_text(result: Simulation) -> str:
    """Query and key tile, once where they are the same."""
    query, key = text(result.query_tile), text(result.key_tile)
    return query if query == key else f"{query} : {key}"


def _print(result: Simulation) -> None:
    dense = f", prefix {result.prefix}" * bool(result.prefix) + f", suffix {result.suffix}" * bool(result.suffix)
    tile = (
        f"{tile_text(result)} tokens" if result.query_tile == result.key_tile else f"{tile_text(result)} (query : key)"
    )
    visited = result.visited / (result.query_tiles * result.key_tiles)
    rows = (
        ("pattern", f"{result.pattern} on {text(result.grid)}{dense}"),
        *([("keys", result.key_layout)] if result.key_layout else []),
        ("density", f"{result.density:.2%} of all query-key pairs are visible"),
        ("FLOP bound", f"{result.flop_bound:.2f}x fewer operations than dense attention"),
        ("tile bound", f"{result.tile_bound:.2f}x, counting everything in the visited tiles"),
        ("tile", tile),
        (
            "tiles",
            f"{result.query_tiles} query x {result.key_tiles} key tiles, {result.visited} visited ({visited:.2%})",
        ),
        ("full share", f"{result.full_share:.1%} of the visited tile pairs need no mask"),
        ("masks", f"{result.masks} distinct partial masks"),
        ("planning", f"{result.planning_seconds * 1000:.1f} ms, once per pattern, layout and tile"),
    )
    for name, value in (*rows, *([("note", result.note)] if result.note else [])):
        typer.echo(f"{name:<12}{value}")


def _print_estimate(expected: Estimate, heads: int, head_dim: int) -> None:
    share = f"{expected.full_share:.1%} of the visited tile pairs need no mask"
    rows = (
        ("time", f"{expected.milliseconds:.2f} ms forward, bfloat16, {heads} heads of {head_dim} (estimate)"),
        ("dense", f"{expected.dense_milliseconds:.2f} ms: {expected.ratio:.1f}x"),
        ("tile bound", f"{expected.tile_bound:.2f}x; {share}"),
        ("tiles", f"{text(expected.query_tile)} : {text(expected.key_tile)} in the {expected.kernel} kernel"),
        ("rates", f"{expected.gpu}: {expected.basis}"),
    )
    for name, value in rows:
        typer.echo(f"{name:<12}{value}")


def _print_scaling(found: Scaling, layers: int) -> None:
    what = "a layer" if layers == 1 else "a step"
    for title, rows in (("strong scaling", found.strong), ("weak scaling", found.weak)):
        typer.echo(
            f"{title}, axis {found.axis} cut\n  GPUs  grid          {what:>9}    attention  exposed   sent      gain"
        )
        for row in rows:
            typer.echo(
                f"  {row.gpus:>4}  {text(row.grid):<14}{row.milliseconds:>8.2f} ms{row.attention:>9.2f} ms"
                f"{row.exposed:>6.2f} ms{row.sent / 1e6:>7.0f} MB{row.speedup:>7.2f}x ({row.efficiency:.0%})"
            )
    for line in found.assumed:
        typer.echo(f"  {line}")


def _print_advice(advice: Advice) -> None:
    from rich.console import Console
    from rich.table import Table

    typer.echo("\nthe same window with other strides and tiles (full: visited tile pairs that need no mask):")
    table = Table(box=None, padding=(0, 3, 0, 0))
    for name in ("", "pattern", "tile (query : key)"):
        table.add_column(name, no_wrap=True)
    for name in ("full", "tile bound", "FLOP bound"):
        table.add_column(name, justify="right", no_wrap=True)
    for label, result in [("now", advice.now), *((f"{i}", r) for i, r in enumerate(advice.better, 1))]:
        bounds = f"{result.tile_bound:.2f}x", f"{result.flop_bound:.2f}x"
        table.add_row(label, result.pattern, tile_text(result), f"{result.full_share:.1%}", *bounds)
    Console(highlight=False, width=160).print(table)
    if advice.reason:
        typer.echo(f"\n{advice.reason}")
