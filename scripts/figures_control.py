"""The tables of docs/inversion.md: how exactly the emoji model finds its noise again."""

from __future__ import annotations

from collections.abc import Callable

from scripts.results import result, table


def inversion_table() -> str:
    """Errors of round trips, measured by scripts/measure/inversion.py."""
    found = result("inversion")
    errors: dict[tuple[str, str], dict[float, str]] = {}
    for each in found["rows"]:
        there, back = each["pattern"], each["back"]
        where = f"`{there}`" if there == back else f"`{there}` there, `{back}` back"
        value = f"{each['error']:.1e}" if each["error"] < 0.01 else f"{each['error']:.1f}"
        errors.setdefault((each["kind"], where), {})[each["guidance"]] = value
    guidances = sorted({each["guidance"] for each in found["rows"]})
    rows = [[*key, *(row.get(guidance, "") for guidance in guidances)] for key, row in errors.items()]
    heads = ["without guidance" if guidance == 1 else f"guidance {guidance:g}" for guidance in guidances]
    on = found["settings"]
    size = f"{on['size']}x{on['size']} pixels, {on['steps']} steps, float32 model, torch {on['torch']}"
    return f"{table(['steps', 'attention', *heads], rows)}\n\n{size}."


def control_tables() -> dict[str, Callable[[], str]]:
    """Each table by its name."""
    return {"inversion": inversion_table}
