"""TFLOP/s over visited tiles for shapes that models have: head dims 40 to 256, few and many heads, samples of guidance.

    python3 -m scripts.bench.shapes_gpu [--jobs 10] [--only NAME ...] [--budget 90] [--out FILE]

Ours and cuDNN's dense attention take turns, bfloat16; a backward counts 2.5 times the products of its forward. What is
left of the time when the budget is spent is not begun. Prints a line each, writes JSON, and keeps the cases that FILE
has. `--jobs` compiles in that many processes first.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.nn.attention import SDPBackend

from scripts.bench.gpu import alone, compared, dense_by
from scripts.gpu_common import compile_first, go_on, measure_cases, versions
from visattn import Layout, attention, parse
from visattn.kernels.triton.backend import launches
from visattn.kernels.triton.boxes import QUERY_HALVES, tiled
from visattn.patterns import RoutedPattern
from visattn.problem import Call


class Shape(NamedTuple):
    """A problem: the text of a pattern, the tokens, and the shape of q, k and v."""

    pattern: str
    layout: Layout
    head_dim: int = 128
    batch: int = 1
    heads: int = 24


FULL, MASKED = "na(window=32x32,stride=16x16)", "na(window=33x33)"
SMALL, LARGE = Layout((64, 64)), Layout((128, 128))
CASES = {
    **{f"full-16k-{dim}": Shape(FULL, LARGE, dim) for dim in (128, 64, 40, 72, 80, 96, 256)},
    **{f"masked-16k-{dim}": Shape(MASKED, LARGE, dim) for dim in (128, 64, 40, 72, 80, 96, 256)},
    **{f"full-4k-{dim}": Shape(FULL, SMALL, dim) for dim in (128, 64, 40, 80)},
    "full-4k-guided": Shape(FULL, SMALL, 64, 2, 10),
    "masked-4k-guided": Shape(MASKED, SMALL, 64, 2, 10),
    "full-4k-40-heads": Shape(FULL, SMALL, 128, 2, 40),
    # Lists per head, the choice among them counted.
    "blocks-90": Shape("topk(keep=0.1,block=8x16,always=none)", LARGE),
    "blocks-90-long": Shape("topk(keep=0.1,block=8x16,always=none)", Layout((256, 256))),
}


def inputs_of(shape: Shape) -> list[torch.Tensor]:
    """q, k and v."""
    made = torch.Generator("cuda").manual_seed(0)
    size = (shape.batch, shape.layout.length, shape.heads, shape.head_dim)
    return [torch.randn(size, generator=made, device="cuda", dtype=torch.bfloat16) for _ in range(3)]


def measured(shape: Shape) -> dict[str, Any]:
    """Milliseconds of ours and of cuDNN, and our TFLOP/s over visited tiles."""
    inputs, pattern = inputs_of(shape), parse(shape.pattern)
    ours = partial(attention, pattern=shape.pattern, layout=shape.layout, backend="triton"), inputs
    cudnn = dense_by(SDPBackend.CUDNN_ATTENTION, inputs)
    result: dict[str, Any] = {
        "pattern": shape.pattern, "layout": str(shape.layout),
        "head_dim": shape.head_dim, "batch": shape.batch, "heads": shape.heads,
    }  # fmt: skip
    try:
        result |= compared({"triton": ours, "cudnn": cudnn})
    except RuntimeError as error:
        result |= {"triton": alone(ours), "cudnn": str(error)[:200]}
    if not isinstance(pattern, RoutedPattern):
        q, k, v = inputs
        launch = launches(q, k, v, Call(pattern, shape.layout, shape.head_dim**-0.5))["forward"]
        result["kernel"] = "hopper" if launch.hopper else "general"
        tiles = tiled(pattern, shape.layout, launch.rows, launch.tile, QUERY_HALVES if launch.halves else None)
        products = 4.0 * shape.batch * shape.heads * shape.head_dim * shape.layout.pairs / tiles.tile_bound
        result["forward_tflops"] = products / result["triton"]["forward_ms"] / 1e9
        result["backward_tflops"] = 2.5 * products / result["triton"]["backward_ms"] / 1e9
    return result


def compile_part(names: list[str], index: int, of: int) -> None:
    """Run every of-th case once, forward and backward, which compiles it."""
    for name in names[index::of]:
        shape = CASES[name]
        # What does not run is reported where it is timed.
        with contextlib.suppress(Exception):
            leaves = [x.requires_grad_() for x in inputs_of(shape)]
            attention(*leaves, pattern=shape.pattern, layout=shape.layout, backend="triton").sum().backward()
            torch.cuda.synchronize()


def main() -> int:
    """Measure the chosen cases."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", choices=CASES, default=list(CASES))
    parser.add_argument("--budget", type=float, default=90, help="seconds after which no case is begun")
    parser.add_argument("--out", type=Path, help="JSON file")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--compile", default="", help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    begin = time.perf_counter()
    report: dict[str, Any] = {"versions": versions(), "cases": {}}
    go_on(report, chosen.out)
    names = [name for name in chosen.only if name not in report["cases"]]
    if chosen.compile:
        compile_part(names, *map(int, chosen.compile.split("/")))
        return 0
    if names and chosen.jobs > 1:
        compile_first(chosen.jobs)
    print(report["versions"], f"compiled at {time.perf_counter() - begin:.0f} s", flush=True)

    def told(name: str) -> dict[str, Any]:
        result = measured(CASES[name])
        print(f"{name} at {time.perf_counter() - begin:.0f} s: {result}", flush=True)
        return result

    measure_cases(names, told, report, chosen.out, begin + chosen.budget)
    return 0


if __name__ == "__main__":
    sys.exit(main())
