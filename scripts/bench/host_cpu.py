"""What attention() costs the CPU beyond torch's operators: a kept call against the same operators without it, in turns.

    python -m scripts.bench.host_cpu [--out FILE]

The operators of one call are recorded and played again with their own arguments: what a call takes longer is Python.
Playing one costs more than torch's own function does, which is measured on a view and a sum and taken off. Times are
those of the thread, so that other work of the machine does not count.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from visattn import Layout, attention
from visattn.files import write_json

# Pattern, layout, heads, head dim; of few channels, as a difference of some microseconds drowns in large products.
CASES = {
    "na7 16x16": ("na(window=7x7)", Layout((16, 16)), 1, 8),
    "na7 32x32": ("na(window=7x7)", Layout((32, 32)), 1, 8),
    "stride 32x32": ("na(window=8x8,stride=4x4)", Layout((32, 32)), 1, 8),
    "text 32x32": ("na(window=7x7)", Layout((32, 32), 77), 1, 8),
    "clear 32x32": ("clear(radius=3)", Layout((32, 32)), 1, 8),
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


def layer(rounds: int, repeats: int) -> float:
    """Microseconds that playing an operator costs beyond torch's own function: the mean of a view and a sum."""
    x, aten = torch.randn(2, 8), torch.ops.aten
    pairs: tuple[tuple[Callable[[], Any], Callable[[], Any]], ...] = (
        (partial(aten.view.default, x, [4, 4]), partial(x.view, 4, 4)),
        (partial(aten.add.Tensor, x, x), partial(torch.add, x, x)),
    )
    found = []
    for played, own in pairs:
        differences = []
        for _ in range(rounds):
            took = [per_call(work, 20 * repeats) for work in (played, own)]
            differences.append(took[0] - took[1])
        found.append(statistics.median(differences))
    return statistics.mean(found)


def per_call(work: Callable[[], Any], repeats: int) -> float:
    """Microseconds of this thread per call."""
    start = time.thread_time()
    for _ in range(repeats):
        work()
    return 1e6 * (time.thread_time() - start) / repeats


def measure(case: tuple[str, Layout, int, int], rounds: int, repeats: int, beyond: float) -> dict[str, float]:
    """Median microseconds of a call, of its operators alone, and of what is between them.

    `beyond` is what playing an operator costs more than torch's own function.
    """
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
                times[name].append(per_call(work, repeats))
    own = beyond * len(recorded)
    between = own + statistics.median(a - b for a, b in zip(*times.values(), strict=True))
    call, alone_us = (statistics.median(values) for values in times.values())
    return {"call": call, "operators": alone_us - own, "between": between, "number": len(recorded)}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--out", type=Path, help="file for the figures as JSON")
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    beyond = layer(chosen.rounds, chosen.repeats)
    rows = {name: measure(case, chosen.rounds, chosen.repeats, beyond) for name, case in CASES.items()}
    for name, row in rows.items():
        numbers = f"{row['call']:7.0f} us a call, {row['operators']:7.0f} us its {row['number']:.0f} operators"
        print(f"{name:<14} {numbers}, {row['between']:6.0f} us between")
    if chosen.out:
        write_json(chosen.out, {"torch": torch.__version__, "layer": beyond, "rows": rows})


if __name__ == "__main__":
    main()
