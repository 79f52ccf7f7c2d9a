"""Times the CPU engine against dense SDPA and NATTEN, in turns in one process, and checks memory and linearity.

    python -m scripts.bench.cpu --json bench_cpu.json

Wall clock on two threads is what counts, on an idle machine. On a busy one every parallel operator waits for a thread
that lost its core, and an engine of many small operators waits most: --cpu-time measures the processor seconds of one
thread instead.

Every ratio is a peer's median over ours; the range beside it comes from the quartiles of both. "flop bound" is what
the visible pairs alone would allow, "tile bound" what the pairs that the engine visits allow.
"""

import argparse
import math
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention

from visattn import Layout, attention
from visattn.environment import versions
from visattn.files import check_writable_file, write_json
from visattn.kernels.tiles.backend import visited_pairs
from visattn.patterns import ListedPattern, Pattern, parse
from visattn.plans import plan
from visattn.timing import Timing, interleave

Clock = Callable[[], float]

HEADS, DIM = 4, 64
LINEAR_GRIDS = (32, 64, 128, 256, 512)


@dataclass(frozen=True)
class Case:
    """One row of the table.

    Attributes:
        pattern: What runs.
        grid: Where.
        reach: The ratio to reach.
        mode: "forward", "train" (forward and backward), "natten" (peer NATTEN instead of dense SDPA) or "bfloat16"
            (peer our own float32).
    """

    pattern: str
    grid: tuple[int, ...]
    reach: float
    mode: str = "forward"

    @property
    def name(self) -> str:
        """Pattern, grid and mode."""
        mode = {"train": ", forward + backward", "natten": ", against NATTEN", "bfloat16": ", bfloat16 against float32"}
        return f"{self.pattern} on {'x'.join(map(str, self.grid))}{mode.get(self.mode, '')}"


CASES = (
    Case("na(window=15x15)", (64, 64), 4),
    Case("routing(regions=8x8, topk=4)", (64, 64), 6),
    Case("na(window=6x12x12)", (12, 32, 32), 3.5),
    Case("na(window=15x15)", (128, 128), 18),
    Case("na(window=16x16, stride=8x8)", (128, 128), 25),
    Case("clear(radius=16)", (128, 128), 6),
    Case("agent(agents=7x7)", (128, 128), 60),
    Case("na(window=15x15)", (128, 128), 12, "train"),
    Case("na(window=7x7)", (32, 32), 100, "natten"),
    Case("na(window=5x5x5)", (16, 16, 16), 100, "natten"),
    Case("na(window=15x15)", (128, 128), 1, "bfloat16"),
)
QUICK = ((64, 64), (32, 32))


def tensors(grid: tuple[int, ...], dtype: torch.dtype = torch.float32, grad: bool = False) -> list[torch.Tensor]:
    """Random q, k and v [1, tokens, HEADS, DIM]."""
    shape = (1, math.prod(grid), HEADS, DIM)
    return [torch.randn(shape).to(dtype).requires_grad_(grad) for _ in range(3)]


def ours(case: Case, dtype: torch.dtype = torch.float32) -> Callable[[], object]:
    """One run of our attention."""
    pattern, layout, train = parse(case.pattern), Layout(case.grid), case.mode == "train"
    q, k, v = tensors(case.grid, dtype, train)
    backend = "tiles" if isinstance(pattern, ListedPattern) else "auto"

    def run() -> object:
        out = attention(q, k, v, pattern, layout, backend=backend)
        return torch.autograd.grad(out, (q, k, v), out.detach()) if train else out

    return run


def peer(case: Case) -> Callable[[], object]:
    """One run of what a case is compared with."""
    if case.mode == "bfloat16":
        return ours(case)
    q, k, v = tensors(case.grid, grad=case.mode == "train")
    if case.mode == "natten":
        import natten

        run_natten = getattr(natten, f"na{len(case.grid)}d")
        window = parse(case.pattern).axes(case.grid)[0][0]  # pyright: ignore[reportAttributeAccessIssue]
        return lambda: run_natten(*(t.unflatten(1, case.grid) for t in (q, k, v)), kernel_size=window)
    heads_first = [t.transpose(1, 2).detach().contiguous().requires_grad_(t.requires_grad) for t in (q, k, v)]

    def run() -> object:
        out = scaled_dot_product_attention(heads_first[0], heads_first[1], heads_first[2])
        return torch.autograd.grad(out, heads_first, out.detach()) if case.mode == "train" else out

    return run


def tile_bound(pattern: Pattern, layout: Layout) -> float | None:
    """Dense pairs over the pairs that the engine visits."""
    return layout.pairs / visited_pairs(pattern, layout) if isinstance(pattern, ListedPattern) else None


