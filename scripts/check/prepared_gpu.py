"""Kept calls on a real GPU: the same bits as Triton's launcher gives, what a call costs the host, no waiting.

    python3 -m scripts.check.prepared_gpu [--out FILE]

Exit status 1 if a kept call differs from the first one, waits for the device, or is left to Triton's launcher.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import threading
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch

from scripts.gpu_common import versions
from visattn import Layout, attention

CASES: dict[str, tuple[str, Layout, int, int, int]] = {
    "na16s8": ("na(window=16x16,stride=8x8)", Layout((64, 64)), 24, 24, 128),
    "na32s8": ("na(window=32x32,stride=8x8)", Layout((64, 64)), 24, 24, 128),
    "clear8": ("clear(radius=8)", Layout((64, 64)), 24, 24, 128),
    "clear8 text": ("clear(radius=8)", Layout((64, 64), 512), 24, 24, 128),
    "na7 d64": ("na(window=7x7)", Layout((64, 64)), 24, 24, 64),
    "na9 sd": ("na(window=9x9)", Layout((64, 64)), 8, 8, 40),
    "na9 32": ("na(window=9x9)", Layout((32, 32)), 12, 12, 64),
    "routing": ("routing(regions=8x8,topk=4)", Layout((64, 64)), 24, 24, 128),
    "gqa": ("na(window=16x16,stride=8x8)", Layout((64, 64)), 24, 8, 128),
    "odd": ("na(window=7x7)", Layout((37, 29), 5, 3), 3, 3, 72),
}


def tensors(case: tuple[str, Layout, int, int, int], seed: int, dtype: torch.dtype, grad: bool) -> list[torch.Tensor]:
    """q, k and v of a case."""
    _, layout, heads, kv_heads, head_dim = case
    draw = torch.Generator("cuda").manual_seed(seed)
    shapes = [(2 if head_dim == 72 else 1, layout.length, h, head_dim) for h in (heads, kv_heads, kv_heads)]
    return [torch.randn(s, generator=draw, device="cuda", dtype=dtype).requires_grad_(grad) for s in shapes]


def call(case: tuple[str, Layout, int, int, int], given: list[torch.Tensor], backend: str = "triton") -> torch.Tensor:
    """One attention call of a case."""
    q, k, v = given
    return attention(q, k, v, case[0], case[1], backend=backend)


def results(case: Any, given: list[torch.Tensor], grad: bool) -> list[torch.Tensor]:
    """Output and gradients."""
    out = call(case, given)
    return [out, *torch.autograd.grad(out.square().sum(), given)] if grad else [out]


def fresh_results(case: Any, given: list[torch.Tensor], grad: bool) -> list[torch.Tensor]:
    """The same through Triton's launcher: nothing is kept."""
    from visattn.dispatch import load
    from visattn.kernels.triton.alike import Kinds

    backend: Any = load("triton")
    kept, backend._kinds = backend._kinds, Kinds()
    try:
        return results(case, given, grad)
    finally:
        backend._kinds = kept


def host_us(work: Any, repeats: int = 60) -> float:
    """Microseconds that one call keeps the host, with an idle device."""
    times = []
    for _ in range(repeats):
        torch.cuda.synchronize()
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    torch.cuda.synchronize()
    return 1e6 * statistics.median(times)


def wall_us(work: Any, repeats: int = 200) -> float:
    """Microseconds per call in a loop."""
    work()
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(repeats):
        work()
    torch.cuda.synchronize()
    return 1e6 * (time.perf_counter() - start) / repeats


def ready() -> tuple[int, int]:
    """How many kernels are ready to start, and how many are left to Triton."""
    from visattn.dispatch import load

    backend: Any = load("triton")
    all_of = [start for alike in backend._kinds._known.values() for start in alike.starts._ready.values()]
    return sum(s is not None for s in all_of), sum(s is None for s in all_of)


