"""Kept calls on a real GPU: the same bits as Triton's launcher gives, what a call costs the host, no waiting.

    python3 -m scripts.check.prepared_gpu [--out FILE] [--profiles FOLDER] [--only NAME]

Exit status 1 if a kept call differs from the first one, waits for the device, or is left to Triton's launcher.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import torch

from scripts.calls_gpu import gpu_us, host_us, in_turns, profiled, wall_us
from scripts.continued import earlier
from scripts.gpu_common import add_rows, go_on, versions
from visattn import Layout, attention, parse
from visattn.keep import STORE

# Pattern, layout, heads, heads of keys, head dim.
Case = tuple[str, Layout, int, int, int]
CASES: dict[str, Case] = {
    "na16s8": ("na(window=16x16,stride=8x8)", Layout((64, 64)), 24, 24, 128),
    "na32s8": ("na(window=32x32,stride=8x8)", Layout((64, 64)), 24, 24, 128),
    "clear8": ("clear(radius=8)", Layout((64, 64)), 24, 24, 128),
    "clear8 text": ("clear(radius=8)", Layout((64, 64), 512), 24, 24, 128),
    "na7 d64": ("na(window=7x7)", Layout((64, 64)), 24, 24, 64),
    "na9 sd": ("na(window=9x9)", Layout((64, 64)), 8, 8, 40),
    "na9 32": ("na(window=9x9)", Layout((32, 32)), 12, 12, 64),
    "routing": ("routing(regions=8x8,topk=4)", Layout((64, 64)), 24, 24, 128),
    "dense": ("dense", Layout((64, 64)), 24, 24, 128),
    "gqa": ("na(window=16x16,stride=8x8)", Layout((64, 64)), 24, 8, 128),
    "odd": ("na(window=7x7)", Layout((37, 29), 5, 3), 3, 3, 72),
}


def tensors(case: Case, seed: int, dtype: torch.dtype, grad: bool) -> list[torch.Tensor]:
    """q, k and v of a case."""
    _, layout, heads, kv_heads, head_dim = case
    draw = torch.Generator("cuda").manual_seed(seed)
    shapes = [(2 if head_dim == 72 else 1, layout.length, h, head_dim) for h in (heads, kv_heads, kv_heads)]
    return [torch.randn(s, generator=draw, device="cuda", dtype=dtype).requires_grad_(grad) for s in shapes]


def call(case: Case, given: list[torch.Tensor], backend: str = "triton") -> torch.Tensor:
    """One attention call of a case."""
    q, k, v = given
    return attention(q, k, v, case[0], case[1], backend=backend)


def results(case: Case, given: list[torch.Tensor], grad: bool) -> list[torch.Tensor]:
    """Output and gradients."""
    out = call(case, given)
    return [out, *torch.autograd.grad(out.square().sum(), given)] if grad else [out]


def fresh_results(case: Case, given: list[torch.Tensor], grad: bool) -> list[torch.Tensor]:
    """The same through Triton's launcher: nothing is kept."""
    from visattn.kernels.triton import backend
    from visattn.kernels.triton.ready import Ready
    from visattn.problem import Call

    q, k, v = given
    asked = Call(parse(case[0]), case[1], q.shape[3] ** -0.5)
    kernels = backend.kernels_of(q, k, v, asked, lambda: None)
    out = Ready(kernels, asked, grad)(q, k, v, None, None)[0]
    return [out, *torch.autograd.grad(out.square().sum(), given)] if grad else [out]


def ready() -> tuple[int, int]:
    """How many kernels are ready to start, and how many are left to Triton."""
    from visattn.kernels.triton.ready import Ready

    values = [entry.value for entry in STORE.entries() if isinstance(entry.value, Ready)]
    starts = [start for value in values for start in value.kernels.starts.ready.values()]
    return sum(s is not None for s in starts), sum(s is None for s in starts)


def equal_bits(case: Case, grad: bool) -> bool:
    """Whether kept calls on several tensors in turns give the bits of first ones, and none waits for the device."""
    sets = [tensors(case, seed, torch.bfloat16, grad) for seed in range(3)]
    wanted = [fresh_results(case, given, grad) for given in sets]
    good = True
    for _ in range(3):
        for given, right in zip(sets, wanted, strict=True):
            good &= all(map(torch.equal, results(case, given, grad), right))
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        results(case, sets[0], grad)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return good


