"""Starts and ends the processes of steps, and packs what they write while they run."""

from __future__ import annotations

import glob
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from scripts.gpu.check import missing
from scripts.gpu.keep import Kept
from scripts.gpu.order import Begun, Machine, Order
from scripts.gpu.steps import Step
from visattn.files import written_whole

EVERY = 20.0  # seconds between two packings
GRACE = 15.0  # seconds from SIGINT to SIGKILL
LOOK = 0.1
LAST = 160  # characters of a last line
CARDS = "CUDA_VISIBLE_DEVICES"
STOPPED = "stopped"


@dataclass
class Told:
    """What became of a step.

    Attributes:
        step: The step.
        state: "done", "failed", "stopped" at its limit, "killed" behind it, "waits", "runs", or why it was not begun.
        card: Where it ran.
        began: Seconds after the queue began.
        seconds: How long it ran.
        code: Its exit code.
        last: The last line of its log.
    """

    step: Step
    state: str = "waits"
    card: int | None = None
    began: float | None = None
    seconds: float | None = None
    code: int | None = None
    last: str = ""


@dataclass
class Child:
    """A step that runs, in a process group of its own."""

    told: Told
    begun: Begun
    process: subprocess.Popen[bytes]
    log: Path
    asked: float | None = None  # when it was asked to stop
    killed: bool = False

    def signal(self, number: int) -> None:
        """To it and to all that it started, as Ctrl-C in a terminal is."""
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, number)


@dataclass
class Queue:
    """Runs steps within a time.

    Attributes:
        steps: In their order.
        machine: Where they run.
        seconds: After so many nothing runs any more.
        out: Folder for the archives and the table, which may be taken away at any time.
        root: Where commands run, and results lie.
        logs: Folder of the logs below `root`.
        parts: Archives at most.
        every: Seconds between two packings.
        grace: Seconds from SIGINT to SIGKILL, of a step and at the end of all.
    """

    steps: Sequence[Step]
    machine: Machine
    seconds: float
    out: Path
    root: Path
    logs: Path = Path("out/gpu-queue")
    parts: int = 4
    every: float = EVERY
    grace: float = GRACE
    told: dict[str, Told] = field(init=False)
    children: dict[str, Child] = field(init=False, default_factory=dict)
    left: list[str] = field(init=False, default_factory=list)
    trouble: str = field(init=False, default="")

    def __post_init__(self) -> None:
        if self.seconds <= self.grace:
            raise ValueError(f"--seconds {self.seconds:g} must be more than the {self.grace:g} that steps have to stop")
        self.told = {step.name: Told(step) for step in self.steps}
        self._kept, self._lock = Kept(self.out, self.parts), threading.Lock()
        globs = [each for step in self.steps for each in (*step.continues, *step.keeps)]
        self._before = {path: _written(path) for path in self._results(globs).values()}
        (self.root / self.logs).mkdir(parents=True, exist_ok=True)

    def run(self) -> list[Told]:
        """Run everything; returns what became of each step. Ctrl-C and SIGTERM stop all, a second one kills."""
        start = time.monotonic()
        order = Order(self.machine, list(self.steps), start + self.seconds - self.grace)
        packed = threading.Event()
        packing = threading.Thread(target=self._pack_until, args=(packed,), daemon=True)
        packing.start()
        # To the end: what is packed last is not lost to a second signal.
        with _Stops() as stops:
            try:
                self._work(order, stops, start)
            finally:
                # Whatever has broken: nothing runs on, and what there is is packed.
                for child in self.children.values():
                    child.signal(signal.SIGKILL)
                packed.set()
                packing.join()
                for step in order.waiting:
                    self.told[step.name].state = "not begun: the queue was stopped"
                for step in order.late:
                    self.told[step.name].state = "not begun: no time was left"
                self.keep()
        return list(self.told.values())

    def _work(self, order: Order, stops: _Stops, start: float) -> None:
        """Begins and ends steps until none is left."""
        while (order.waiting and not stops.count) or order.running:
            now = time.monotonic()
            if not stops.count:
                for begun in order.begin(now):
                    self._start(begun, order, now - start)
            for name, child in list(self.children.items()):
                if self._look(child, now, stops.count):
                    del self.children[name]
                    order.ended(name)
                    self.keep()
            time.sleep(LOOK)

    def _start(self, begun: Begun, order: Order, since: float) -> None:
        step, told = begun.step, self.told[begun.step.name]
        lacks = missing(step, self.root)
        if lacks:
            told.state = f"not begun: needs {', '.join(lacks)}"
            order.ended(step.name)
            return
        words = step.planned(begun.seconds)
        words[0] = sys.executable if words[0] == "python" else words[0]
        told.state, told.card, told.began = "runs", begun.card, since
        log = self.root / self.logs / f"{step.name}.log"
        try:
            with log.open("wb") as output:
                process = subprocess.Popen(
                    words,
                    cwd=self.root,
                    env=_environment(begun.card),
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    # A group, so that all of it is asked to stop; no session, which would outlive a killed shell.
                    process_group=0,
                )
        except OSError as error:
            told.state = f"not begun: {error}"
            order.ended(step.name)
            return
        _say(f"{since:6.1f} s  begins on card {begun.card}: {step.name}, {begun.seconds:.0f} s")
        self.children[step.name] = Child(told, begun, process, log)

    def _look(self, child: Child, now: float, stops: int) -> bool:
        """Asks a step to stop, or ends it, when its time is over; whether it has ended."""
        code = child.process.poll()
        told, began = child.told, child.begun.end - child.begun.seconds
        if code is None:
            if child.asked is None and (stops or now >= child.begun.end):
                child.asked = now
                child.signal(signal.SIGINT)
            elif child.asked is not None and not child.killed and (stops > 1 or now >= child.asked + self.grace):
                child.killed = True
                child.signal(signal.SIGKILL)
            return False
        # What it has started must not hold the card.
        child.signal(signal.SIGKILL)
        told.code, told.seconds, told.last = code, now - began, last_line(child.log)
        told.state = "killed" if child.killed else STOPPED if child.asked is not None else "failed" if code else "done"
        _say(f"{'':8} {told.state} after {told.seconds:.0f} s: {told.step.name}: {told.last}")
        return True

    def keep(self) -> None:
        """Pack logs and results, and write the table beside them."""
        with self._lock:
            try:
                self.left = self._kept.write([each for each in self._files() if each[1].is_file()])
                self.trouble = ""
                with written_whole(self.out / "table.txt") as path:
                    path.write_text(self.table() + "\n", encoding="utf-8")
            except OSError as error:
                # What fails now, as a file went while it was read, is done the next time.
                self.trouble = str(error)

    def table(self) -> str:
        """What became of each step, a line each, and what is not in the archives."""
        lines = [*table(self.told.values()), *(f"not kept, for want of room: {name}" for name in self.left)]
        if self.trouble:
            lines.append(f"what is new since the last packing is not kept: {self.trouble}")
        return "\n".join(lines)

    def _pack_until(self, ended: threading.Event) -> None:
        while not ended.wait(self.every):
            self.keep()

    def _files(self) -> list[tuple[str, Path]]:
        """Names and files that are kept: what tables are made of, logs, then what is only worth keeping."""
        tables = self._results([each for step in self.steps for each in step.continues])
        logs = {name: self.root / name for name in (str(self.logs / f"{step.name}.log") for step in self.steps)}
        more = self._results([each for step in self.steps for each in step.keeps])
        new = [{name: path for name, path in some.items() if self._is_new(path)} for some in (tables, more)]
        return list((new[0] | logs | new[1]).items())

    def _results(self, globs: Iterable[str]) -> dict[str, Path]:
        names = [name for each in globs for name in sorted(glob.glob(each, root_dir=self.root, recursive=True))]
        return {name: self.root / name for name in names}

    def _is_new(self, path: Path) -> bool:
        return _written(path) != self._before.get(path)


