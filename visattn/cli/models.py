"""`visattn models`: the backbones, and what can be swapped."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from visattn.cli.options import JsonOption, print_json


def models(
    filter: Annotated[str, typer.Option("--filter", help="Only names that match, like 'dinat*'.")] = "*",
    json: JsonOption = False,
) -> None:
    """List the backbones that visattn adds to timm, and the attention classes of timm that it can swap."""
    found = _found(filter)
    if json:
        print_json(found)
        return
    for family, names in found["backbones"].items():
        typer.echo(f"{family:<12} {' '.join(names)}")
    typer.echo("\nattention of timm that apply() can swap:")
    for name, models in found["swappable"].items():
        typer.echo(f"  {name:<58} {models}")


def _found(pattern: str) -> dict[str, Any]:
    """Backbones by family, and models by swappable class.

    Raises:
        ValueError: If no backbone matches.
    """
    import fnmatch

    import timm

    import visattn.models
    from visattn.models.swap.records import RECORDS

    families = {family: timm.list_models(module=family) for family in visattn.models.__all__}
    kept = {family: fnmatch.filter(names, pattern) for family, names in families.items()}
    kept = {family: names for family, names in kept.items() if names}
    if not kept:
        every = ", ".join(name for names in families.values() for name in names)
        raise ValueError(f"no backbone matches {pattern!r}; there are {every}")
    return {"backbones": kept, "swappable": {name: record.models for name, record in RECORDS.usable().items()}}
