"""Students' training in processes of their own, and what they give."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

from visattn.files import write_json


def train_student(options: Sequence[str], folder: Path, seconds: float) -> float:
    """Runs scripts.distill.pipeline; returns the seconds that it took.

    Args:
        options: Of the command line, but for --out.
        folder: For the student; what the process says goes to output.txt there.
        seconds: After so long it is asked to stop, and what it has is taken; 0: never.

    Raises:
        RuntimeError: If it writes no student (an older one in the folder is none): why, and the end of what it said.
    """
    student = folder / "student.safetensors"
    older = _written(student)
    words = [sys.executable, "-m", "scripts.distill.pipeline", "--out", str(folder), *options]
    start, stopped = time.monotonic(), ""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "output.txt").open("a") as output, subprocess.Popen(words, stdout=output, stderr=output) as process:
        try:
            process.wait(seconds or None)
        except subprocess.TimeoutExpired:
            stopped = f", as it was stopped after {seconds:g} s"
            process.send_signal(signal.SIGINT)
            process.wait()
    if _written(student) in (None, older):
        lines = (folder / "output.txt").read_text()[-2000:].strip().splitlines() or ["it said nothing"]
        # Why stands on the first line: the last one of a traceback, not the first of many warnings.
        why = f"{folder.name} has no new student.safetensors{stopped}: {lines[-1]}"
        raise RuntimeError("\n".join([why, *lines]))
    return time.monotonic() - start


def _written(file: Path) -> int | None:
    """When a file was written, None if it is not there."""
    return file.stat().st_mtime_ns if file.is_file() else None


def collect(
    training: Mapping[str, Future[float]],
    figures: dict[str, Any],
    entry: Callable[[str, float], dict[str, Any]],
    file: Path,
) -> None:
    """Waits for each student; its entry, or why there is none, goes into figures and into a file at once.

    Args:
        training: The seconds that each student will have taken, by name.
        figures: Gets the entries under "students", and the texts of what failed under "failed".
        entry: Makes the entry of a student from its name and seconds.
        file: JSON of the figures.
    """
    for name, future in training.items():
        try:
            seconds = future.result()
        except RuntimeError as error:
            # The others are worth having.
            figures["failed"] = figures.get("failed", {}) | {name: str(error)}
            print(f"{name}: {error}", file=sys.stderr, flush=True)
        else:
            figures["students"][name] = entry(name, seconds)
            print(json.dumps({name: figures["students"][name]}), flush=True)
        write_json(file, figures)