def measure(name: str, case: Any) -> dict[str, Any]:
    """Bits and times of one case."""
    dtype = torch.bfloat16
    pattern, layout, heads, kv_heads, head_dim = case
    of = heads if heads == kv_heads else f"{heads} ({kv_heads} of keys)"
    row: dict[str, Any] = {"case": name, "pattern": pattern, "layout": str(layout), "heads": f"{of} x {head_dim}"}
    for grad in (False, True):
        with torch.set_grad_enabled(grad):
            sets = [tensors(case, seed, dtype, grad) for seed in range(3)]
            wanted = [fresh_results(case, given, grad) for given in sets]
            for _ in range(3):
                for given, right in zip(sets, wanted, strict=True):
                    found = results(case, given, grad)
                    row["equal"] = row.get("equal", True) and all(
                        torch.equal(a, b) for a, b in zip(found, right, strict=True)
                    )
            given = sets[0]
            torch.cuda.synchronize()
            torch.cuda.set_sync_debug_mode("error")
            try:
                results(case, given, grad)
            finally:
                torch.cuda.set_sync_debug_mode("default")
            sparse, stock = partial(call, case, given), partial(dense, given)
            if grad:
                out = sparse()
                back = partial(torch.autograd.grad, out, given, torch.ones_like(out), retain_graph=True)
                row["forward_grad_us"], row["backward_us"] = host_us(sparse), host_us(back)
            else:
                row["host_us"], row["wall_us"] = host_us(sparse), wall_us(sparse)
                row["sdpa_host_us"], row["sdpa_wall_us"] = host_us(stock), wall_us(stock)
    row["ready"], row["left"] = ready()
    return row


def dense(given: list[torch.Tensor]) -> torch.Tensor:
    """Dense SDPA on the same tensors."""
    q, k, v = (t.transpose(1, 2) for t in given)
    grouped = q.shape[1] != k.shape[1]
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, enable_gqa=grouped)


def captured(case: Any) -> bool:
    """Whether a captured kept call gives the right bits, beside an eager one on another stream."""
    with torch.no_grad():
        static = tensors(case, 0, torch.bfloat16, False)
        call(case, static)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = call(case, static)
        for seed in (1, 2):
            other = tensors(case, seed, torch.bfloat16, False)
            for a, b in zip(static, other, strict=True):
                a.copy_(b)
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                beside = call(case, other)
            graph.replay()
            torch.cuda.synchronize()
            if not (torch.equal(out, beside) and torch.equal(out, fresh_results(case, other, False)[0])):
                return False
    return True


def threaded(case: Any) -> bool:
    """Whether several threads at once get the right bits."""
    sets = [tensors(case, seed, torch.bfloat16, False) for seed in range(4)]
    wanted = [fresh_results(case, given, False)[0] for given in sets]
    wrong: list[int] = []

    def work(i: int) -> None:
        with torch.no_grad(), torch.cuda.stream(torch.cuda.Stream()):
            for _ in range(50):
                if not torch.equal(call(case, sets[i]), wanted[i]):
                    wrong.append(i)

    torch.cuda.synchronize()
    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return not wrong


def main() -> int:
    """Check, time, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="file for the figures as JSON")
    chosen = parser.parse_args()
    rows = []
    for name, case in CASES.items():
        rows.append(measure(name, case))
        print(json.dumps({k: round(v, 1) if isinstance(v, float) else v for k, v in rows[-1].items()}), flush=True)
    checks = {name: (captured(CASES[name]), threaded(CASES[name])) for name in ("na16s8", "na9 sd", "routing", "odd")}
    print("captured, threaded:", checks)
    if chosen.out:
        chosen.out.write_text(json.dumps({"versions": versions(), "rows": rows, "checks": checks}, indent=1) + "\n")
    good = all(row["equal"] for row in rows) and not rows[-1]["left"] and all(map(all, checks.values()))
    print("ok" if good else "WRONG")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
