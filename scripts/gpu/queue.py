"""Runs a list of measuring commands on a GPU machine within a time, side by side or alone, and keeps what they write.

    python -m scripts.gpu.queue check                      # at home: options, files and packages of every step
    python -m scripts.gpu.queue plan first --cards 2       # when each step would begin
    python -m scripts.gpu.queue run first --cards 2 --cores 32 --seconds 570 --out /tmp/kept
    python -m scripts.gpu.queue unpack /tmp/kept           # at home again: results and logs to their places

The list is scripts/gpu/steps.toml: names of steps or calls (lists of steps) stand behind the action. Steps begin
in their order as far as cards, cores and result files are free; those that take times have a card of their own. When a
step's time is over it gets SIGINT, and SIGKILL 15 seconds later. Logs and all that steps have written are packed every
20 seconds and when one ends, into archives of at most 15 MiB. Exit status 1 if a step did not end well.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from scripts.gpu.check import brought, problems
from scripts.gpu.keep import unpack
from scripts.gpu.order import Machine, simulated
from scripts.gpu.running import GRACE, Queue
from scripts.gpu.steps import LIST, Step, read_plan
from scripts.pages import ROOT


def show(steps: Sequence[Step], machine: Machine, seconds: float) -> str:
    """When each step would begin and end if everyone took all of its time, by card."""
    found, late = simulated(steps, machine, seconds - GRACE)
    lines = [
        f"{since:5.0f} to {begun.end:4.0f} s  card {begun.card}, {begun.step.cores:>2} cores"
        f"{', alone' if begun.step.alone else '':<7}  {begun.step.name}"
        for since, begun in found
    ]
    return "\n".join([*lines, *(f"no time for {step.name}" for step in late)])


def parser() -> argparse.ArgumentParser:
    """Of the command line."""
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    actions = made.add_subparsers(dest="action", required=True)
    for action, text in (
        ("check", "look at steps before time is spent on them"),
        ("plan", "when steps would begin"),
        ("run", "run steps"),
    ):
        one = actions.add_parser(action, help=text)
        one.add_argument("names", nargs="*", metavar="NAME", help="calls and steps; default: all steps")
        one.add_argument("--list", type=Path, default=LIST, help="file of steps and calls")
        if action == "check":
            continue
        one.add_argument("--cards", type=int, default=1, help="GPUs")
        one.add_argument("--cores", type=int, default=os.cpu_count() or 1, help="CPU cores")
        one.add_argument("--sharing", type=int, default=4, help="steps that share a card, at most")
        one.add_argument("--seconds", type=float, default=570.0, help="of all: after them nothing runs any more")
        if action == "run":
            one.add_argument("--out", type=Path, required=True, help="folder for archives and table")
            one.add_argument("--parts", type=int, default=4, help="archives of 15 MiB, at most")
    one = actions.add_parser("unpack", help="put what a run has kept to its places")
    one.add_argument("folder", type=Path, help="that --out of the run named")
    one.add_argument("--into", type=Path, default=ROOT, help="where its files go; this checkout")
    return made


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point."""
    given = parser().parse_args(arguments)
    try:
        if given.action == "unpack":
            for file in unpack(given.folder, given.into):
                print(file)
            return 0
        plan = read_plan(given.list)
        steps = plan.chosen(given.names or list(plan.steps))
        if given.action == "check":
            wrong = problems(steps, ROOT)
            for name, reasons in wrong.items():
                print(f"{name}: {'; '.join(reasons)}")
            for name, size in brought(steps, ROOT).items():
                print(f"bring {name}: {size / 1e6:.1f} MB")
            print(f"{len(steps) - len(wrong)} of {len(steps)} steps are ready")
            return int(bool(wrong))
        machine = Machine(given.cards, given.cores, given.sharing)
        if given.action == "plan":
            print(show(steps, machine, given.seconds))
            return 0
        queue = Queue(steps, machine, given.seconds, given.out.resolve(), ROOT, parts=given.parts)
        told = queue.run()
    except ValueError as error:
        raise SystemExit(f"queue: {error}") from error
    print(queue.table(), flush=True)
    return int(any(each.state != "done" for each in told))


if __name__ == "__main__":
    sys.exit(main())
