"""A student's training in a process of its own."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path


def train_student(options: Sequence[str], folder: Path, seconds: float) -> float:
    """Runs scripts.distill.pipeline; returns the seconds that it took.

    Args:
        options: Of the command line, but for --out.
        folder: For the student; what the process says goes to output.txt there.
        seconds: After so long it is asked to stop, and what it has is taken; 0: never.

    Raises:
        RuntimeError: If there is no student in the end.
    """
    words = [sys.executable, "-m", "scripts.distill.pipeline", "--out", str(folder), *options]
    start = time.monotonic()
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "output.txt").open("a") as output, subprocess.Popen(words, stdout=output, stderr=output) as process:
        try:
            process.wait(seconds or None)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGINT)
            process.wait()
    if not (folder / "student.safetensors").is_file():
        tail = (folder / "output.txt").read_text()[-2000:]
        raise RuntimeError(f"{folder.name} has no student.safetensors: {tail}")
    return time.monotonic() - start
