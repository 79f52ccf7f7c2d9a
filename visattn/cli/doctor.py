"""`visattn doctor`: what this machine has, which backends run here, and what is known of a model."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from visattn.cli.options import JsonOption, print_json


def doctor(
    model: Annotated[
        str | None,
        typer.Option(help="Folder of a diffusers pipeline or model, or an embedded or timm name: what is known of it."),
    ] = None,
    json: JsonOption = False,
) -> None:
    """Say what this machine has: versions, devices, backends with the reason where one cannot run, plug-ins."""
    if model is not None:
        from visattn.cli.doctor_model import examine

        parts = examine(model)
        if json:
            print_json({"models": parts})
        else:
            _print_models(parts)
        return
    from visattn.environment import environment

    found = environment()
    if json:
        print_json(found)
    else:
        _print_tables(found)


def _print_models(parts: list[dict[str, Any]]) -> None:
    for part in parts:
        typer.echo(f"{part['part']}: {part['class']}".removeprefix(": "))
        if part["family"]:
            typer.echo(f"  family  {part['family']}")
        if part["tokens"]:
            typer.echo(f"  tokens  {part['tokens']}")
        if part["sites"]:
            first, last = part["sites"][0], part["sites"][-1]
            typer.echo(f"  sites   {len(part['sites'])}, from {first} to {last}")
            typer.echo(f"  grid    {part['grid']}")
        if part["why"]:
            typer.echo(f"  {'but' if part['sites'] else 'no'}      {part['why']}")


def _print_tables(found: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table(title=found["system"], title_justify="left", box=None, show_header=False, padding=(0, 2, 0, 0))
    for name, version in found["versions"].items():
        table.add_row(name, version or "[dim]not installed[/]")
    table.add_row()
    for device in found["devices"]:
        memory = f"{device['memory'] / 2**30:.0f} GiB" if device["memory"] else "memory unknown"
        threads = f", {device['threads']} threads on {device['cores']} cores" if "threads" in device else ""
        table.add_row(device["device"], f"{device['name']}, {memory}, {device['capability']}{threads}")
    table.add_row()
    for name, support in found["backends"].items():
        verdict = "[green]ok[/]" if support["available"] else f"[yellow]no[/]: {escape(support['reason'])}"
        compiled = f"; {escape(support['compiled'])}" if support["compiled"] else ""
        table.add_row(f"backend {name}", verdict + compiled)
    if found["plugins"]:
        table.add_row()
    for plugin in found["plugins"]:
        verdict = f"[yellow]broken[/]: {escape(plugin['problem'])}" if plugin["problem"] else "[green]ok[/]"
        table.add_row(f"{plugin['kind']} {plugin['name']}", f"{verdict} ({escape(plugin['source'])})")
    Console(highlight=False, soft_wrap=False).print(table)
