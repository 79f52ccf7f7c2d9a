"""Whether `auto` takes the faster of dense and sparse: both timed on either side of the crossing, on a real GPU.

    python3 -m scripts.check.crossing_gpu [--modes eager captured compiled] [--out FILE]

bf16, no gradient, heads and channels of SD 1.5, SDXL, FLUX and Wan. Exit status 1 if what is estimated to be faster
takes more than 10 % longer by the wall clock than the other.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.nn.functional import scaled_dot_product_attention

from scripts.calls_gpu import in_turns, wall_us
from visattn import Layout, attention, parse
from visattn.crossing import crossing
from visattn.files import write_json
from visattn.problem import Call, Problem

MODES = ("eager", "captured", "compiled")
PATTERNS = ("na(window=9x9)", "na(window=16x16,stride=8x8)", "clear(radius=8)")
# How much longer what is chosen may take.
SLACK = 1.10
TURNS, CALLS = 7, 104
# Calls of one compiled function, whose own start is not theirs.
CHAIN = 8


class Shape(NamedTuple):
    """Tokens of one model: a square grid, batch, heads and channels per head."""

    model: str
    side: int
    batch: int
    heads: int
    dim: int


SHAPES = (
    Shape("SD 1.5", 16, 2, 8, 160),
    Shape("SD 1.5", 32, 2, 8, 80),
    Shape("SD 1.5", 64, 2, 8, 40),
    Shape("SDXL", 32, 2, 20, 64),
    Shape("SDXL", 64, 2, 10, 64),
    Shape("SDXL", 96, 2, 10, 64),
    Shape("FLUX", 24, 1, 24, 128),
    Shape("FLUX", 48, 1, 24, 128),
    Shape("FLUX", 64, 1, 24, 128),
    Shape("FLUX", 96, 1, 24, 128),
    Shape("Wan", 32, 1, 12, 128),
    Shape("Wan", 64, 1, 12, 128),
)


def in_mode(run: Callable[..., torch.Tensor], given: list[torch.Tensor], mode: str) -> Callable[[], Any]:
    """Calls made one by one, in a CUDA graph, or `CHAIN` of them by compiled code, which in models has as many."""
    run(*given)
    if mode == "eager":
        return lambda: run(*given)
    if mode == "compiled":
        # Code of its own: Dynamo gives up on a function that it compiled too often.
        torch._dynamo.reset()

        def chain(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            for _ in range(CHAIN):
                q = run(q, k, v)
            return q

        made = torch.compile(chain, dynamic=False)
        made(*given)
        return lambda: made(*given)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run(*given)
    return graph.replay


def measure(shape: Shape, pattern: str, mode: str) -> dict[str, Any]:
    """Estimated and measured times of one case, and whether the choice holds."""
    layout = Layout((shape.side, shape.side))
    of = (shape.batch, layout.length, shape.heads, shape.dim)
    given = [torch.randn(of, device="cuda", dtype=torch.bfloat16) for _ in range(3)]

    def dense(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)).transpose(1, 2)

    def sparse(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return attention(q, k, v, pattern, layout, backend="triton")

    q, k, v = given
    problem = Problem.of(q, k, v, Call(parse(pattern), layout, shape.dim**-0.5))
    found = crossing(replace(problem, mode=mode))
    assert found is not None
    runs = {"dense": in_mode(dense, given, mode), "sparse": in_mode(sparse, given, mode)}
    each = CHAIN if mode == "compiled" else 1
    taken = in_turns({name: partial(wall_us, run, CALLS // each) for name, run in runs.items()}, TURNS)
    taken = {name: us / each for name, us in taken.items()}
    choice = "dense" if found.dense_pays else "sparse"
    return {
        **shape._asdict(), "pattern": pattern, "mode": mode, "choice": choice, "backend": found.backend,
        "dense_us": taken["dense"], "sparse_us": taken["sparse"],
        "estimated_dense_us": 1e3 * found.dense_ms, "estimated_sparse_us": 1e3 * found.sparse_ms,
        "right": taken[choice] <= SLACK * min(taken.values()),
    }  # fmt: skip


def main(arguments: list[str] | None = None) -> int:
    """Time, compare, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--modes", nargs="*", choices=MODES, default=["eager", "captured"])
    parser.add_argument("--patterns", nargs="*", default=list(PATTERNS))
    parser.add_argument("--out", type=Path, help="file for the figures as JSON")
    chosen = parser.parse_args(arguments)
    from scripts.gpu_common import versions

    rows = []
    with torch.no_grad():
        for mode in chosen.modes:
            for pattern in chosen.patterns:
                for shape in SHAPES:
                    rows.append(measure(shape, pattern, mode))
                    print(json.dumps({k: round(v, 1) if isinstance(v, float) else v for k, v in rows[-1].items()}))
    wrong = [row for row in rows if not row["right"]]
    if chosen.out:
        write_json(chosen.out, {"versions": versions(), "rows": rows})
    print(f"{len(rows) - len(wrong)} of {len(rows)} choices are within {SLACK - 1:.0%} of the faster one")
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
