"""Block stacks on several GPUs against one: dense and sparse, Ulysses, ring and halo, with time, bytes and error.

    torchrun --nproc-per-node 2 -m scripts.bench.parallel_gpu [--budget 200] [--only wan] [--out FILE]

The stacks are those of `scripts.bench.stack_gpu` (random weights, bf16, forward only). Every rank first runs the whole
stack by itself: the times on one GPU, and what the slabs' outputs are compared with. Rank 0 writes each row as soon as
it is measured. `ring` is dense attention that fetches the other slabs' keys point to point while it computes its own,
which on two ranks is ring attention. Time is the slowest rank's median of steps; `exchange_ms` what a layer's exchange
takes with nothing to hide behind, `wait_ms` how long a layer's kernels wait for it in a step, and `hidden` the rest as
a share.
"""

from __future__ import annotations

import argparse
import datetime
import gc
import importlib
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar, NamedTuple
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch.nn.attention import SDPBackend, sdpa_kernel

from scripts.bench.stack_models import Attend, Flux, Wan, dense, turns
from scripts.gpu_common import add_rows, go_on, versions
from visattn import Layout, attention, parallel, parse
from visattn.parallel.exchange import Exchange

MODELS: dict[str, Any] = {"flux": Flux, "wan": Wan}
WINDOW, TILED = "na(window=11x23x23)", "na(window=40x40, stride=8x8)"
# Model, grid, pattern, in the order of what matters.
CASES = (
    ("wan", (21, 90, 160), WINDOW),
    ("flux", (256, 256), TILED),
    ("wan", (21, 90, 160), "dense"),
    ("flux", (256, 256), "dense"),
    ("wan", (21, 45, 80), WINDOW),
    ("wan", (21, 45, 80), "dense"),
    ("flux", (256, 256), "clear(radius=16)"),
    ("wan", (21, 45, 80), "radial(decay=0.2)"),
)


class Stack(NamedTuple):
    """A model and the whole sequence's inputs."""

    model: Any
    layout: Layout
    x: torch.Tensor
    text: torch.Tensor
    vector: torch.Tensor
    turn: torch.Tensor

    def run(self, attend: Attend, slabs: parallel.Slabs | None, rank: int) -> Callable[[], torch.Tensor]:
        """A step on the whole sequence, or on a rank's slab."""
        x, turn = self.x, self.turn
        if slabs is not None:
            x = parallel.Slabs(Layout(self.layout.grid), slabs.axis, slabs.sizes).shard(x, rank)
            turn = slabs.shard(turn, rank)
        return lambda: self.model(x, self.text, self.vector, turn, attend)


