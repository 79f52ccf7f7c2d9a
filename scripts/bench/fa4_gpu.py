"""FlashAttention-4 by our plans against the Triton and Hopper kernels and cuDNN's dense attention, in turns.

    python3 -m scripts.bench.fa4_gpu [--jobs 6] [--only flux-s16 ...] [--budget 150] [--out FILE]

Milliseconds of a forward without gradients and of a backward alone: whole calls of both backends, and of `fa4` the
launch without the moves into tile order, on tensors that are in it. Rows of the outputs are compared with float64
first. What is left of the cases when the budget is spent is not begun, and cases that FILE has are kept. `--jobs`
compiles in that many processes first.
"""

from __future__ import annotations

import argparse
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.nn.attention import SDPBackend

from scripts.bench.gpu import CASES as MAIN_CASES
from scripts.bench.gpu import Contender, compared, dense_by, in_turns
from scripts.gpu_common import compile_first, go_on, measure_cases, sampled_error, versions
from visattn import Layout, attention, parse
from visattn.dispatch import choose, load, milliseconds
from visattn.kernels.fa4 import package
from visattn.kernels.fa4.backend import ROWS, attend_slots
from visattn.kernels.fa4.blocks import blocks, rows_of, tile_plan
from visattn.patterns import Dense, DynamicPattern, ListedPattern
from visattn.problem import Call, Problem

HEADS = 24
# Name, pattern, layout, head dim.
CASES: dict[str, tuple[str, Layout, int]] = {
    "flux-s16": (*MAIN_CASES["flux-s16"], 128),
    "flux-s1": (*MAIN_CASES["flux-s1"], 128),
    "radial-wan": (*MAIN_CASES["radial-wan"], 128),
    "dense-16k": (*MAIN_CASES["dense-16k"], 128),
    "clear16-256": (*MAIN_CASES["clear16-256"], 128),
    "topk10-flat": ("topk(keep=0.1,block=128)", MAIN_CASES["flux-s16"][1], 128),
    "hunyuan-s16": (*MAIN_CASES["hunyuan-s16"], 128),
    "flux-s16-64": (*MAIN_CASES["flux-s16"], 64),
    "dense-16k-64": (*MAIN_CASES["dense-16k"], 64),
    "flux64-na16": ("na(window=16x16,stride=8x8)", Layout((64, 64), prefix=512), 128),
    "hunyuan-s1": (*MAIN_CASES["hunyuan-s1"], 128),
    "dense-64k": (*MAIN_CASES["dense-64k"], 128),
}


def tensors_of(name: str, grad: bool = False) -> list[torch.Tensor]:
    """q, k and v of a case."""
    made = torch.Generator("cuda").manual_seed(0)
    shape = (1, CASES[name][1].length, HEADS, CASES[name][2])
    tensors = [torch.randn(shape, generator=made, device="cuda", dtype=torch.bfloat16) for _ in range(3)]
    return [t.requires_grad_(grad) for t in tensors]


def contenders_of(name: str, inputs: list[torch.Tensor]) -> dict[str, Contender]:
    """Whole calls, the launch alone, and dense attention."""
    pattern, layout, dim = CASES[name]
    found: dict[str, Contender] = {
        each: (partial(attention, pattern=pattern, layout=layout, backend=each), inputs) for each in ("triton", "fa4")
    }
    found["cudnn"] = dense_by(SDPBackend.CUDNN_ATTENTION, inputs)
    parsed = parse(pattern)
    if not isinstance(parsed, Dense | DynamicPattern):
        made = blocks(parsed, layout, 1, ROWS[package.generation()], inputs[0].device)
        slots = [
            side.into(t).contiguous() for side, t in zip((made.queries, made.keys, made.keys), inputs, strict=True)
        ]
        alone = lambda q, k, v: attend_slots(made, q, k, v, dim**-0.5)[0]  # noqa: E731
        found["fa4 alone"] = alone, slots
    return found


