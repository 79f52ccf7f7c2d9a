"""Time of the Triton kernels against cuDNN, flash, FlexAttention, NATTEN and FlashAttention-4.

    python3 -m scripts.bench.gpu [--quick] [--only NAME ...] [--jobs 8] [--budget 300] [--out FILE]

Each case is checked first, then timed: medians of CUDA events, everyone in turns in one run. A peer that does not run a
case, or whose results are not ours, is a line of the report with its reason. Prints a table, writes JSON; what is left
of the cases when the budget is spent is not begun, and cases that FILE has from the same versions are kept (where a
package is missing now, the others go on). `--jobs` compiles in that many processes first. FlexAttention is compiled for
the cases of `--quick` only.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import random
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch._functorch import config as functorch_config
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from scripts.bench.peers import PACKAGES, Contender, checked, package_versions, peer
from scripts.gpu_common import compile_first, go_on, measure_cases, sampled_error, versions
from visattn import Layout, attention, parse, plan
from visattn.kernels.triton.backend import launches
from visattn.kernels.triton.boxes import tiled
from visattn.patterns import RoutedPattern
from visattn.patterns.kinds import with_pooled_keys
from visattn.problem import Call

HEADS, DIM = 24, 128
FLUX, HUNYUAN = Layout((256, 256)), Layout((30, 48, 80))
CASES: dict[str, tuple[str, Layout]] = {
    "flux-s1": ("na(window=80x80)", FLUX),
    "flux-s16": ("na(window=80x80,stride=16x16)", FLUX),
    "hunyuan-s1": ("na(window=18x24x24)", HUNYUAN),
    "hunyuan-s16": ("na(window=18x24x24,stride=16x8x8)", HUNYUAN),
    "clear8-128": ("clear(radius=8)", Layout((128, 128), prefix=512)),
    "clear16-128": ("clear(radius=16)", Layout((128, 128), prefix=512)),
    "clear32-128": ("clear(radius=32)", Layout((128, 128), prefix=512)),
    "clear8-256": ("clear(radius=8)", FLUX),
    "clear16-256": ("clear(radius=16)", FLUX),
    "clear16-256-text": ("clear(radius=16)", Layout((256, 256), prefix=512)),
    "clear32-256": ("clear(radius=32)", FLUX),
    "clear16-512": ("clear(radius=16)", Layout((512, 512), prefix=512)),
    "radial-wan": ("radial(decay=0.2)", Layout((21, 45, 80))),
    "radial-hunyuan": ("radial(decay=0.2)", Layout((30, 48, 80), suffix=256)),
    "routing-128": ("routing(regions=16x16,topk=16)", Layout((128, 128))),
    "dense-16k": ("dense", Layout((128, 128))),
    "dense-64k": ("dense", FLUX),
}
# Longer sequences are not timed with flash attention, whose backward takes seconds there.
FLASH_TOKENS = 2**16
# Backwards are timed again and again on one graph, which compiled ones must be told.
functorch_config.donated_buffer = False
# Times that each contender comes up.
TURNS = 5
PEERS = ["cudnn", "flash", *PACKAGES]
# What is compared in a quick run.
MAIN = ("flux-s1", "flux-s16", "hunyuan-s1", "hunyuan-s16", "clear16-256", "radial-wan", "dense-16k")


def median_ms(run: Callable[[], Any], budget: float = 0.6) -> float:
    """Median of CUDA-event times in milliseconds, over about `budget` seconds of calls that wait in a queue."""

    def timed() -> tuple[torch.cuda.Event, torch.cuda.Event]:
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        stop.record()
        return start, stop

    torch.cuda.synchronize()
    begin = time.perf_counter()
    first = timed()
    torch.cuda.synchronize()
    # A call that takes longer than all of the time is measured by the one that says so.
    calls = min(30, int(budget / (time.perf_counter() - begin)))
    times = [timed() for _ in range(calls)] or [first]
    torch.cuda.synchronize()
    return statistics.median(start.elapsed_time(stop) for start, stop in times)


def in_turns(runs: dict[str, Callable[[], Any]]) -> dict[str, float]:
    """Medians of several contenders that take turns: a GPU at its power limit slows down for whoever comes next.

    Each turn has an order of its own, so that nobody always comes behind the one that heats it most.
    """
    times: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(TURNS):
        for name in random.Random(turn).sample(list(runs), len(runs)):
            times[name].append(median_ms(runs[name], 0.6 / TURNS))
    return {name: statistics.median(found) for name, found in times.items()}


def compared(contenders: dict[str, Contender]) -> dict[str, dict[str, float]]:
    """Milliseconds of each contender's forward without gradients, and of its backward alone."""
    with torch.no_grad():
        forward = in_turns({name: partial(make, *inputs) for name, (make, inputs) in contenders.items()})
    backwards = {}
    for name, (make, inputs) in contenders.items():
        leaves = [t.detach().requires_grad_() for t in inputs]
        out = make(*leaves)
        backwards[name] = partial(torch.autograd.grad, out, leaves, torch.randn_like(out), retain_graph=True)
    backward = in_turns(backwards)
    return {name: {"forward_ms": forward[name], "backward_ms": backward[name]} for name in contenders}