def measure(cases: list[Case], repeats: int, clock: Clock) -> list[dict[str, Any]]:
    """The rows of cases that share a peer, all of them in turns."""
    runs = {case.name: ours(case, torch.bfloat16 if case.mode == "bfloat16" else torch.float32) for case in cases}
    timings = interleave({"peer": peer(cases[0]), **runs}, repeats=repeats, clock=clock)
    return [row(case, timings["peer"], timings[case.name]) for case in cases]


def row(case: Case, other: Timing, own: Timing) -> dict[str, Any]:
    """One line of the table."""
    pattern, layout = parse(case.pattern), Layout(case.grid)
    listed = isinstance(pattern, ListedPattern)
    return {
        "case": case.name,
        "flop_bound": plan(pattern, layout).flop_bound if listed else None,
        "tile_bound": tile_bound(pattern, layout),
        "reach": case.reach,
        "ratio": other.median / own.median,
        "ratio_low": other.spread[0] / own.spread[1],
        "ratio_high": other.spread[1] / own.spread[0],
        "ms": own.median * 1e3,
        "peer_ms": other.median * 1e3,
    }


def linearity(sides: tuple[int, ...], repeats: int, clock: Clock) -> list[dict[str, float]]:
    """Time per token of one window on growing grids."""
    cases = {side: Case("na(window=15x15)", (side, side), 0) for side in sides}
    timings = interleave({str(side): ours(case) for side, case in cases.items()}, repeats=repeats, clock=clock)
    return [
        {"tokens": side**2, "ms": t.median * 1e3, "us_per_token": t.median * 1e6 / side**2}
        for side, t in zip(sides, timings.values(), strict=True)
    ]


MEMORY_PROGRAM = """
import resource, torch
from visattn import Layout, attention
torch.set_num_threads({threads})
page = resource.getpagesize()
q, k, v = (torch.ones(1, 128 * 128, {heads}, {dim}) for _ in range(3))
small = [t[:, :1024] for t in (q, k, v)]
attention(*small, "na(window=15x15)", Layout((32, 32)), backend="tiles")
before = int(open("/proc/self/statm").read().split()[1]) * page
open("/proc/self/clear_refs", "w").write("5")
attention(q, k, v, "na(window=15x15)", Layout((128, 128)), backend="tiles")
peak = next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith("VmHWM"))
print((peak - before) / (4 * q.numel() * q.element_size()))
"""


def memory(threads: int) -> float:
    """Peak memory of a 128x128 forward above what was there before, over the size of q, k, v and out (Linux)."""
    program = MEMORY_PROGRAM.format(threads=threads, heads=HEADS, dim=DIM)
    return float(subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True).stdout)


def show(rows: list[dict[str, Any]]) -> None:
    """Print lines of the table."""
    for r in rows:
        bounds = "  ".join(f"{r[key]:6.1f}" if r[key] else "     -" for key in ("flop_bound", "tile_bound"))
        ratio = f"{r['ratio']:7.1f} {'({ratio_low:.1f} to {ratio_high:.1f})'.format(**r):18}"
        print(f"{r['case']:58} {bounds}  {r['reach']:5}  {ratio} {r['ms']:9.1f} {r['peer_ms']:10.1f}", flush=True)


def main() -> None:
    """Run what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="also write the figures here")
    parser.add_argument("--quick", action="store_true", help="small grids only")
    parser.add_argument("--only", default="", help="cases whose name contains this")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--cpu-time", action="store_true", help="processor seconds of one thread, for a busy machine")
    parser.add_argument("--force", action="store_true", help="overwrite the JSON file")
    args = parser.parse_args()
    try:
        if args.json:
            check_writable_file(args.json, (".json",), args.force)
    except ValueError as error:
        parser.error(str(error))
    threads, clock = (1, time.thread_time) if args.cpu_time else (args.threads, time.perf_counter)
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    cases = [c for c in CASES if args.only in c.name and (not args.quick or c.grid in QUICK)]
    print(f"{'case':58} {'flop':>6}  {'tile':>6}  reach  {'ratio':>7} {'':18} {'ms':>9} {'peer ms':>10}")
    rows: list[dict[str, Any]] = []
    for key in dict.fromkeys((c.grid, c.mode) for c in cases):
        rows += measure([c for c in cases if (c.grid, c.mode) == key], args.repeats, clock)
        show(rows[-sum((c.grid, c.mode) == key for c in cases) :])
    result = {
        "versions": versions(),
        "threads": threads,
        "clock": clock.__name__,
        "cases": [asdict(c) for c in cases],
        "rows": rows,
    }
    if not args.only:
        result["linearity"] = linearity(LINEAR_GRIDS[:2] if args.quick else LINEAR_GRIDS, args.repeats, clock)
        for line in result["linearity"]:
            print(f"{line['tokens']:8.0f} tokens {line['ms']:9.1f} ms {line['us_per_token']:7.2f} us per token")
        result["memory"] = memory(threads)
        print(f"peak extra memory at 128x128: {result['memory']:.2f} x (q + k + v + out)")
    if args.json:
        write_json(args.json, result)


if __name__ == "__main__":
    main()
