"""Where a compiled step of a large model goes on a GPU: dense and sparse in turns in one process, kernel by kernel.

    python -m scripts.bench.step_gpu --out docs/results/h200-step.json

The stack of FLUX's size of `scripts.bench.stack_models` (2 double and 4 single blocks, random weights, bf16, forward
only) on 256x256 tokens and 512 of text, blocks compiled by inductor. Every pattern takes turns with the dense stack:
`step_ms` and `dense_ms` are medians of the same turns, `times_dense` is their ratio. `kernels` are those of one step,
the longest first, with how often they run and their milliseconds in all; `apart_ms` is the time of a step in which
none runs. The longest are printed too. What is left of the cases when the budget is spent is not begun.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity, profile

from scripts.bench.gpu import median_ms
from scripts.bench.stack_gpu import DENSE, sparse
from scripts.bench.stack_models import Attend, Flux, dense, turns
from scripts.gpu_common import go_on, measure_cases, versions
from visattn import Layout

TILES = "block=8x16, key_block=8x8"
CASES = (
    f"sla(keep=0.05, {TILES})",
    f"sla(keep=0.05, {TILES}) in fp8",
    f"sla(keep=0.03, {TILES}) in fp8",
    f"sla(keep=0.03, {TILES})",
    f"topk(keep=0.05, {TILES})",
)
LAYOUT = Layout((256, 256), prefix=Flux.text)
# Kernels that the file keeps, and those that are printed.
KEPT, SHOWN = 60, 30
# Steps whose kernels are added up.
STEPS = 3
# Times that a pattern and dense attention have their turn, and seconds of one.
TURNS, TURN = 3, 0.8


class Stack:
    """One model, and the arguments of its step, for any attention inside."""

    def __init__(self, layout: Layout) -> None:
        """Random weights and inputs, blocks compiled when they first run."""
        torch.manual_seed(0)
        self.layout, self.dim = layout, Flux.hidden // Flux.heads
        with torch.device("cuda"):
            self.model = Flux().to(torch.bfloat16).eval().requires_grad_(False)
            rows = [torch.randn(1, n, Flux.hidden, dtype=torch.bfloat16) for n in (layout.tokens, layout.prefix)]
            vector = torch.randn(1, Flux.hidden, dtype=torch.bfloat16)
            turn = turns(layout.length, self.dim, "cuda")
        self.inputs = *rows, vector, turn
        for block in (*self.model.doubles, *self.model.singles):
            block.compile(fullgraph=True, dynamic=False)

    def step(self, pattern: str) -> Callable[[], torch.Tensor]:
        """A step with a pattern, compiled and run once.

        Raises:
            ValueError: If its output is not finite.
        """
        attend: Attend = dense if pattern == DENSE else sparse(pattern, self.layout, Flux.heads, self.dim)
        run = partial(self.model, *self.inputs, attend)
        if not run().isfinite().all():
            raise ValueError(f"the output of the stack with {pattern} is not finite: times of it say nothing")
        return run


def kernels_of(run: Callable[[], Any]) -> list[dict[str, Any]]:
    """The kernels of a step, the longest first, each with its launches and its milliseconds in all."""
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as found:
        for _ in range(STEPS):
            run()
        torch.cuda.synchronize()
    rows = [
        {"kernel": each.key[:160], "launches": each.count / STEPS, "ms": each.self_device_time_total / STEPS / 1e3}
        for each in found.key_averages()
        if each.self_device_time_total
    ]
    return sorted(rows, key=lambda row: -row["ms"])


def table_of(kernels: list[dict[str, Any]]) -> str:
    """The longest of them as lines of text."""
    lines = [f"{row['ms']:9.3f} ms {row['launches']:5.0f} x {row['kernel']}" for row in kernels[:SHOWN]]
    return "\n".join([f"{sum(row['ms'] for row in kernels):9.3f} ms all", *lines])


def measured(pattern: str, stack: Stack, by_dense: Callable[[], Any]) -> dict[str, Any]:
    """The figures of a pattern."""
    begin = time.perf_counter()
    run = stack.step(pattern)
    seconds = time.perf_counter() - begin
    # Several steps a turn: the first ones behind dense attention run on a GPU that it has heated.
    times = [(median_ms(run, TURN), median_ms(by_dense, TURN)) for _ in range(TURNS)]
    step_ms, dense_ms = (statistics.median(each) for each in zip(*times, strict=True))
    kernels = kernels_of(run)
    return {
        "step_ms": step_ms, "dense_ms": dense_ms, "times_dense": dense_ms / step_ms,
        "model_ms": step_ms / Flux.share, "compile_s": seconds,
        "apart_ms": step_ms - sum(row["ms"] for row in kernels), "kernels": kernels[:KEPT],
    }  # fmt: skip


def main() -> int:
    """Time the chosen patterns within a budget."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--patterns", nargs="*", default=list(CASES), help="like 'sla(keep=0.05)' or 'sla in fp8'")
    parser.add_argument("--budget", type=float, default=100, help="seconds after which no pattern is begun")
    parser.add_argument("--out", type=Path, help="JSON file, which is gone on with")
    given = parser.parse_args()
    end = time.perf_counter() + given.budget
    report: dict[str, Any] = {
        "versions": versions(), "model": "flux", "dtype": "bfloat16", "settings": {"layout": str(LAYOUT)}, "cases": {},
    }  # fmt: skip
    go_on(report, given.out)
    print(report["versions"], flush=True)
    if given.out is not None:
        given.out.parent.mkdir(parents=True, exist_ok=True)
    order = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION]
    with torch.inference_mode(), sdpa_kernel(order, set_priority=True):
        stack = Stack(LAYOUT)
        by_dense = stack.step(DENSE)
        shown = kernels_of(by_dense)
        report["dense_kernels"] = shown[:KEPT]
        print(f"{DENSE}\n{table_of(shown)}", flush=True)

        def told(pattern: str) -> dict[str, Any]:
            try:
                result: dict[str, Any] = measured(pattern, stack, by_dense)
            except Exception as error:
                result = {"failed": f"{type(error).__name__}: {error}"[:600]}
            print(pattern, json.dumps({name: each for name, each in result.items() if name != "kernels"}))
            print(table_of(result.get("kernels", [])), flush=True)
            return result

        measure_cases(given.patterns, told, report, given.out, end)
    return int(any("failed" in report["cases"].get(name, {}) for name in given.patterns))


if __name__ == "__main__":
    sys.exit(main())
