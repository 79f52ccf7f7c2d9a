"""Time and memory of whole block stacks, dense against sparse, eager and compiled, on a real GPU.

    python3 -m scripts.bench.stack_gpu [--jobs 8] [--only flux] [--out FILE]

Random weights of the size of FLUX (2 double and 4 single of its 19 and 38 blocks) and of Wan 1.3B (2 of its 30), in
bf16, forward only. `step_ms` is the stack as run, `model_ms` that time scaled to all blocks of the model. Dense is
torch's attention with cuDNN first. `--jobs` compiles in that many processes first; times are taken one by one after.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import itertools
import json
import sys
from pathlib import Path
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from scripts.bench.gpu import median_ms
from scripts.bench.stack_models import Attend, Flux, Wan, dense, turns
from scripts.gpu_common import add_rows, compile_first, go_on, versions
from visattn import Layout, attention
from visattn.staged import with_precision

MODELS = {"flux": Flux, "wan": Wan}
DENSE = "dense"


def sparse(pattern: str, layout: Layout, heads: int, head_dim: int) -> Attend:
    """Attention along a pattern, whose learnable parameters are where training starts."""
    made, precision = with_precision(pattern)
    # Lists run on one engine; what is learned is added by its own.
    backend = "auto" if made.learnable else "triton"
    learned = {n: p.cuda() for n, p in made.initial_parameters(heads, head_dim, layout.grid).items()}
    how: dict[str, Any] = {"backend": backend, "parameters": learned or None, "precision": precision}
    return lambda q, k, v: attention(q, k, v, made, layout, **how)


def cases(only: str, chosen: str, also: list[str]) -> list[tuple[str, tuple[int, ...], str, bool]]:
    """Model, grid, pattern, and whether it is compiled."""
    found = []
    for name, kind in MODELS.items():
        for grid, pattern, compiled in itertools.product(kind.grids, (DENSE, *kind.patterns, *also), (False, True)):
            found.append((name, grid, pattern, compiled))
    return [case for case in found if only in case[0] and (case[2] in (DENSE, *also) or chosen in case[2])]


def stack_of(name: str, grid: tuple[int, ...], pattern: str, compiled: bool) -> tuple[Any, tuple[Any, ...]]:
    """A model and the arguments of a step."""
    kind = MODELS[name]
    torch.manual_seed(0)
    with torch.device("cuda"):
        model = kind().to(torch.bfloat16).eval().requires_grad_(False)
        joint = name == "flux"
        layout = Layout(grid, prefix=kind.text if joint else 0)
        x = torch.randn(1, layout.tokens, kind.hidden, dtype=torch.bfloat16)
        text = torch.randn(1, kind.text, kind.hidden, dtype=torch.bfloat16)
        vector = torch.randn(1, kind.hidden, dtype=torch.bfloat16)
        turn = turns(layout.length, kind.hidden // kind.heads, "cuda")
        attend = dense if pattern == DENSE else sparse(pattern, layout, kind.heads, kind.hidden // kind.heads)
    if compiled:
        torch._dynamo.reset()
        for block in model.modules():
            if type(block).__name__.endswith("Block"):
                block.compile(fullgraph=True, dynamic=False)
    return model, (x, text, vector, turn, attend)


def measure(name: str, grid: tuple[int, ...], pattern: str, compiled: bool, once: bool) -> dict[str, float]:
    """Milliseconds of a step and gigabytes at its peak."""
    model, inputs = stack_of(name, grid, pattern, compiled)
    order = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION]
    with torch.inference_mode(), sdpa_kernel(order, set_priority=True):
        out = model(*inputs)
        assert out.isfinite().all()
        if once:
            return {}
        torch.cuda.reset_peak_memory_stats()
        time = median_ms(lambda: model(*inputs), 0.8)
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    peak = torch.cuda.max_memory_allocated()
    return {
        "step_ms": time, "model_ms": time / MODELS[name].share,
        "peak_gb": peak / 1e9, "weights_gb": weights / 1e9,
    }  # fmt: skip


def main() -> int:
    """Compile, then time."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--only", default="", help="models whose name contains this")
    parser.add_argument("--pattern", default="", help="patterns whose text contains this, beside dense")
    parser.add_argument("--also", nargs="*", default=[], help="more patterns, like 'sla2(keep=0.05)' or 'sla in fp8'")
    parser.add_argument("--grid", default="", help="grids like 21x45x80 alone")
    parser.add_argument("--compiled", action="store_true", help="compiled blocks alone")
    parser.add_argument("--out", type=Path, help="JSON file; its rows of other cases stay")
    parser.add_argument("--compile", default="", help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    todo = [case for case in cases(chosen.only, chosen.pattern, chosen.also) if case[3] or not chosen.compiled]
    todo = [case for case in todo if not chosen.grid or "x".join(map(str, case[1])) == chosen.grid]
    if chosen.compile:
        index, of = map(int, chosen.compile.split("/"))
        for name, grid, pattern, compiled in [c for c in todo if c[3]][index::of]:
            # What fails is reported where it is timed.
            with contextlib.suppress(Exception):
                measure(name, grid, pattern, compiled, once=True)
        return 0
    if chosen.jobs > 1:
        compile_first(chosen.jobs)
    report: dict[str, Any] = {"versions": versions(), "dtype": "bfloat16", "batch": 1, "cases": []}
    go_on(report, chosen.out)
    failed = 0
    for name, grid, pattern, compiled in todo:
        case: dict[str, Any] = {"model": name, "grid": grid, "pattern": pattern, "compiled": compiled}
        try:
            case |= measure(name, grid, pattern, compiled, once=False)
        except Exception as error:
            case["failed"] = f"{type(error).__name__}: {error}"[:400]
            failed += 1
        # Compiled blocks hold on to their model in cycles: the next case's peak would count it.
        torch._dynamo.reset()
        gc.collect()
        torch.cuda.empty_cache()
        print(json.dumps(case), flush=True)
        add_rows(report, [case], ("model", "grid", "pattern", "compiled"), chosen.out)
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
