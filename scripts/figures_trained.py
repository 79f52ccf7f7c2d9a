"""Tables of trained methods: before and after their training, by sparsity; of the results that are there."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from scripts.results import RESULTS, result, table

DENSE, SHIPPED = "dense", "shipped"
KINDS = ("seen", "unseen")
NAMES = ("emoji", "emoji-velocity", "animoji", "animoji-128")
STEPS = "h200-step"


def trained_tables() -> dict[str, Callable[[], str]]:
    """The tables whose results have been measured."""
    known = [name for name in NAMES if (RESULTS / f"trained-{name}.json").is_file()]
    found: dict[str, Callable[[], str]] = {f"trained-{name}": partial(trained_table, name) for name in known}
    steps = {"trained-steps": steps_table} if (RESULTS / f"{STEPS}.json").is_file() else {}
    return found | steps


def trained_table(name: str) -> str:
    """Each student before and after, beside dense attention, by sparsity."""
    found = result(f"trained-{name}")
    rows = {(row["pattern"], row["weights"]): row for row in found["rows"].values() if "error" not in row}
    dense = rows[DENSE, SHIPPED]
    lines, missing = [_dense(dense)], []
    for student, told in sorted(found["trained"].items(), key=lambda item: (item[1].get("sparsity", 0.0), item[0])):
        before, after = (rows.get((told.get("pattern"), weights)) for weights in (SHIPPED, student))
        if before is None or after is None:
            missing.append(f"`{student}`: {told.get('error', 'not measured, the budget was over')}.")
        else:
            lines.append(_line(told, before, after, dense))
            other = told.get("device", found["settings"]["device"])
            lines[-1][-2] += f", on {other}" * (other != found["settings"]["device"])
    clips = "flicker" in dense["seen"]
    head = ["attention", "listed", *(f"{kind}: top 1" for kind in KINDS), "Frechet", "PSNR to dense"]
    head += ["flicker"] * clips + ["attention", "whole", "trained for", "file"]
    where = found["settings"]
    note = (
        f"{where['captions']} captions of each kind, {where['steps']} steps, {where['dtype']}, on {where['device']}; "
    )
    timed = dense["seconds"] is not None
    note += f"times of a {'clip' if clips else 'picture'}." if timed else "no times, as others used it too."
    return "\n\n".join([table(head, lines), note, *missing])


def steps_table() -> str:
    """Compiled steps of a model of FLUX's size, with random weights, measured by scripts/bench/step_gpu.py."""
    rows = []
    for pattern, case in result(STEPS)["cases"].items():
        if "failed" not in case:
            # Both of the part of the model that is run, in turns.
            dense_ms = case["model_ms"] * case["times_dense"]
            name = f"`{pattern.replace(' in ', '` in `')}`"
            times = (f"{ms / 1e3:.2f} s" for ms in (case["model_ms"], dense_ms))
            rows.append([name, *times, f"{case['times_dense']:.2f}x"])
    return table(["attention", "a step, compiled", "dense, in turns", "times dense"], rows)


def _dense(dense: dict[str, Any]) -> list[str]:
    cells = ["dense (teacher)", "100 %", *(f"{dense[kind]['top1']:.0%}" for kind in KINDS), f"{_mean(dense):.3f}", ""]
    cells += [_flicker(dense)] if "flicker" in dense["seen"] else []
    return [*cells, _milliseconds(dense["attention_seconds"]), _milliseconds(dense["seconds"]), "", ""]


def _line(told: dict[str, Any], before: Any, after: Any, dense: dict[str, Any]) -> list[str]:
    cells = [f"`{told['pattern']}`", "" if after["density"] is None else f"{after['density']:.1%}"]
    for kind in KINDS:
        ends = [row[kind]["top1"] for row in (before, after, dense)]
        cells.append(f"{ends[0]:.0%} to {ends[1]:.0%}{closed(*ends)}")
    ends = [_mean(row) for row in (before, after, dense)]
    cells.append(f"{ends[0]:.3f} to {ends[1]:.3f}{closed(*ends)}")
    cells.append(f"{before['psnr']:.1f} to {after['psnr']:.1f} dB")
    if "flicker" in dense["seen"]:
        cells.append(f"{_flicker(before)} to {_flicker(after)}")
    # Weights change no time, and a student may be gone by the time that nobody else uses its device.
    timed = before if after["seconds"] is None else after
    cells += [_milliseconds(timed["attention_seconds"]), _milliseconds(timed["seconds"])]
    cells.append(f"{told['seconds'] / 60:.1f} min, {told['steps']} steps")
    cells[-1] += f", after `{told['after']}`" if "after" in told else ""
    return [*cells, f"{told['megabytes']:.1f} MB"]


def closed(before: float, after: float, whole: float) -> str:
    """Share of a gap that was closed; nothing where there was none to speak of."""
    return f" ({(after - before) / (whole - before):.0%})" if abs(whole - before) > 0.02 else ""


def _mean(row: dict[str, Any]) -> float:
    return sum(row[kind]["frechet"] for kind in KINDS) / len(KINDS)


def _flicker(row: dict[str, Any]) -> str:
    return f"{255 * sum(row[kind]['flicker'] for kind in KINDS) / len(KINDS):.1f}"


def _milliseconds(seconds: float | None) -> str:
    """A time in a cell; nothing where others used the device too."""
    if seconds is None:
        return ""
    return f"{seconds * 1000:.1f} ms" if seconds < 1 else f"{seconds:.2f} s"
