"""The tables of docs/inversion.md and docs/guidance.md, both about the emoji model."""

from __future__ import annotations

from collections.abc import Callable

from scripts.results import result, table


def inversion_table(name: str = "inversion") -> str:
    """Errors of round trips, measured by scripts/measure/inversion.py."""
    found = result(name)
    errors: dict[tuple[str, str], dict[float, str]] = {}
    for each in found["rows"]:
        there, back = each["pattern"], each["back"]
        where = f"`{there}`" if there == back else f"`{there}` there, `{back}` back"
        error = each["error"]
        value = f"{error:.1e}" if 0 < error < 0.01 else f"{error:.1f}" if error else "0"
        errors.setdefault((each["kind"], where), {})[each["guidance"]] = value
    guidances = sorted({each["guidance"] for each in found["rows"]})
    rows = [[*key, *(row.get(guidance, "") for guidance in guidances)] for key, row in errors.items()]
    heads = ["without guidance" if guidance == 1 else f"guidance {guidance:g}" for guidance in guidances]
    on = found["settings"]
    size = f"{on['size']}x{on['size']} pixels, {on['steps']} steps, float32 model, torch {on['torch']}"
    return f"{table(['steps', 'attention', *heads], rows)}\n\n{size}."


def guidance_table() -> str:
    """Pictures named right under each guidance, measured by scripts/measure/guidance.py."""
    found = result("guidance")
    patterns = list(dict.fromkeys(each["pattern"] for each in found["rows"].values()))
    rows: dict[str, dict[str, str]] = {}
    for each in found["rows"].values():
        perturbed = f"{each['scale']:g} x `{each['perturb']}`" if each["scale"] else ""
        guided = f"guidance {each['guidance']:g}" if each["guidance"] != 1 else ""
        name = " + ".join(filter(None, (guided, perturbed))) or "none"
        value = f"{each['top1']:.0%}, {each['score']:.2f} +- {each['score_error']:.2f}"
        rows.setdefault(name, {})[each["pattern"]] = value
    # Without classifier-free guidance first, each by the scale.
    order = sorted(rows, key=lambda name: name.startswith("guidance"))
    body = [[name, *(rows[name].get(pattern, "") for pattern in patterns)] for name in order]
    on = found["settings"]
    size = f"{on['prompts']} prompts, {on['size']}x{on['size']} pixels, {on['steps']} steps"
    return f"{table(['guidance', *(f'`{pattern}`' for pattern in patterns)], body)}\n\n{size}."


def heads_table() -> str:
    """What guidance by found heads does to captions that nobody had, measured by scripts/measure/heads.py."""
    rows = []
    for name in ("heads-dense", "heads-sparse"):
        found = result(name)
        for kind, each in found["held_out"].items():
            heads = each["heads"] or {}
            named = ", ".join(f"{layer}: {' '.join(map(str, some))}" for layer, some in heads.items())
            gain = "" if not each["gain_error"] else f"{each['gain']:+.3f} +- {each['gain_error']:.3f}"
            rows.append([f"`{found['pattern']}`", kind, named, f"{each['top1']:.0%}", f"{each['score']:.3f}", gain])
    on = result("heads-dense")
    captions = next(iter(on["held_out"].values()))["pictures"]
    size = (
        f"{captions} held-out captions, {on['size']}x{on['size']} pixels, {on['steps']} steps, scale {on['scale']:g}, "
        f"no classifier-free guidance; searched on {on['prompts']} captions with up to {on['seeds'][-1]} seeds."
    )
    heads = ["attention", "perturbed", "heads by layer", "named right", "cosine", "gain over no perturbation"]
    return f"{table(heads, rows)}\n\n{size}"


def control_tables() -> dict[str, Callable[[], str]]:
    """Each table by its name."""
    return {"inversion": inversion_table, "guidance": guidance_table}