def forward_and_backward(make: Callable[..., torch.Tensor], inputs: list[torch.Tensor]) -> dict[str, float]:
    """The same of one alone."""
    return compared({"alone": (make, inputs)})["alone"]


def rates() -> dict[str, float]:
    """The two ceilings of this GPU: bf16 products in TFLOP/s, device copies in TB/s (bytes read and written)."""
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    product = 2 * 8192**3 / median_ms(lambda: a @ b) / 1e9
    source = torch.randn(2**30, device="cuda")
    target = torch.empty_like(source)
    return {"matmul_tflops": product, "copy_tbs": 8 * 2**30 / median_ms(lambda: target.copy_(source)) / 1e9}


def dense_by(kind: SDPBackend, inputs: list[torch.Tensor]) -> Contender:
    """SDPA of one kind on contiguous [B, H, S, D]."""

    def make(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        with sdpa_kernel(kind):
            return scaled_dot_product_attention(q, k, v)

    return make, [t.transpose(1, 2).contiguous() for t in inputs]


def alone(contender: Contender) -> dict[str, Any]:
    """Times of a peer alone, or why it does not run."""
    try:
        return forward_and_backward(*contender)
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}"[:300]}


def called(name: str, peers: list[str]) -> list[str]:
    """Those of the peers that are asked for a case and compute what we do."""
    return [who for who in PACKAGES if who in peers and (who != "flex" or name in MAIN)]


def case_of(name: str, flash: dict[int, dict[str, Any]], peers: list[str], top: dict[str, float]) -> dict[str, Any]:
    """Check and time one case, in turns with cuDNN; `flash` keeps what does not depend on the pattern."""
    pattern, layout = CASES[name]
    made = torch.Generator("cuda").manual_seed(0)
    shape = (1, layout.length, HEADS, DIM)
    inputs = [torch.randn(shape, generator=made, device="cuda", dtype=torch.bfloat16) for _ in range(3)]
    parsed = parse(pattern)
    q, k, v = inputs
    launch = launches(q, k, v, Call(parsed, layout, DIM**-0.5))
    tiles = (
        plan(pattern, layout)
        if isinstance(parsed, RoutedPattern)
        else tiled(parsed, layout, launch["forward"].rows, launch["forward"].tile)
    )
    result: dict[str, Any] = {
        "pattern": pattern, "layout": str(layout), "config": {d: list(c) for d, c in launch.items()},
        "query_box": tiles.queries.shape, "key_box": tiles.keys.shape,
        "flop_bound": tiles.flop_bound, "tile_bound": tiles.tile_bound, "full_share": tiles.full_share,
    }  # fmt: skip
    ours = lambda q, k, v: attention(q, k, v, pattern, layout, backend="triton")  # noqa: E731
    if not isinstance(parsed, RoutedPattern):
        keys, values, _ = with_pooled_keys(parsed, k, v, None, layout, None)
        result["error"] = sampled_error(q, keys, values, ours(q, k, v), pattern, layout)
        assert result["error"] < 1e-2, f"{name} is off by {result['error']}"
    contenders: dict[str, Contender] = {"triton": (ours, inputs)}
    if "cudnn" in peers:
        contenders["cudnn"] = dense_by(SDPBackend.CUDNN_ATTENTION, inputs)
    for who in called(name, peers):
        try:
            contenders[who] = checked(peer(who, pattern, layout, inputs), ours)
        except Exception as error:  # Whatever it is, it is why this peer has no figures.
            result[who] = {"error": f"{type(error).__name__}: {error}"[:300]}
    result |= compared(contenders)
    flops = 4 * DIM * HEADS * layout.pairs
    result["tflops_visited"] = flops / tiles.tile_bound / result["triton"]["forward_ms"] / 1e9
    result["floor_ms"] = {
        "arithmetic": flops / tiles.flop_bound / top["matmul_tflops"] / 1e9,
        "bytes": 4 * inputs[0].numel() * 2 / top["copy_tbs"] / 1e9,
    }
    if "flash" in peers and layout.length <= FLASH_TOKENS:
        if layout.length not in flash:
            flash[layout.length] = alone(dense_by(SDPBackend.FLASH_ATTENTION, inputs))
        result["flash"] = flash[layout.length]
    return result


