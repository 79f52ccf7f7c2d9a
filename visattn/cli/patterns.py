"""`visattn patterns`: the patterns, and the names of published methods that stand for some."""

from __future__ import annotations

import typer

from visattn.cli.options import JsonOption, print_json


def patterns(json: JsonOption = False) -> None:
    """List the patterns, and the published methods that can be named instead of one."""
    import inspect

    from visattn.patterns.presets import PRESETS
    from visattn.patterns.registry import KINDS

    kinds = {name: (inspect.getdoc(kind) or "").partition("\n")[0] for name, kind in KINDS.usable().items()}
    if json:
        print_json({"patterns": kinds, "presets": {name: preset._asdict() for name, preset in PRESETS.items()}})
        return
    for name, text in kinds.items():
        typer.echo(f"{name:<14}{text}")
    typer.echo("\nnames that stand for a pattern:")
    for name, preset in PRESETS.items():
        typer.echo(f"{name:<14}{preset.pattern}")
        typer.echo(f"{'':<14}{preset.source}{preset.differs and '; '}{preset.differs}")
