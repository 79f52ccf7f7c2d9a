"""What attention() costs the CPU beyond torch's operators: a kept call against the same operators without it, in turns.

    python -m scripts.bench.host_cpu [--out FILE]

The operators of one call are recorded and played again with their own arguments: what a call takes longer is Python.
Times are those of the thread, so that other work of the machine does not count.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from visattn import Layout, attention

# Pattern, layout, heads, head dim.
CASES = {
    "na7 16x16": ("na(window=7x7)", Layout((16, 16)), 3, 64),
    "na7 32x32": ("na(window=7x7)", Layout((32, 32)), 3, 64),
    "stride 32x32": ("na(window=8x8,stride=4x4)", Layout((32, 32)), 3, 64),
    "text 32x32": ("na(window=7x7)", Layout((32, 32), 77), 3, 64),
    "clear 32x32": ("clear(radius=3)", Layout((32, 32)), 3, 64),
}


class Recorder(TorchDispatchMode):
    """Writes down the operators that are called."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Callable[[], Any]] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run one and keep it."""
        work = partial(function, *args, **(kwargs or {}))
        self.calls.append(work)
        return work()


def operators(call: Callable[[], Any]) -> list[Callable[[], Any]]:
    """The operators of one call, with their arguments."""
    with Recorder() as recorder:
        call()
    return recorder.calls


def measure(case: tuple[str, Layout, int, int], rounds: int, repeats: int) -> dict[str, float]:
    """Median microseconds of a call, of its operators alone, and of what is between them."""
    pattern, layout, heads, head_dim = case
    q, k, v = (torch.randn(1, layout.length, heads, head_dim) for _ in range(3))
    call = partial(attention, q, k, v, pattern, layout, backend="tiles")
    with torch.no_grad():
        for _ in range(3):
            call()
        recorded = operators(call)

        def alone() -> None:
            for work in recorded:
                work()

        times: dict[str, list[float]] = {"call": [], "operators": []}
        for _ in range(rounds):
            for name, work in (("call", call), ("operators", alone)):
                start = time.thread_time()
                for _ in range(repeats):
                    work()
                times[name].append(1e6 * (time.thread_time() - start) / repeats)
    found = {name: statistics.median(values) for name, values in times.items()}
    between = statistics.median(a - b for a, b in zip(*times.values(), strict=True))
    return {**found, "between": between, "number": len(recorded)}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--out", type=Path, help="file for the figures as JSON")
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    rows = {name: measure(case, chosen.rounds, chosen.repeats) for name, case in CASES.items()}
    for name, row in rows.items():
        numbers = f"{row['call']:7.0f} us a call, {row['operators']:7.0f} us its {row['number']:.0f} operators"
        print(f"{name:<14} {numbers}, {row['between']:6.0f} us between")
    if chosen.out:
        chosen.out.write_text(json.dumps({"torch": torch.__version__, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
