"""`visattn presets`: the schedules that ship with the package, and what was measured of them."""

from __future__ import annotations

import typer

from visattn.cli.options import JsonOption, print_json


def presets(json: JsonOption = False) -> None:
    """List the schedules that apply(target, "auto") knows, with what was measured on samples held out."""
    from visattn.presets import presets as found

    if json:
        print_json([preset.to_dict() for preset in found()])
        return
    for preset in found():
        typer.echo(str(preset))
    if not found():
        typer.echo("no preset is shipped: `visattn tune` makes a schedule for your model")