def stack_of(name: str, grid: tuple[int, ...]) -> Stack:
    """The same random stack on every rank."""
    kind = MODELS[name]
    torch.manual_seed(0)
    with torch.device("cuda"):
        model = kind().to(torch.bfloat16).eval().requires_grad_(False)
        layout = Layout(grid, prefix=kind.text if name == "flux" else 0)
        x = torch.randn(1, layout.tokens, kind.hidden, dtype=torch.bfloat16)
        text = torch.randn(1, kind.text, kind.hidden, dtype=torch.bfloat16)
        vector = torch.randn(1, kind.hidden, dtype=torch.bfloat16)
        turn = turns(layout.length, kind.hidden // kind.heads, "cuda")
    return Stack(model, layout, x, text, vector, turn)


class Counted:
    """An attention of slabs that adds up what it moves."""

    def __init__(self, how: Any, pattern: str, slabs: parallel.Slabs) -> None:
        self._how, self._pattern, self._slabs = how, pattern, slabs
        self.moved = parallel.Moved()

    def __call__(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """Attention of this rank's tokens."""
        return self._how(q, k, v, self._pattern, self._slabs, moved=self.moved)


def slowest_ms(step: Callable[[], Any], seconds: float) -> float:
    """Median milliseconds of a step on the slowest rank, all starting together."""
    events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
    times: list[float] = []
    spent = 0.0
    while len(times) < 30 and (len(times) < 2 or spent < seconds):
        dist.barrier()
        torch.cuda.synchronize()
        events[0].record()
        step()
        events[1].record()
        torch.cuda.synchronize()
        took = torch.tensor(events[0].elapsed_time(events[1]), device="cuda")
        dist.all_reduce(took, op=dist.ReduceOp.MAX)
        times.append(float(took))
        spent += times[-1] / 1e3
    return sorted(times)[len(times) // 2]


def exchange_ms(stack: Stack, pattern: str, slabs: parallel.Slabs, rank: int) -> float:
    """What the exchange of a layer takes alone."""
    kind = type(stack.model)
    local = slabs.local(rank)
    k = torch.randn(1, local.length, kind.heads, kind.hidden // kind.heads, device="cuda", dtype=torch.bfloat16)
    needs = parallel.halo_needs(parse(pattern), slabs, rank)

    def step() -> None:
        exchange = Exchange(needs, None)
        exchange.post(k, k)
        exchange.wait()

    step()
    return slowest_ms(step, 0.1)


class Waits(Exchange):
    """An exchange that records how long kernels wait for it."""

    marks: ClassVar[list[list[torch.cuda.Event]]] = []

    def wait(self) -> None:
        """See `Exchange.wait`."""
        pair = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
        pair[0].record()
        super().wait()
        pair[1].record()
        self.marks.append(pair)


def wait_ms(step: Callable[[], Any]) -> float:
    """Mean milliseconds that a layer waits for its exchange, of the rank that waits longest."""
    with patch.object(importlib.import_module("visattn.parallel.halo"), "Exchange", Waits):
        found = []
        for _ in range(3):
            dist.barrier()
            Waits.marks.clear()
            step()
            torch.cuda.synchronize()
            times = [first.elapsed_time(second) for first, second in Waits.marks]
            found.append(sum(times) / len(times))
    most = torch.tensor(sorted(found)[1], device="cuda")
    dist.all_reduce(most, op=dist.ReduceOp.MAX)
    return float(most)


def measured(stack: Stack, pattern: str, rank: int, world: int) -> list[dict[str, Any]]:
    """Rows of one GPU and of the ways to use all."""
    if pattern == "dense":
        whole: Attend = dense
    else:
        whole = lambda q, k, v: attention(q, k, v, pattern, stack.layout)  # noqa: E731
    one = stack.run(whole, None, rank)
    expected = one()
    alone = slowest_ms(one, 0.6)
    rows = [{"way": "one GPU", "step_ms": alone}]
    # Radial attention is cut along frames.
    axis = 0 if pattern.startswith("radial") else parallel.best_axis(stack.layout, world)
    slabs = parallel.Slabs.even(stack.layout, world, axis)
    grid = parallel.Slabs(Layout(stack.layout.grid), slabs.axis, slabs.sizes)
    ways = {"ulysses": parallel.ulysses_attention, "ring" if pattern == "dense" else "halo": parallel.halo_attention}
    for way, how in ways.items():
        attend = Counted(how, pattern, slabs)
        step = stack.run(attend, slabs, rank)
        out, own = step().float(), grid.shard(expected, rank).float()
        error = (out - own).norm() / own.norm()
        del out, own
        moved = attend.moved.sent + attend.moved.shared
        took = slowest_ms(step, 0.6)
        row: dict[str, Any] = {"way": way, "axis": axis, "step_ms": took, "bytes_per_rank": moved}
        row |= {"speedup": alone / took, "efficiency": alone / took / world, "error": float(error)}
        if way != "ulysses":
            row["exchange_ms"] = exchange_ms(stack, pattern, slabs, rank)
            row["wait_ms"] = wait_ms(step)
            row["hidden"] = max(0.0, 1 - row["wait_ms"] / row["exchange_ms"])
        rows.append(row)
    return rows


def main() -> int:
    """Measure until the time is up."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--budget", type=float, default=200, help="seconds after which no case begins")
    parser.add_argument("--only", default="", help="cases whose model, grid or pattern contains this")
    parser.add_argument("--out", type=Path, help="JSON file; its rows of other cases stay")
    chosen = parser.parse_args()
    began = time.monotonic()
    rank = int(os.environ["LOCAL_RANK"])
    torch.cuda.set_device(rank)
    dist.init_process_group("nccl", timeout=datetime.timedelta(seconds=120))
    world = dist.get_world_size()
    report: dict[str, Any] = {"versions": versions(), "ranks": world, "dtype": "bfloat16", "rows": []}
    # On every rank, so that all of them end where the file is of other versions.
    go_on(report, chosen.out, "rows")
    for name, grid, pattern in CASES:
        text = f"{name} {'x'.join(map(str, grid))} {pattern}"
        late = torch.tensor(time.monotonic() - began > chosen.budget, device="cuda", dtype=torch.int32)
        dist.broadcast(late, 0)
        if late or chosen.only not in text:
            continue
        with torch.inference_mode(), sdpa_kernel(
            [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION], set_priority=True
        ):  # fmt: skip
            stack = stack_of(name, grid)
            found = measured(stack, pattern, rank, world)
            share = MODELS[name].share
            del stack
        gc.collect()
        torch.cuda.empty_cache()
        if rank:
            continue
        for row in found:
            row |= {"model": name, "grid": grid, "pattern": pattern, "model_ms": row["step_ms"] / share}
            print(f"{time.monotonic() - began:.0f} s", json.dumps(row), flush=True)
        add_rows(report, found, ("model", "grid", "pattern", "way"), chosen.out, "rows")
    dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main())