def moves_of(name: str, q: torch.Tensor) -> dict[str, float]:
    """Milliseconds of moving one tensor into tile order: as it is done, by its own elements, as rows of a matrix."""
    pattern, layout, _ = CASES[name]
    parsed = parse(pattern)
    token = None
    if not isinstance(parsed, Dense):
        token = blocks(parsed, layout, 1, ROWS[package.generation()], q.device).queries.token
    if token is None:
        return {}
    rows = q.flatten(0, 1).flatten(1)
    return in_turns(
        {
            "wide": lambda: rows_of(q, token),
            "narrow": lambda: q.index_select(1, token),
            "matrix": lambda: rows.index_select(0, token),
            "gathered": lambda: rows[token],
        }
    )


def case_of(name: str) -> dict[str, Any]:
    """Check and time a case, beside what `auto` would take."""
    pattern, layout, dim = CASES[name]
    inputs = tensors_of(name)
    q, k, v = inputs
    result: dict[str, Any] = {"pattern": pattern, "layout": str(layout), "dim": dim}
    try:
        out = attention(q, k, v, pattern, layout, backend="fa4")
        if isinstance(parse(pattern), DynamicPattern):
            theirs = attention(q, k, v, pattern, layout, backend="triton")
            result["error"] = float((out.float() - theirs.float()).norm() / theirs.float().norm())
        else:
            result["error"] = sampled_error(q, k, v, out, pattern, layout)
        assert result["error"] < 1e-2, f"{name} is off by {result['error']}"
        result |= compared(contenders_of(name, inputs))
        result["moves_ms"] = moves_of(name, q)
    except Exception as error:  # A case that fails is a line of the report.
        return result | {"failed": f"{type(error).__name__}: {error}"[:600]}
    problem = Problem.of(q, k, v, Call(parse(pattern), layout, dim**-0.5))
    tiles = tile_plan(problem.pattern, layout, 128) if isinstance(problem.pattern, ListedPattern) else None
    result["tile_bound"], result["full_share"] = (tiles.tile_bound, tiles.full_share) if tiles else (1.0, 1.0)
    result["auto"] = choose(problem).name
    result["expected_ms"] = milliseconds(problem, load("fa4").cost(problem))
    ratios = [
        f"{who} {result['cudnn'][f'{way}_ms'] / result[who][f'{way}_ms']:.2f}x"
        for way in ("forward", "backward")
        for who in ("triton", "fa4", "fa4 alone")
        if who in result
    ]
    shape = f"bound {result['tile_bound']:.2f}x, full {result['full_share']:.0%}"
    print(f"{name}: {shape}; times cuDNN forward, backward: {', '.join(ratios)}; auto {result['auto']}", flush=True)
    print(f"    moves of a tensor: {result['moves_ms']}", flush=True)
    return result


def once(name: str) -> None:
    """Forward and backward of a case, which compiles what it needs."""
    pattern, layout, _ = CASES[name]
    for backend in ("fa4", "triton"):
        q, k, v = tensors_of(name, grad=True)
        with torch.no_grad():
            attention(q, k, v, pattern, layout, backend=backend)
        attention(q, k, v, pattern, layout, backend=backend).sum().backward()


def main() -> int:
    """Run the chosen cases."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", default=list(CASES), choices=list(CASES), help="cases; default all")
    parser.add_argument("--budget", type=float, default=150, help="seconds after which no case is begun")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--out", type=Path, help="JSON file")
    parser.add_argument("--compile", default="", help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    end = time.perf_counter() + chosen.budget
    support = load("fa4").available()
    if not support.ok:
        print(support.reason)
        return 1
    libraries = {"flash-attn-4": package.version()}
    report: dict[str, Any] = {"versions": versions() | libraries, "heads": HEADS, "cases": {}}
    go_on(report, chosen.out)
    kept = report["cases"]
    names = [name for name in chosen.only if name not in kept or "failed" in kept[name]]
    if chosen.compile:
        index, of = map(int, chosen.compile.split("/"))
        for name in names[index::of]:
            once(name)
        return 0
    if names and chosen.jobs > 1:
        compile_first(chosen.jobs)
    print(report["versions"], load("fa4").compiled(), flush=True)
    measure_cases(names, case_of, report, chosen.out, end)
    return int(any("failed" in case for case in report["cases"].values()))


if __name__ == "__main__":
    sys.exit(main())
