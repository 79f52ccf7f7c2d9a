"""Measures timm models on large images on this CPU: stock against swapped, whole forwards and the attention in them.

    python -m scripts.bench.timm_models --out docs/results/timm-highres.json

Weights are random, which no time depends on. Seconds of attention are those inside the same forwards: of
`scaled_dot_product_attention` in the stock model, and of the calls that `Handle.report` times in the swapped one. Keep
the machine idle for `--parts time`; memory may be measured apart. A case is written as soon as it is measured.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F

from scripts.continued import earlier
from visattn import apply
from visattn.environment import devices, versions
from visattn.files import write_json
from visattn.handle import Handle
from visattn.models.measure import create, peak_memory

NAMES = ("vit_small_patch16_384", "vit_small_patch14_dinov2")
SIZES = (1024, 2048)
PATTERN = "na(window=15x15)"
PARTS = ("time", "memory")


@contextmanager
def dense_clock() -> Iterator[list[float]]:
    """While it is open, every call of `scaled_dot_product_attention` appends its seconds to the list."""
    own, seconds = F.scaled_dot_product_attention, []

    def timed(*args: Any, **kwargs: Any) -> torch.Tensor:
        start = time.perf_counter()
        out = own(*args, **kwargs)
        seconds.append(time.perf_counter() - start)
        return out

    F.scaled_dot_product_attention = timed
    try:
        yield seconds
    finally:
        F.scaled_dot_product_attention = own


def sparse_seconds(handle: Handle) -> float:
    """Seconds of all calls that ran the pattern so far."""
    return sum(site.sparse_seconds for site in handle.report().sites)


def time_forwards(
    stock: Callable[[], object], swapped: Callable[[], object], handle: Handle, repeats: int, stock_repeats: int
) -> dict[str, dict[str, list[float]]]:
    """Seconds of forwards in turns, the swapped model's first: its plan is made before the first measurement."""
    found: dict[str, dict[str, list[float]]] = {k: {"seconds": [], "attention": []} for k in ("stock", "swapped")}
    swapped()
    for turn in range(max(repeats, stock_repeats)):
        if turn < repeats:
            before, start = sparse_seconds(handle), time.perf_counter()
            swapped()
            found["swapped"]["seconds"].append(time.perf_counter() - start)
            found["swapped"]["attention"].append(sparse_seconds(handle) - before)
        if turn < stock_repeats:
            with dense_clock() as calls:
                start = time.perf_counter()
                stock()
                found["stock"]["seconds"].append(time.perf_counter() - start)
            found["stock"]["attention"].append(sum(calls))
    return found


@torch.inference_mode()
def measure(name: str, size: int, options: argparse.Namespace) -> dict[str, Any]:
    """One model at one size: what `--parts` asks for."""
    torch.manual_seed(0)
    model, x = create(name, size), torch.randn(1, 3, size, size)
    other = copy.deepcopy(model)
    handle = apply(other, options.pattern, strict=True)
    parts: dict[str, Any] = {"stock": {}, "swapped": {}}
    if "time" in options.parts:
        stock_repeats = options.stock_repeats or options.repeats
        timed = time_forwards(lambda: model(x), lambda: other(x), handle, options.repeats, stock_repeats)
        for side, values in timed.items():
            parts[side] |= values
    if "memory" in options.parts:
        other(x)
        parts["swapped"]["memory"] = peak_memory(lambda: other(x), "cpu")
        parts["stock"]["memory"] = peak_memory(lambda: model(x), "cpu")
    call = handle.report().sites[0].calls[0]
    layout = call.problem.layout
    about = {"name": name, "size": size, "tokens": layout.length, "grid": list(layout.grid), "pattern": options.pattern}
    return about | {"backend": call.backend, "density": call.density} | parts


def merged(old: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    """A case with what was measured now in place of what was measured before."""
    sides = {side: old.get(side, {}) | new[side] for side in ("stock", "swapped")}
    return old | new | sides


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--names", nargs="+", default=NAMES)
    parser.add_argument("--sizes", nargs="+", type=int, default=SIZES)
    parser.add_argument("--pattern", default=PATTERN)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--stock-repeats", type=int, help="fewer forwards of the stock model, which take long")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, help="file for the figures as JSON; what it holds of other cases stays")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    """Entry point."""
    options = parse_arguments(arguments)
    torch.set_num_threads(options.threads)
    found: dict[str, Any] = {"cases": {}, "versions": versions(), "devices": devices(), "threads": options.threads}
    try:
        found = earlier(options.out, found, "cpu") or found
    except ValueError as error:
        raise SystemExit(f"bench_timm: {error}") from None
    for name in options.names:
        for size in options.sizes:
            key = f"{name} {size}"
            try:
                case = measure(name, size, options)
            except ValueError as error:
                raise SystemExit(f"bench_timm: {error}") from error
            found["cases"][key] = merged(found["cases"].get(key, {}), case)
            print(key, json.dumps({side: case[side] for side in ("stock", "swapped")}), flush=True)
            if options.out:
                write_json(options.out, found, indent=2)


if __name__ == "__main__":
    main()
