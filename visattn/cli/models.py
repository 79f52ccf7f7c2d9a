"""`visattn models`: the backbones, and what can be swapped or patched."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from visattn.cli.options import JsonOption, print_json

TITLES = {
    "backbones": "backbones that visattn adds to timm:",
    "swappable": "attention of timm that apply() can swap:",
    "diffusers": "models of diffusers that apply() can patch:",
    "unknown": "models of diffusers without a record; with attention, apply(..., layout=Layout(grid, prefix, suffix)):",
    "transformers": "vision towers of transformers that apply() can patch, by folder:",
    "no pattern": "folders of transformers that have no pattern:",
}


def models(
    filter: Annotated[str, typer.Option("--filter", help="Only names that match, like 'dinat*' or '*Wan*'.")] = "*",
    json: JsonOption = False,
) -> None:
    """List the backbones that visattn adds to timm, and what of timm, diffusers and transformers it can patch."""
    found = {title: _matching(rows, filter) for title, rows in _found().items()}
    if not any(found.values()):
        raise ValueError(
            f"nothing here matches --filter {filter!r}: pass a name of a model, class or family with * for anything, "
            "like 'dinat*' or '*Wan*'"
        )
    if json:
        print_json(found)
        return
    for i, (title, rows) in enumerate((title, found[title]) for title in TITLES if found[title]):
        typer.echo(("\n" if i else "") + TITLES[title])
        width = max(map(len, rows))
        for name, value in rows.items():
            typer.echo(f"  {name:<{width}}  {value if isinstance(value, str) else ' '.join(value)}")


Rows = dict[str, str | list[str]]


def _matching(rows: Rows, pattern: str) -> Rows:
    """The rows whose name or text matches, whatever the case; of lists of names those that match, or all of a match."""
    import fnmatch

    def matches(text: str) -> bool:
        return fnmatch.fnmatchcase(text.lower(), pattern.lower())

    kept: Rows = {}
    for name, value in rows.items():
        if isinstance(value, str):
            kept |= {name: value} if matches(name) or matches(value) else {}
        else:
            names = value if matches(name) else [each for each in value if matches(each)]
            kept |= {name: names} if names else {}
    return kept


def _found() -> dict[str, Rows]:
    """Backbones by family, models by swappable class, and the same of diffusers and transformers."""
    import timm

    import visattn.models
    from visattn.models.swap.records import RECORDS

    return {
        "backbones": {family: timm.list_models(module=family) for family in visattn.models.__all__},
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
