"""Options that several commands share: how a grid, a tile or a query is written, and how JSON is printed."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from visattn.layout import Layout

PatternArgument = Annotated[str, typer.Argument(help='A pattern, like "na(window=9x9)".')]
GridOption = Annotated[str, typer.Option(help="Tokens per axis: 4096, 64x64 (H x W) or 8x32x32 (T x H x W).")]
PrefixOption = Annotated[int, typer.Option(help="Dense tokens before the grid (class token, text).")]
SuffixOption = Annotated[int, typer.Option(help="Dense tokens after the grid (text).")]
KeyGridOption = Annotated[
    str | None,
    typer.Option(help="Keys on a grid of their own, like 16x16 for 64x64 queries.", show_default="the queries'"),
]
KeyPrefixOption = Annotated[int, typer.Option(help="With --key-grid: dense keys before that grid.")]
KeySuffixOption = Annotated[int, typer.Option(help="With --key-grid: dense keys after that grid.")]
TileOption = Annotated[
    str | None,
    typer.Option(
        help="Box of tokens per tile, like 8x8, or query and key boxes like 8x8:4x4.",
        show_default="the pattern's choice",
    ),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON on stdout, and nothing else.")]
ForceOption = Annotated[bool, typer.Option("--force", help="Overwrite what is there.")]


def sizes(text: str, what: str) -> tuple[int, ...]:
    """`8x32x32` as (8, 32, 32).

    Raises:
        ValueError: If it is anything but 1 to 3 whole numbers of at least 1.
    """
    if not re.fullmatch(r"0*[1-9]\d*(x0*[1-9]\d*){0,2}", text.strip().lower()):
        raise ValueError(f"{what} {text!r} must be 1 to 3 whole numbers of at least 1, like 4096, 64x64 or 8x32x32")
    return tuple(int(part) for part in text.strip().lower().split("x"))


def tiles(text: str | None) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
    """`8x8` or `8x8:4x4` as the boxes of queries and keys.

    Raises:
        ValueError: If a box is not 1 to 3 whole numbers of at least 1.
    """
    if text is None:
        return None
    query, _, key = text.partition(":")
    return sizes(query, "--tile"), sizes(key or query, "--tile")


def tokens(
    grid: str, prefix: int, suffix: int, key_grid: str | None = None, key_prefix: int = 0, key_suffix: int = 0
) -> Layout:
    """The layout that the options for a grid and for the grid of keys say.

    Raises:
        ValueError: If a grid is none, or text of keys is given without a grid of theirs.
    """
    from visattn.layout import Layout

    if key_grid is None:
        if key_prefix or key_suffix:
            raise ValueError("--key-prefix and --key-suffix are around a grid of keys: pass --key-grid as well")
        return Layout(sizes(grid, "--grid"), prefix, suffix)
    keys = Layout(sizes(key_grid, "--key-grid"), key_prefix, key_suffix)
    return Layout(sizes(grid, "--grid"), prefix, suffix, keys)


def position(text: str | None) -> tuple[int, ...] | None:
    """`12,40` as (12, 40).

    Raises:
        ValueError: If it is not whole numbers with commas.
    """
    if text is None:
        return None
    if not re.fullmatch(r"\s*\d+\s*([x,]\s*\d+\s*)*", text):
        raise ValueError(f"--query {text!r} must be one index per axis with commas, like 12,40")
    return tuple(int(part) for part in re.split("[x,]", text))


def unused(why: str, **given: Any) -> None:
    """Refuse options that would be passed over without a word.

    Args:
        why: Why they mean nothing here, as in "--top is of ...".
        given: Options by name; those that are not empty were given.

    Raises:
        ValueError: If there is one.
    """
    names = [f"--{name.replace('_', '-')}" for name, value in given.items() if value]
    if names:
        raise ValueError(f"{' and '.join(names)} {'is' if len(names) == 1 else 'are'} {why}: leave that out")


def print_json(value: Any) -> None:
    """Pure JSON on stdout."""
    sys.stdout.write(json.dumps(value, indent=2) + "\n")


def output_file(path: Path, suffixes: tuple[str, ...], force: bool) -> Path:
    """Check before any computing that a file can be written.

    Raises:
        ValueError: If the ending is not one of `suffixes`, the file exists without `force`, or its folder is
            missing or not writable.
    """
    from visattn.files import check_writable_file

    return check_writable_file(path, suffixes, force)


def check_above(option: str, value: float, bound: float, finite: bool = False) -> None:
    """Refuse a number that means nothing; every comparison with nan is false, so that is refused too.

    Raises:
        ValueError: If it is not above the bound, or infinite where it must not be.
    """
    if not value > bound or (finite and value == float("inf")):
        raise ValueError(f"{option} {value:g} must be above {bound:g}{', and finite' * finite}")