def measure(name: str, case: Case, profiles: Path | None) -> dict[str, Any]:
    """Bits and times of one case."""
    pattern, layout, heads, kv_heads, head_dim = case
    of = heads if heads == kv_heads else f"{heads} ({kv_heads} of keys)"
    row: dict[str, Any] = {"case": name, "pattern": pattern, "layout": str(layout), "heads": f"{of} x {head_dim}"}
    with torch.no_grad():
        row["equal"] = equal_bits(case, False)
        given = tensors(case, 0, torch.bfloat16, False)
        sparse, stock = partial(call, case, given), partial(dense, given)
        row |= timed("", sparse, stock, True)
    row["equal"] &= equal_bits(case, True)
    given = tensors(case, 0, torch.bfloat16, True)
    learning, learning_stock = partial(call, case, given), partial(dense, given)
    row |= timed("forward_grad_", learning, learning_stock, False)
    back, back_stock = backward(learning, given), backward(learning_stock, given)
    row |= timed("backward_", back, back_stock, False)
    engine = backward(partial(Idle.apply, *given), given)
    row |= in_turns({"backward_engine_host_us": partial(host_us, engine)})
    row["ready"], row["left"] = ready()
    if profiles is not None:
        for kind, work in (("no gradient", sparse), ("forward", learning), ("backward", back)):
            with torch.set_grad_enabled(kind != "no gradient"):
                text = profiled(work)
            (profiles / f"{name} {kind}.txt".replace(" ", "-")).write_text(text)
    return row


class Idle(torch.autograd.Function):
    """A function in Python whose backward has nothing to do: what autograd's engine costs a backward alone."""

    @staticmethod
    def forward(ctx: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """A new tensor like q."""
        ctx.grads = q.detach(), k.detach(), v.detach()
        return torch.empty_like(q)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        """Some gradients."""
        return ctx.grads


def timed(prefix: str, sparse: Callable[[], Any], stock: Callable[[], Any], graph: bool) -> dict[str, float]:
    """Microseconds of a sparse and a dense call in turns: of the host, of the wall, of the GPU from captured graphs."""
    both = {"": sparse, "sdpa_": stock}
    contenders: dict[str, Callable[[], float]] = {}
    for name, work in both.items():
        contenders |= {f"{name}host_us": partial(host_us, work), f"{name}wall_us": partial(wall_us, work)}
        if graph:
            contenders[f"{name}gpu_us"] = gpu_us(work)
    return {prefix + name: value for name, value in in_turns(contenders).items()}


def backward(forward: Callable[[], torch.Tensor], given: list[torch.Tensor]) -> Callable[[], Any]:
    """The backward of one forward, again and again."""
    out = forward()
    return partial(torch.autograd.grad, out, given, torch.ones_like(out), retain_graph=True)


def dense(given: list[torch.Tensor]) -> torch.Tensor:
    """Dense SDPA on the same tensors."""
    q, k, v = (t.transpose(1, 2) for t in given)
    grouped = q.shape[1] != k.shape[1]
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, enable_gqa=grouped)


def captured(case: Case) -> bool:
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


def threaded(case: Case) -> bool:
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
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(work, range(4)))
    return not wrong


def main() -> int:
    """Check, time, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="JSON file for the figures; its rows of other cases stay")
    parser.add_argument("--profiles", type=Path, help="folder for a profile of the host of each case")
    parser.add_argument("--only", default="", help="only the cases whose name contains this")
    chosen = parser.parse_args()
    if chosen.profiles:
        chosen.profiles.mkdir(parents=True, exist_ok=True)
    report: dict[str, Any] = {"versions": versions(), "rows": [], "checks": {}}
    go_on(report, chosen.out, "rows")
    rows = []
    for name, case in CASES.items():
        if chosen.only not in name:
            continue
        rows.append(measure(name, case, chosen.profiles))
        print(json.dumps({k: round(v, 1) if isinstance(v, float) else v for k, v in rows[-1].items()}), flush=True)
    names = [name for name in ("na16s8", "na9 sd", "routing", "odd") if chosen.only in name]
    checks = {name: (captured(CASES[name]), threaded(CASES[name])) for name in names}
    print("captured, threaded:", checks)
    report["checks"] = {**(earlier(chosen.out, report) or report)["checks"], **checks}
    add_rows(report, rows, ("case",), chosen.out, "rows")
    good = all(row["equal"] for row in rows) and not rows[-1]["left"] and all(map(all, checks.values()))
    print("ok" if good else "WRONG")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