def once(name: str, peers: list[str]) -> None:
    """Forward and backward of a case, which compiles what it needs."""
    pattern, layout = CASES[name]
    shape = (1, layout.length, HEADS, DIM)
    q, k, v = (torch.randn(shape, device="cuda", dtype=torch.bfloat16, requires_grad=True) for _ in range(3))
    for backend in ("triton", *(who for who in called(name, peers) if who != "natten")):
        # What does not compile is reported where it is timed.
        with contextlib.suppress(Exception):
            with torch.no_grad():
                attention(q, k, v, pattern, layout, backend=backend)
            attention(q, k, v, pattern, layout, backend=backend).sum().backward()


def line(name: str, result: dict[str, Any]) -> str:
    """One row of the table."""

    def ms(who: str, way: str) -> float:
        return result.get(who, {}).get(f"{way}_ms", float("nan"))

    ways = [
        f"{ms('triton', w):>9.3f}{ms('cudnn', w):>9.2f}{ms('cudnn', w) / ms('triton', w):>7.2f}x"
        f"{ms('flex', w) / ms('triton', w):>7.2f}x" for w in ("forward", "backward")
    ]  # fmt: skip
    return (
        f"{name:<18}{result['tile_bound']:>7.2f}x{result['full_share']:>6.0%}{result['tflops_visited']:>7.0f}"
        + "".join(ways)
    )


def main() -> int:
    """Run the chosen cases."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", choices=CASES, help=f"names out of {', '.join(CASES)}; default all")
    parser.add_argument("--quick", action="store_true", help="the main cases only")
    parser.add_argument("--peers", nargs="*", default=PEERS, choices=PEERS)
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--budget", type=float, default=300, help="seconds after which no case is begun")
    parser.add_argument("--out", type=Path, help="JSON file")
    parser.add_argument("--compile", default="", help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    end = time.perf_counter() + chosen.budget
    using = package_versions(chosen.peers) | versions()
    report: dict[str, Any] = {"versions": using, "ceilings": {}, "heads": HEADS, "dim": DIM, "cases": {}}
    go_on(report, chosen.out)
    kept = report["cases"]
    names = [name for name in chosen.only or (MAIN if chosen.quick else CASES) if "triton" not in kept.get(name, {})]
    if chosen.compile:
        index, of = map(int, chosen.compile.split("/"))
        for name in names[index::of]:
            once(name, chosen.peers)
        return 0
    if names and chosen.jobs > 1:
        compile_first(chosen.jobs)
    report["ceilings"] = rates()
    print(report["versions"], report["ceilings"], flush=True)
    flash: dict[int, dict[str, Any]] = {}

    def told(name: str) -> dict[str, Any]:
        begin = time.perf_counter()
        result: dict[str, Any]
        try:
            result = case_of(name, flash, chosen.peers, report["ceilings"])
        except Exception as error:
            result = {"failed": f"{type(error).__name__}: {error}"[:600]}
        result["wall_s"] = time.perf_counter() - begin
        print(name, json.dumps(result), flush=True)
        return result

    measure_cases(names, told, report, chosen.out, end)
    print(f"{'case':<18}{'bound':>8}{'full':>6}{'TF/s':>7}{'fwd ms':>9}{'cudnn':>9}{'ratio':>8}{'/flex':>8}"
          f"{'bwd ms':>9}{'cudnn':>9}{'ratio':>8}{'/flex':>8}")  # fmt: skip
    for name, result in report["cases"].items():
        print(f"{name:<18}FAILED {result['failed']}" if "failed" in result else line(name, result))
    return int(any("failed" in r for r in report["cases"].values()))


if __name__ == "__main__":
    sys.exit(main())
