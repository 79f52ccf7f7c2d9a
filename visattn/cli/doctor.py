"""`visattn doctor`: what this machine has and which backends run here."""

from __future__ import annotations

from typing import Any

from visattn.cli.options import JsonOption, print_json


def doctor(json: JsonOption = False) -> None:
    """Say what this machine has: versions, devices, backends with the reason where one cannot run, plug-ins."""
    from visattn.environment import environment

    found = environment()
    if json:
        print_json(found)
    else:
        _print_tables(found)


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
        verdict = "[green]ok[/]" if support["available"] else f"[yellow]no[/]: {support['reason']}"
        table.add_row(f"backend {name}", verdict)
    if found["plugins"]:
        table.add_row()
    for plugin in found["plugins"]:
        verdict = f"[yellow]broken[/]: {escape(plugin['problem'])}" if plugin["problem"] else "[green]ok[/]"
        table.add_row(f"{plugin['kind']} {plugin['name']}", f"{verdict} ({escape(plugin['source'])})")
    Console(highlight=False, soft_wrap=False).print(table)
