"""Time of the library backends over dense SDPA's: the figures behind their cost rules.

    python -m scripts.bench.backends [--repeats 7] [--side 64]

Interleaved medians in one process; prints one line a case with the measured and the estimated ratio.
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import Any

import torch

from visattn import Layout, attention, explain

HEADS, DIM = 4, 64
# Not on the grid, but on as many tokens in a line.
LINE = "na(window=-1,causal=true)"


def main() -> None:
    """Measure every case on the device at hand."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--side", type=int, default=64)
    parser.add_argument("--natten", action="store_true", help="natten too; on a CPU it takes seconds a call")
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    layout = Layout((options.side, options.side))
    q, k, v = (torch.randn(1, layout.length, HEADS, DIM, device=device) for _ in range(3))
    key_mask = torch.rand(1, layout.length, device=device) < 0.9
    cases = {
        ("sdpa", "dense"): {},
        ("sdpa", "dense, key mask"): {"key_mask": key_mask},
        ("sdpa", "dense, lse"): {"return_lse": True},
        ("sdpa", "na(window=15x15)"): {},
        ("sdpa", LINE): {},
        ("tiles", "na(window=15x15)"): {},
        ("flex", "na(window=15x15)"): {},
        ("flex", "na(window=16x16,stride=16x16)"): {},
        ("flex", "clear(radius=16)"): {},
        **({("natten", "na(window=15x15)"): {}} if options.natten else {}),
    }
    line, runs = Layout(layout.length), {}
    for (name, text), given in cases.items():
        pattern = text.partition(", ")[0] if text.startswith("dense") else text
        where = line if pattern == LINE else layout
        given_to_explain: dict[str, Any] = {"key_mask": "key_mask" in given, "return_lse": "return_lse" in given}
        verdicts = {c.backend.name: c for c in explain(pattern, where, q, **given_to_explain).candidates}
        if verdicts[name].support.ok:
            estimate = verdicts[name].cost / (HEADS * layout.length**2)
            runs[name, text] = (pattern, where, given, estimate)
    times: dict[tuple[str, str], list[float]] = {case: [] for case in runs}
    with torch.no_grad():
        for round_ in range(options.repeats + 1):
            for (name, text), (pattern, where, given, _) in runs.items():
                start = time.perf_counter()
                attention(q, k, v, pattern, where, backend=name, **given)
                if device == "cuda":
                    torch.cuda.synchronize()
                if round_:  # The first round compiles and builds plans.
                    times[name, text].append(time.perf_counter() - start)
    dense = statistics.median(times["sdpa", "dense"])
    print(f"dense SDPA {dense * 1e3:.2f} ms, grid {layout}, {HEADS} heads x {DIM}, {device}")
    for (name, text), (_, _, _, estimate) in runs.items():
        measured = statistics.median(times[name, text]) / dense
        print(f"{name:<8} {text:<34} measured {measured:7.3f}  estimated {estimate:7.3f}")


if __name__ == "__main__":
    main()
