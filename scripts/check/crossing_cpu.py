"""Whether `auto` takes the faster of dense and sparse on a CPU: both timed in turns, from 64 tokens to 4096.

    OMP_WAIT_POLICY=passive GOMP_SPINCOUNT=0 python3 -m scripts.check.crossing_cpu [--threads 1 2] [--out FILE]

Times are medians of the processor time of the thread that calls, which does its share of parallel work and all of the
rest, and is what an idle machine takes whoever else is on this one; threads that wait must not spin for that. Exit
status 1 if what is estimated to be faster takes more than 15 % longer than the other.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.nn.functional import scaled_dot_product_attention

from visattn import Layout, attention, parse
from visattn.crossing import crossing
from visattn.environment import versions
from visattn.files import write_json
from visattn.problem import Call, Problem

# How much longer what is chosen may take.
SLACK = 1.15
# Seconds for the turns of a case, and their number.
SECONDS, TURNS = 0.5, (7, 200)


class Case(NamedTuple):
    """A pattern where it runs: grid, batch, heads, channels per head, and tokens of text behind the grid."""

    pattern: str
    grid: tuple[int, ...]
    batch: int = 1
    heads: int = 4
    dim: int = 64
    suffix: int = 0


CASES = (
    Case("na(window=3x3)", (8, 8), 1, 4, 32),
    Case("na(window=5x5)", (8, 8), 2, 8),
    Case("na(window=3x3)", (8, 8), 2, 24, 128),
    Case("na(window=5x5)", (14, 14), 8, 6),
    Case("na(window=7x7)", (14, 14), 1, 12, suffix=5),
    Case("na(window=7x7)", (16, 16)),
    Case("na(window=7x7)", (16, 16), 2, 8, 40),
    Case("na(window=5x5)", (16, 16), 8, 16, suffix=32),
    Case("na(window=9x9)", (24, 24)),
    Case("na(window=7x7)", (24, 24), 2, 8, suffix=77),
    Case("na(window=9x9)", (32, 32), 1, 2, 32),
    Case("na(window=9x9)", (32, 32), 2, 4, 32),
    Case("na(window=15x15)", (32, 32), 1, 8),
    Case("na(window=23x23)", (32, 32), 1, 8),
    Case("na(window=16x16, stride=8x8)", (32, 32), 1, 8),
    Case("na(window=15x15)", (48, 48)),
    Case("na(window=41x41)", (48, 48)),
    Case("na(window=15x15)", (64, 64)),
    Case("na(window=33x33)", (64, 64)),
    Case("na(window=3x3x3)", (4, 8, 8)),
    Case("na(window=3x5x5)", (5, 16, 16)),
    Case("na(window=5x7x7)", (8, 16, 16), 1, 8),
    Case("na(window=3x5x5)", (5, 12, 20), 1, 12, 128, 64),
    Case("halo(block=4, halo=2)", (16, 16), 1, 8),
    Case("halo(block=8, halo=4)", (32, 32), 1, 8),
    Case("clear(radius=3)", (8, 8)),
    Case("clear(radius=4)", (16, 16), 2, 8),
    Case("clear(radius=5)", (24, 24), 1, 8),
    Case("clear(radius=8)", (32, 32), 1, 8),
    Case("clear(radius=16)", (48, 48), suffix=16),
    Case("clear(radius=8)", (64, 64)),
    Case("radial", (4, 8, 8)),
    Case("radial", (5, 16, 16)),
    Case("radial", (8, 16, 16), 1, 8),
    Case("radial", (12, 16, 24)),
    Case("topk(keep=0.2)", (16, 16), 2, 8),
    Case("topk(keep=0.15)", (24, 24), 1, 8),
    Case("topk(keep=0.15)", (32, 32)),
    Case("topk(keep=0.3)", (32, 32), 2, 8, suffix=32),
    Case("topk(keep=0.15)", (48, 48)),
    Case("topk(keep=0.5)", (48, 48)),
    Case("topk(keep=0.15, rest=mean)", (48, 48)),
    Case("topk(keep=0.15)", (64, 64)),
    Case("topk(keep=0.2)", (4, 8, 8), 1, 8),
    Case("topk(keep=0.2)", (5, 16, 16)),
    Case("routing(regions=4x4, topk=4)", (16, 16)),
    Case("routing(regions=8x8, topk=4)", (32, 32)),
    Case("routing(regions=8x8, topk=4)", (64, 64)),
)


def measure(case: Case, dtype: torch.dtype = torch.float32, seconds: float = SECONDS) -> dict[str, Any]:
    """Estimated and measured times of one case, and whether the choice holds."""
    layout = Layout(case.grid, suffix=case.suffix)
    q, k, v = (torch.randn(case.batch, layout.length, case.heads, case.dim).to(dtype) for _ in range(3))
    problem = Problem.of(q, k, v, Call(parse(case.pattern), layout, case.dim**-0.5))
    found = crossing(problem)
    assert found is not None
    runs = {
        "dense": lambda: scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)),
        "sparse": lambda: attention(q, k, v, case.pattern, layout),
    }
    for run in 2 * list(runs.values()):
        run()
    begun = time.perf_counter()
    taken: dict[str, list[float]] = {name: [] for name in runs}
    while len(taken["dense"]) < TURNS[0] or (
        len(taken["dense"]) < TURNS[1] and time.perf_counter() - begun < seconds
    ):  # fmt: skip
        for name, run in runs.items():
            start = time.thread_time()
            run()
            taken[name].append(time.thread_time() - start)
    ms = {name: 1e3 * statistics.median(times) for name, times in taken.items()}
    choice = "dense" if found.dense_pays_inside else "sparse"
    return {
        **case._asdict(), "dtype": str(dtype).removeprefix("torch."), "threads": torch.get_num_threads(),
        "choice": choice, "backend": found.backend, "dense_ms": ms["dense"], "sparse_ms": ms["sparse"],
        "estimated_dense_ms": found.dense_ms, "estimated_sparse_ms": found.sparse_ms,
        "right": ms[choice] <= SLACK * min(ms.values()),
    }  # fmt: skip


def main(arguments: list[str] | None = None) -> int:
    """Time, compare, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, nargs="*", default=[1, 2])
    parser.add_argument("--dtypes", nargs="*", choices=["float32", "bfloat16"], default=["float32", "bfloat16"])
    parser.add_argument("--only", default="", help="cases whose pattern contains this")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="for the turns of a case (%(default)s)")
    parser.add_argument("--out", type=Path, help="file for the figures as JSON")
    chosen = parser.parse_args(arguments)
    if max(chosen.threads) > 1 and os.environ.get("OMP_WAIT_POLICY") != "passive":
        parser.error("threads that spin would count as work: set OMP_WAIT_POLICY=passive and GOMP_SPINCOUNT=0")
    torch.manual_seed(0)
    rows = []
    with torch.no_grad():
        for threads in chosen.threads:
            torch.set_num_threads(threads)
            for dtype in chosen.dtypes:
                for case in (case for case in CASES if chosen.only in case.pattern):
                    rows.append(measure(case, getattr(torch, dtype), chosen.seconds))
                    print(json.dumps({k: round(v, 3) if isinstance(v, float) else v for k, v in rows[-1].items()}))
    if chosen.out:
        write_json(chosen.out, {"versions": versions(), "rows": rows})
    right = sum(row["right"] for row in rows)
    print(f"{right} of {len(rows)} choices are within {SLACK - 1:.0%} of the faster one")
    return int(right < len(rows))


if __name__ == "__main__":
    sys.exit(main())
