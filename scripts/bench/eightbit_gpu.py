"""Time of the forward in 8 bits against our own in bf16 and cuDNN's dense one, at the same lists.

    python3 -m scripts.bench.eightbit_gpu [--only NAME ...] [--budget 120] [--out FILE]

Whole calls, quantising included, in turns in one process; the kernels of a call are timed apart too, and how long it
keeps the host. Errors are those of sampled queries against float64.
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
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention
from torch.profiler import ProfilerActivity, profile

from scripts.bench.dynamic_gpu import host_us
from scripts.bench.gpu import in_turns
from scripts.gpu_common import go_on, measure_cases, sampled_error, versions
from visattn import Layout, attention, parse, plan
from visattn.patterns import RoutedPattern
from visattn.problem import PRECISIONS

HEADS = 24
FLUX, HUNYUAN, SMALL = Layout((256, 256)), Layout((30, 48, 80)), Layout((64, 64))
# Pattern, tokens, head dim.
CASES: dict[str, tuple[str, Layout, int]] = {
    "flux-s16": ("na(window=80x80,stride=16x16)", FLUX, 128),
    "blocks-90": ("topk(keep=0.1,block=8x16,always=none)", FLUX, 128),
    "flux-s1": ("na(window=80x80)", FLUX, 128),
    "flux-s16-64": ("na(window=80x80,stride=16x16)", FLUX, 64),
    "dense-16k": ("dense", Layout((128, 128)), 128),
    "hunyuan-s16": ("na(window=18x24x24,stride=16x8x8)", HUNYUAN, 128),
    "clear16-256": ("clear(radius=16)", FLUX, 128),
    "flux-s16-text": ("na(window=80x80,stride=16x16)", Layout((256, 256), prefix=512), 128),
    "dense-64k": ("dense", FLUX, 128),
    # Where quantising may take longer than it saves.
    "blocks-80-4k": ("topk(keep=0.2,block=8x16,key_block=8x8)", SMALL, 128),
    "flux-s8-4k": ("na(window=24x24,stride=8x8)", SMALL, 128),
    "blocks-80-9k": ("topk(keep=0.2,block=8x16,key_block=8x8)", Layout((96, 96)), 128),
    "blocks-80-16k": ("topk(keep=0.2,block=8x16,key_block=8x8)", Layout((128, 128)), 128),
    "blocks-80-16k-64": ("topk(keep=0.2,block=8x16,key_block=8x8)", Layout((128, 128)), 64),
    "clear32-256": ("clear(radius=32)", FLUX, 128),
}


def dense(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Attention by cuDNN."""
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        return scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))


def kernels_us(run: Callable[[], Any]) -> dict[str, float]:
    """Microseconds of each kernel of a call, the mean of three."""
    with profile(activities=[ProfilerActivity.CUDA]) as found:
        for _ in range(3):
            run()
        torch.cuda.synchronize()
    return {each.key[:60]: each.self_device_time_total / 3 for each in found.key_averages()}


def case_of(name: str) -> dict[str, Any]:
    """The figures of one case."""
    pattern, layout, dim = CASES[name]
    shape = (1, layout.length, HEADS, dim)
    made = torch.Generator("cuda").manual_seed(0)
    q, k, v = (torch.randn(shape, generator=made, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    ours = partial(attention, q, k, v, pattern, layout, backend="triton")
    runs: dict[str, Callable[[], Any]] = {"bf16": ours, **{p: partial(ours, precision=p) for p in PRECISIONS}}
    result: dict[str, Any] = {"pattern": pattern, "layout": str(layout), "head_dim": dim}
    truth = runs["bf16"]().float()
    for precision in PRECISIONS:
        out = runs[precision]()
        result[f"{precision}_to_bf16"] = float((out.float() - truth).norm() / truth.norm())
        if not isinstance(parse(pattern), RoutedPattern):
            result[f"{precision}_error"] = sampled_error(q, k, v, out, pattern, layout)
    result["ms"] = in_turns(runs | {"cudnn": partial(dense, q, k, v)})
    if not isinstance(parse(pattern), RoutedPattern):
        visited = 4 * dim * HEADS * layout.pairs / plan(parse(pattern), layout).tile_bound
        result["tflops"] = {who: visited / ms / 1e9 for who, ms in result["ms"].items() if who != "cudnn"}
    result["kernels_us"] = {precision: kernels_us(runs[precision]) for precision in PRECISIONS}
    result["host_us"] = {who: host_us(run) for who, run in runs.items()}
    return result


def main() -> int:
    """Time the chosen cases within a budget."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", default=list(CASES), choices=list(CASES))
    parser.add_argument("--budget", type=float, default=120, help="seconds")
    parser.add_argument("--out", type=Path, help="JSON file")
    chosen = parser.parse_args()
    report: dict[str, Any] = {"versions": versions(), "heads": HEADS, "cases": {}}
    go_on(report, chosen.out)
    print(report["versions"], flush=True)

    def told(name: str) -> dict[str, Any]:
        try:
            result = case_of(name)
        except Exception as error:
            result = {"failed": f"{type(error).__name__}: {error}"[:600]}
        print(name, json.dumps(result), flush=True)
        return result

    measure_cases(chosen.only, told, report, chosen.out, time.perf_counter() + chosen.budget)
    for name, found in report["cases"].items():
        if "ms" not in found:
            print(f"{name:<16}FAILED {found['failed']}")
            continue
        ms = found["ms"]
        each = "".join(
            f"{who:>6} {ms[who]:8.3f} ms {ms['cudnn'] / ms[who]:6.2f}x cuDNN {ms['bf16'] / ms[who]:5.2f}x bf16 "
            for who in ("bf16", *PRECISIONS)
        )
        print(f"{name:<16}{each} errors {found['int8_to_bf16']:.4f} {found['fp8_to_bf16']:.4f}")
    return int(any("failed" in found for found in report["cases"].values()))


if __name__ == "__main__":
    sys.exit(main())
