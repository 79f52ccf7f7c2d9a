"""`visattn models`: the backbones, and what can be swapped or patched."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from visattn.cli.options import JsonOption, print_json


def models(
    filter: Annotated[str, typer.Option("--filter", help="Only names that match, like 'dinat*'.")] = "*",
    json: JsonOption = False,
) -> None:
    """List the backbones that visattn adds to timm, and what of timm, diffusers and transformers it can patch."""
    found = _found(filter)
    if json:
        print_json(found)
        return
    for family, names in found["backbones"].items():
        typer.echo(f"{family:<12} {' '.join(names)}")
    typer.echo("\nattention of timm that apply() can swap:")
    for name, models in found["swappable"].items():
        typer.echo(f"  {name:<58} {models}")
    typer.echo("\nmodels of diffusers that apply() can patch:")
    for name, classes in found["diffusers"].items():
        typer.echo(f"  {name:<58} {' '.join(classes)}")
    typer.echo("\nvision towers of transformers that apply() can patch, by folder:")
    for name, models in found["transformers"].items():
        typer.echo(f"  {name:<58} {models}")
    typer.echo("\nfolders of transformers that have no pattern:")
    for name, why in found["no pattern"].items():
        typer.echo(f"  {name:<58} {why}")
    typer.echo(
        "\nmodels of diffusers without a record; where attention is, apply(..., layout=Layout(grid, prefix, suffix)):"
    )
    for name, why in found["unknown"].items():
        typer.echo(f"  {name:<58} {why}")


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
    return {
        "backbones": kept,
        "swappable": {name: record.models for name, record in RECORDS.usable().items()},
        **_diffusers(),
        **_transformers(),
    }


def _transformers() -> dict[str, dict[str, Any]]:
    """Known vision towers of transformers by folder, and why others have no pattern."""
    from visattn.clients.transformers.records import RECORDS, REFUSED

    known = {record.folder: record.models for record in RECORDS if not record.refused}
    refused = {record.folder: record.refused for record in RECORDS if record.refused}
    return {"transformers": known, "no pattern": {**refused, **REFUSED}}


def _diffusers() -> dict[str, dict[str, Any]]:
    """Known model classes of diffusers by family, and why others are not."""
    from visattn.pipelines.families import FAMILIES, unknown

    known, refused = {}, {}
    for name, family in FAMILIES.usable().items():
        if family.nothing:
            refused[name] = f"nothing to sparsify: {family.nothing}"
        else:
            known.setdefault(family.name, []).append(name)
    refused |= {name: unknown.reason(name) for name in (*unknown.NOT_SPARSE, *unknown.NOT_YET)}
    return {"diffusers": known, "unknown": refused}
