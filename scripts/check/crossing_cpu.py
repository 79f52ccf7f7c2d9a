"""Whether `auto` takes the faster of dense and sparse on a CPU: both timed in turns, from 64 tokens to 4096.

    OMP_WAIT_POLICY=passive GOMP_SPINCOUNT=0 python3 -m scripts.check.crossing_cpu [--chosen] [--threads 1 2] [--out X]

Times are medians of the processor time of the thread that calls, which does its share of parallel work and all of the
rest, and is what an idle machine takes whoever else is on this one; threads that wait must not spin for that. Exit
status 1 if what is estimated to be faster takes more than 15 % longer than the other.

With `--chosen` the cases are ways to choose lists, on noise and on smooth fields: as there lists may come out longer
than expected, what `apply` makes of a call is timed too, which leaves such lists to dense attention once they are made.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.nn.functional import interpolate, scaled_dot_product_attention

from visattn import Layout, attention, parse
from visattn.crossing import crossing
from visattn.environment import versions
from visattn.files import write_json
from visattn.outdone import Outdone
from visattn.problem import Call, Problem
from visattn.runtime.verdict import judge

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
    smooth: bool = False


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
# Scores, budgets, rests, tests and blocks, each of which costs something of its own.
OPTIONS = (
    "", "rest=mean", "rest=slope", "rest=linear", "rest=coarse", "score=parts(4x4)", "score=parts(16x16)",
    "score=bounds", "score=lowbit(4)", "score=tree(2)", "score=diagonal(8)", "score=diagonal(4)", "per=head", "per=all",
    "share=2", "share=all", "skip=0.01", "block=8x8, key_block=2x4", "block=8x8, key_block=2x2",
    "block=4x4, key_block=8x8", "block=4x4", "block=4x2", "block=2x2",
)  # fmt: skip
# Those of them that are looked at where a call takes longer, too.
LONGER = (
    "", "rest=slope", "rest=linear", "score=lowbit(4)", "score=diagonal(8)", "skip=0.01", "block=8x8, key_block=2x4",
    "block=4x4",
)  # fmt: skip
CHOSEN = (
    *(
        Case(f"topk(keep=0.15{', ' * bool(option)}{option})", grid)
        for grid, options in (((32, 32), OPTIONS), ((64, 64), LONGER))
        for option in options
    ),
    *(
        Case(pattern, grid, smooth=smooth)
        for grid in ((32, 32), (64, 64))
        for pattern in ("topp(p=0.9)", "topp(p=0.7)", "above", "topk(keep=0.15, alike=0.6)")
        for smooth in (False, True)
    ),
    *(
        Case(f"topk(keep=0.05, {blocks})", (48, 48), smooth=smooth)
        for blocks in ("block=2x2", "block=2x2, key_block=8x8", "block=1x1, key_block=8x8")
        for smooth in (False, True)
    ),
    Case("topk(keep=0.15)", (32, 32), 2, 4, 32),
    Case("topk(keep=0.15, block=4x4x4, key_block=2x2x2)", (16, 16, 16)),
    Case("topk(keep=0.15, block=64, causal=true)", (4096,)),
    Case("verticalslash(p=0.9, block=64)", (4096,)),
)


def tensor(case: Case, layout: Layout, dtype: torch.dtype) -> torch.Tensor:
    """Noise [B, S, H, D], or a smooth field with a little of it."""
    noise = torch.randn(case.batch, layout.length, case.heads, case.dim)
    if not case.smooth:
        return noise.to(dtype)
    coarse = torch.randn(case.batch * case.heads, case.dim, *(max(2, n // 8) for n in case.grid))
    field = interpolate(coarse, size=case.grid, mode="trilinear" if len(case.grid) == 3 else "bilinear")
    field = field.reshape(case.batch, case.heads, case.dim, -1).permute(0, 3, 1, 2)
    return (2 * field + 0.5 * noise[:, : layout.tokens]).contiguous().to(dtype)


def measure(
    case: Case, dtype: torch.dtype = torch.float32, seconds: float = SECONDS, applied: bool = False
) -> dict[str, Any]:
    """Estimated and measured times of one case, and whether the choice holds."""
    layout = Layout(case.grid, suffix=case.suffix)
    q, k, v = (tensor(case, layout, dtype) for _ in range(3))
    problem = Problem.of(q, k, v, Call(parse(case.pattern), layout, case.dim**-0.5))
    found = crossing(problem)
    assert found is not None
    runs: dict[str, Callable[[], object]] = {
        "dense": lambda: scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)),
        "sparse": lambda: attention(q, k, v, case.pattern, layout),
    }
    verdict = judge(problem.pattern, (problem,), (layout,), "auto", False)
    outdone: list[float] = []

    def apply() -> None:
        try:
            with verdict.weighing():
                runs["sparse"]()
        except Outdone as lists:
            outdone[:] = [lists.listed]
            runs["dense"]()

    if applied and verdict.weighs:
        runs["applied"] = apply
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
    choice = "dense" if found.dense_pays_inside else "applied" if outdone else "sparse"
    if not outdone:
        ms.pop("applied", None)
    return {
        **case._asdict(), "dtype": str(dtype).removeprefix("torch."), "threads": torch.get_num_threads(),
        "choice": choice, "backend": found.backend, "dense_ms": ms["dense"], "sparse_ms": ms["sparse"],
        "estimated_dense_ms": found.dense_ms, "estimated_sparse_ms": found.sparse_ms,
        **({"applied_ms": ms["applied"], "listed": outdone[0]} if outdone else {}),
        "right": ms[choice] <= SLACK * min(ms["dense"], ms["sparse"]),
    }  # fmt: skip


def main(arguments: list[str] | None = None) -> int:
    """Time, compare, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, nargs="*", default=[1, 2])
    parser.add_argument("--dtypes", nargs="*", choices=["float32", "bfloat16"], default=["float32", "bfloat16"])
    parser.add_argument("--chosen", action="store_true", help="ways to choose lists")
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
                for case in (case for case in (CHOSEN if chosen.chosen else CASES) if chosen.only in case.pattern):
                    rows.append(measure(case, getattr(torch, dtype), chosen.seconds, chosen.chosen))
                    print(json.dumps({k: round(v, 3) if isinstance(v, float) else v for k, v in rows[-1].items()}))
    if chosen.out:
        write_json(chosen.out, {"versions": versions(), "rows": rows})
    right = sum(row["right"] for row in rows)
    print(f"{right} of {len(rows)} choices are within {SLACK - 1:.0%} of the faster one")
    return int(right < len(rows))


if __name__ == "__main__":
    sys.exit(main())
