"""Time of sla, sla2 and vsa at 90 to 97 % sparsity on a GPU against cuDNN's dense attention, in bf16 and in 8 bits.

    python -m scripts.bench.hybrid_gpu --out docs/results/h200-hybrid.json

24 heads of 128, random weights. Whole calls of `attention`, the choice of blocks included, medians of CUDA events in
turns with cuDNN's; the softmax branch alone is `front`. --backward times forward and backward in bf16 as well.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.nn.attention import SDPBackend

from scripts.bench.dynamic_gpu import host_us
from scripts.bench.eightbit_gpu import kernels_us
from scripts.bench.gpu import DIM, HEADS, compared, dense_by, in_turns
from scripts.gpu_common import go_on, measure_cases, versions
from visattn import Layout, attention, parse
from visattn.patterns import HybridPattern

IMAGE, SMALL, VIDEO = Layout((256, 256)), Layout((64, 64)), Layout((16, 32, 32))
TILES = "block=8x16, key_block=8x8"
CASES: dict[str, tuple[str, Layout]] = {
    "sla 95": (f"sla(keep=0.05, {TILES})", IMAGE),
    "sla2 95": (f"sla2(keep=0.05, {TILES})", IMAGE),
    "vsa 95": (f"vsa(keep=0.05, {TILES})", IMAGE),
    "sla2 97": (f"sla2(keep=0.03, {TILES})", IMAGE),
    "sla 97": (f"sla(keep=0.03, {TILES})", IMAGE),
    "vsa 97": (f"vsa(keep=0.03, {TILES})", IMAGE),
    "sla 90": (f"sla(keep=0.1, {TILES})", IMAGE),
    "sla2 90": (f"sla2(keep=0.1, {TILES})", IMAGE),
    "vsa 90": (f"vsa(keep=0.1, {TILES})", IMAGE),
    "sla 95, marginal": (f"sla(keep=0.05, marginal=0.85, {TILES})", IMAGE),
    "sla 95, blocks of 128": ("sla(keep=0.05, block=8x16)", IMAGE),
    "sla2 95, blocks of 128": ("sla2(keep=0.05, block=8x16)", IMAGE),
    "vsa 95, blocks of 128": ("vsa(keep=0.05, block=8x16)", IMAGE),
    "small sla 95": (f"sla(keep=0.05, {TILES})", SMALL),
    "small sla2 95": (f"sla2(keep=0.05, {TILES})", SMALL),
    "video sla 95": ("sla(keep=0.05, block=2x8x8, key_block=1x8x8)", VIDEO),
    "video sla2 95": ("sla2(keep=0.05, block=2x8x8, key_block=1x8x8)", VIDEO),
    "video vsa 95": ("vsa(keep=0.05, block=4x4x4)", VIDEO),
}
PRECISIONS = ("fp8", "int8")


def random_parameters(pattern: HybridPattern, layout: Layout) -> dict[str, torch.Tensor]:
    """What is learned, around where training starts."""
    made = torch.Generator("cuda").manual_seed(1)
    found = {}
    for name, value in pattern.initial_parameters(HEADS, DIM, layout.grid).items():
        noise = torch.randn(value.shape, generator=made, device="cuda")
        found[name] = value.cuda() + noise * DIM**-0.5
    return found


def measured(name: str, backward: bool) -> dict[str, Any]:
    """Figures of one case: milliseconds, and how far kernels and torch's operators are apart."""
    text, layout = CASES[name]
    pattern = parse(text)
    assert isinstance(pattern, HybridPattern)
    made = torch.Generator("cuda").manual_seed(0)
    shape = (3, 1, layout.length, HEADS, DIM)
    q, k, v = inputs = list(torch.randn(shape, generator=made, device="cuda", dtype=torch.bfloat16))
    parameters = random_parameters(pattern, layout)
    ours = partial(attention, pattern=pattern, layout=layout, parameters=parameters)
    dense = dense_by(SDPBackend.CUDNN_ATTENTION, inputs)
    result: dict[str, Any] = {"pattern": text, "layout": str(layout)}
    with torch.no_grad():
        truth = ours(q, k, v).float()
        runs: dict[str, Callable[[], Any]] = {
            "ours": partial(ours, q, k, v),
            "front": partial(attention, q, k, v, pattern.front, layout, backend="triton"),
            "cudnn": partial(dense[0], *dense[1]),
        }
        for precision in PRECISIONS:
            try:
                out = ours(q, k, v, precision=precision).float()
            except ValueError as error:
                result[f"{precision}_refused"] = str(error)[:200]
                continue
            result[f"{precision}_to_bf16"] = float((out - truth).norm() / truth.norm())
            runs[precision] = partial(ours, q, k, v, precision=precision)
            runs[f"front_{precision}"] = partial(
                attention, q, k, v, pattern.front, layout, backend="triton", precision=precision
            )
        result["ms"] = in_turns(runs)
        result["host_us"] = host_us(runs["ours"])
        result["kernels_us"] = kernels_us(runs["ours"])
    result["times_cudnn"] = {who: result["ms"]["cudnn"] / ms for who, ms in result["ms"].items() if who != "cudnn"}
    result["by_torch"] = compared_to_torch(pattern, inputs, layout, parameters)
    if backward:
        learned = [p.requires_grad_() for p in parameters.values()]
        given = dict(zip(parameters, learned, strict=True))
        whole = lambda q, k, v: attention(q, k, v, pattern, layout, parameters=given)  # noqa: E731
        result["training_ms"] = compared({"ours": (whole, inputs), "cudnn": dense})
    result["peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
    return result


def compared_to_torch(
    pattern: HybridPattern, inputs: list[torch.Tensor], layout: Layout, parameters: dict[str, torch.Tensor]
) -> float:
    """Relative distance of the outputs of kernels to those with gradients, whose second branch is torch's operators."""
    q, k, v = inputs
    learned = {name: value.detach().requires_grad_() for name, value in parameters.items()}
    with torch.no_grad():
        fast = attention(q, k, v, pattern, layout, parameters=parameters).float()
    slow = attention(q, k, v, pattern, layout, parameters=learned).detach().float()
    return float((fast - slow).norm() / slow.norm())


def main() -> int:
    """Time the chosen cases within a budget."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", default=list(CASES), choices=list(CASES))
    parser.add_argument("--backward", action="store_true", help="time the backward too")
    parser.add_argument("--budget", type=float, default=120, help="seconds")
    parser.add_argument("--out", type=Path, help="JSON file")
    given = parser.parse_args()
    report: dict[str, Any] = {
        "versions": versions(), "heads": HEADS, "head_dim": DIM, "dtype": "bfloat16", "cases": {},
    }  # fmt: skip
    go_on(report, given.out)
    print(report["versions"], flush=True)

    def told(name: str) -> dict[str, Any]:
        torch.cuda.reset_peak_memory_stats()
        try:
            result = measured(name, given.backward)
        except Exception as error:
            result = {"failed": f"{type(error).__name__}: {error}"[:600]}
        torch.cuda.empty_cache()
        print(name, json.dumps(result), flush=True)
        return result

    if given.out is not None:
        given.out.parent.mkdir(parents=True, exist_ok=True)
    measure_cases(given.only, told, report, given.out, time.perf_counter() + given.budget)
    return int(any("failed" in found for found in report["cases"].values()))


if __name__ == "__main__":
    sys.exit(main())
