"""The list of what is to be measured: steps and calls of a TOML file."""

from __future__ import annotations

import shlex
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import Any

LIST = Path(__file__).with_name("steps.toml")
LISTS = ("continues", "keeps", "makes", "needs", "after")
# Stands in commands for the seconds that a script may plan with.
SECONDS = "{seconds}"


@dataclass(frozen=True, kw_only=True)
class Step:
    """One command.

    Attributes:
        name: What it is called.
        command: Its words; `python` is the python that runs the queue, and {seconds} the time that it may plan with.
        seconds: After so long it is asked to stop.
        least: It is not begun where less than this is left; by default all of its seconds.
        margin: Seconds before its limit to which a script that plans with {seconds} has to keep: it may end later than
            it plans, by what it began last.
        alone: Whether it needs a card of its own, because it takes times.
        card: Number of the card that it runs on, modulo those that there are; None: whichever is free.
        cores: CPU cores that it takes; the sum of those that run never exceeds the machine's.
        continues: Result files that it goes on with: steps with one of them never run at the same time.
        keeps: Globs of further files that are worth keeping.
        makes: Globs of files that only steps behind it in the same run need.
        needs: Paths (with * for any), and packages as "package NAME", without which it is not begun.
        after: Steps that have to have ended, however they did.
    """

    name: str
    command: str
    seconds: float
    least: float = 0.0
    margin: float = 10.0
    alone: bool = False
    card: int | None = None
    cores: int = 4
    continues: tuple[str, ...] = ()
    keeps: tuple[str, ...] = ()
    makes: tuple[str, ...] = ()
    needs: tuple[str, ...] = ()
    after: tuple[str, ...] = ()

    @property
    def words(self) -> list[str]:
        """The command, still with {seconds}."""
        return shlex.split(self.command)

    def planned(self, seconds: float) -> list[str]:
        """The command for so many seconds."""
        text = f"{max(1.0, seconds - self.margin):.0f}"
        return [word.replace(SECONDS, text) for word in self.words]


@dataclass(frozen=True)
class Plan:
    """All steps, and calls: names of steps in their order."""

    steps: Mapping[str, Step]
    calls: Mapping[str, tuple[str, ...]]

    def chosen(self, names: Sequence[str]) -> list[Step]:
        """The steps of calls and of single names, each once.

        Raises:
            ValueError: If a name is neither.
        """
        found: dict[str, Step] = {}
        for name in names:
            if name not in self.steps and name not in self.calls:
                known = f"calls {', '.join(self.calls)}; steps {', '.join(self.steps)}"
                raise ValueError(f"{name!r} is neither a call nor a step: choose from {known}")
            for each in self.calls.get(name, (name,)):
                found[each] = self.steps[each]
        return list(found.values())


def read_plan(path: Path = LIST) -> Plan:
    """The plan of a file.

    Raises:
        ValueError: If it is not TOML, or anything in it is not as `Step` says.
    """
    try:
        given = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, tomllib.TOMLDecodeError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    steps = {name: _step(name, values) for name, values in given.get("steps", {}).items()}
    calls = {name: tuple(names) for name, names in given.get("calls", {}).items()}
    for step in steps.values():
        _check_names(f"after of {step.name}", step.after, steps)
    try:
        TopologicalSorter({step.name: step.after for step in steps.values()}).prepare()
    except CycleError as error:
        raise ValueError(f"steps come after each other in a circle: {', '.join(error.args[1])}") from error
    for name, names in calls.items():
        if name in steps:
            raise ValueError(f"{name!r} is a call and a step: give one of them another name")
        _check_names(f"call {name}", names, steps)
    return Plan(steps, calls)


def _step(name: str, values: dict[str, Any]) -> Step:
    known = {entry.name for entry in fields(Step)} - {"name"}
    if unknown := sorted(set(values) - known):
        raise ValueError(f"step {name} has {unknown[0]!r}: known are {', '.join(sorted(known))}")
    for key in ("command", "seconds"):
        if key not in values:
            raise ValueError(f"step {name} has no {key!r}: give it one")
    lists = {key: tuple(values[key]) for key in LISTS if key in values}
    step = Step(name=name, **{"least": values["seconds"], **values, **lists})
    if not 0 < step.least <= step.seconds:
        raise ValueError(f"step {name} takes {step.seconds} s, at least {step.least}: both above 0, least not above")
    if SECONDS in step.command and not 0 <= step.margin < step.least:
        raise ValueError(f"step {name}: margin {step.margin} must be from 0 to below its least {step.least}")
    if step.cores < 1 or not step.words:
        raise ValueError(f"step {name}: cores {step.cores} must be at least 1, and the command not empty")
    for path in (*step.continues, *step.keeps, *step.makes, *step.needs):
        if Path(path).is_absolute():
            raise ValueError(f"step {name} names {path}: paths are below the checkout, write them from there")
    return step


def _check_names(where: str, names: Sequence[str], steps: Mapping[str, Step]) -> None:
    if unknown := [name for name in names if name not in steps]:
        raise ValueError(f"{where} names {unknown[0]!r}, which is no step: choose from {', '.join(steps)}")