class _Stops:
    """Counts how often Ctrl-C and SIGTERM asked to stop."""

    def __init__(self) -> None:
        self.count, self._before = 0, {}

    def __enter__(self) -> _Stops:
        # Where SIGINT was ignored (a shell does so for what it starts in the background) steps would inherit that, and
        # never be asked to stop: a signal with a handler has the default action in a child.
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._ask)
        return self

    def __exit__(self, *_: object) -> None:
        for number, before in self._before.items():
            signal.signal(number, before)

    def _ask(self, *_: object) -> None:
        self.count += 1


def _say(line: str) -> None:
    """Prints; where nobody reads it any more the steps go on."""
    with suppress(OSError):
        print(line, flush=True)


def _environment(card: int) -> dict[str, str]:
    """Of a step: it sees one card, and what it prints is in its log at once."""
    given = os.environ.get(CARDS, "")
    cards = [each.strip() for each in given.split(",") if each.strip()]
    return {**os.environ, CARDS: cards[card] if card < len(cards) else str(card), "PYTHONUNBUFFERED": "1"}


def _written(path: Path) -> tuple[int, int] | None:
    """When a file was written, and its size; None if it is not there."""
    try:
        about = path.stat()
    except OSError:
        return None
    return about.st_mtime_ns, about.st_size


def last_line(log: Path) -> str:
    """The last line of a log that is not empty."""
    with log.open("rb") as file:
        file.seek(max(0, log.stat().st_size - 4096))
        lines = file.read().decode(errors="replace").replace("\r", "\n").split("\n")
    return next((line.strip() for line in reversed(lines) if line.strip()), "")


def table(told: Iterable[Told]) -> list[str]:
    """Lines of a table: step, card, when it began, how long it ran, exit code, state and last line."""
    rows: list[tuple[str, ...]] = [("step", "card", "began", "ran", "code", "state", "last line")]
    for each in told:
        times = ["" if value is None else f"{value:.0f} s" for value in (each.began, each.seconds)]
        card, code = ("" if value is None else str(value) for value in (each.card, each.code))
        rows.append((each.step.name, card, *times, code, each.state, each.last[:LAST]))
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]) - 1)]
    return [
        "  ".join([*(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=False)), row[-1]]).rstrip()
        for row in rows
    ]
