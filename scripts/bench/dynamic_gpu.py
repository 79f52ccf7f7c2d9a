"""What dynamic patterns cost on a GPU: choosing, and the kernels along their lists, against cuDNN's dense attention.

    python -m scripts.bench.dynamic_gpu --out docs/results/h200-dynamic.json

For each case, 24 heads of 128 in bfloat16, medians of CUDA events in turns: the whole call, the choice alone, the
kernel along lists that are held, and dense attention; forward, and with --backward the backward. q and k are noise:
their lists are spread over all keys, which is the worst for caches. --profile says instead what a call keeps the host
for.
"""

from __future__ import annotations

import argparse
import cProfile
import json
import pstats
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.nn.attention import SDPBackend

from scripts.bench.gpu import DIM, HEADS, compared, dense_by, in_turns
from scripts.gpu_common import go_on, versions
from visattn import Layout, attention, parse, tile_choice
from visattn.files import write_json
from visattn.kernels.triton.backend import kernels_of
from visattn.kernels.triton.choosing.skipped import SkippingLists
from visattn.kernels.triton.lists.program import Program, program
from visattn.kernels.triton.prepared import Kernels
from visattn.kernels.triton.routes import MergedLists
from visattn.patterns import DynamicPattern
from visattn.plans import with_routes
from visattn.problem import Call

CASES: dict[str, tuple[str, Layout]] = {
    "image, 10 %": ("topk(keep=0.1)", Layout((256, 256))),
    "image, 10 %, parts": ("topk(keep=0.1, score=parts(4x4))", Layout((256, 256))),
    "image, 10 %, 128 x 64": ("topk(keep=0.1, block=8x16, key_block=8x8)", Layout((256, 256))),
    "image, 10 %, blocks of 128": ("topk(keep=0.1, block=8x16)", Layout((256, 256))),
    "small image, 10 %, 128 x 64": ("topk(keep=0.1, block=8x16, key_block=8x8)", Layout((64, 64))),
    "image, 50 %": ("topk(keep=0.5)", Layout((256, 256))),
    "image, 50 %, 128 x 64": ("topk(keep=0.5, block=8x16, key_block=8x8)", Layout((256, 256))),
    "image, topp": ("topp(p=0.5, most=0.5)", Layout((256, 256))),
    "video, 10 %": ("topk(keep=0.1)", Layout((30, 45, 88))),
    "video, 10 %, 128 x 64": ("topk(keep=0.1, block=2x8x8, key_block=1x8x8)", Layout((30, 45, 88))),
    "image, 10 %, 128 x 64, means": ("topk(keep=0.1, block=8x16, key_block=8x8, rest=mean)", Layout((256, 256))),
    "video, 10 %, blocks of 128": ("topk(keep=0.1, block=4x4x8)", Layout((30, 45, 88))),
    # Blocks of an eighth and a quarter of the keys, and what they are compared with.
    "image, 10 %, slope": ("topk(keep=0.1, rest=slope)", Layout((256, 256))),
    "image, 10 %, slope, 64 x 16": ("topk(keep=0.1, block=8x8, key_block=4x4, rest=slope)", Layout((256, 256))),
    "video, 10 %, slope": ("topk(keep=0.1, rest=slope)", Layout((30, 45, 88))),
    "video, 10 %, slope, 64 x 16": ("topk(keep=0.1, block=4x4x4, key_block=2x2x4, rest=slope)", Layout((30, 45, 88))),
    "video, 10 %, slope, 64 x 8": ("topk(keep=0.1, block=4x4x4, key_block=2x2x2, rest=slope)", Layout((30, 45, 88))),
    # Every query token chooses, and those of a tile share what it visits.
    "tokens, 10 %": ("topk(keep=0.1, block=1x1, key_block=8x8)", Layout((128, 128))),
    # Dense attention with the test in the loop: one that passes over nothing, and one that does.
    "levels, passes over nothing": ("topk(keep=1.0, block=8x8, always=none, skip=1e-30)", Layout((128, 128))),
    "levels, passes over": ("topk(keep=1.0, block=8x8, always=none, skip=0.01)", Layout((128, 128))),
}
# Of the cases with such names, q and k have a level of this size for each block of 8x8: products of blocks differ.
LEVEL = 2.0


class Fixed:
    """The lists that the first head chooses, as those of a fixed pattern that all heads share.

    Args:
        kernels: The kernels of the call.
        pattern: The pattern.
        q: Queries.
        k: Keys.
        v: Values.
    """

    def __init__(
        self, kernels: Kernels, pattern: DynamicPattern, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor
    ) -> None:
        work = kernels.work(q, k, v)
        made = work.plan("forward")
        plan = with_routes(made, pattern.route(q, k, made))
        self._program = program(plan, False, work.configs["forward"].per_step, q.device)

    def program(self, direction: str) -> Program:
        """The lists that the forward walks."""
        assert direction == "forward"
        return self._program

    def addresses(self, direction: str) -> list[int]:
        """Where they are."""
        run = self.program(direction)
        return [run.bounds.data_ptr(), run.bases.data_ptr(), run.mask_ids.data_ptr()]


def listed(kernels: Kernels, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
    """Choose, and write the lists that the forward walks."""
    routed = kernels.lists(q, k, v, None, False)
    if not isinstance(routed, SkippingLists):
        routed.addresses("forward")


def host_us(run: Callable[[], object]) -> float:
    """What a call keeps the host, which does not wait for the device: the median of some."""
    torch.cuda.synchronize()
    found = []
    for _ in range(20):
        start = time.perf_counter()
        run()
        found.append(time.perf_counter() - start)
    torch.cuda.synchronize()
    return 1e6 * statistics.median(found)


def profiled(name: str) -> None:
    """Print the Python functions that the host spends most time in, over some calls."""
    text, layout = CASES[name]
    q, k, v = inputs_of(name, layout)
    with torch.no_grad():
        for _ in range(3):
            attention(q, k, v, text, layout, backend="triton")
        torch.cuda.synchronize()
        seen = cProfile.Profile()
        seen.enable()
        for _ in range(20):
            attention(q, k, v, text, layout, backend="triton")
        seen.disable()
        torch.cuda.synchronize()
    print(name, flush=True)
    pstats.Stats(seen).sort_stats("tottime").print_stats(25)


def inputs_of(name: str, layout: Layout) -> list[torch.Tensor]:
    """Queries, keys and values."""
    made = torch.Generator("cuda").manual_seed(0)
    found = list(torch.randn((3, 1, layout.length, HEADS, DIM), generator=made, device="cuda", dtype=torch.bfloat16))
    if name.startswith("levels"):
        height, width = (n // 8 for n in layout.grid)
        for x in found[:2]:
            level = torch.randn((height, 1, width, 1, HEADS, DIM), generator=made, device="cuda", dtype=x.dtype)
            x.view(height, 8, width, 8, HEADS, DIM).add_(level, alpha=LEVEL)
    return found


def measured(name: str, backward: bool) -> dict[str, Any]:
    """Times of one case in milliseconds."""
    text, layout = CASES[name]
    pattern = parse(text)
    assert isinstance(pattern, DynamicPattern)
    q, k, v = inputs = inputs_of(name, layout)
    call = Call(pattern, layout, DIM**-0.5)
    # What a kernel has got ready for lists per head is not for one list.
    kernels, fixed = (kernels_of(q, k, v, call, lambda: None) for _ in range(2))
    ours = lambda q, k, v: attention(q, k, v, pattern, layout, backend="triton")  # noqa: E731
    with torch.no_grad():
        routed = kernels.lists(q, k, v, None, False)
        timed = {
            "choosing": partial(pattern.choose, q, k, layout),
            "choosing_and_lists": partial(listed, kernels, q, k, v),
            "kernel": partial(kernels.forward, q, k, v, None, None, False, routed),
        }
        # One list is for whole tiles: where several blocks share them, no fixed pattern is like it.
        if not isinstance(routed, MergedLists):
            held = Fixed(fixed, pattern, q, k, v)
            timed["kernel_fixed"] = partial(fixed.forward, q, k, v, None, None, False, held)
        parts = in_turns(timed)
    dense = dense_by(SDPBackend.CUDNN_ATTENTION, inputs)
    if backward:
        times = compared({"ours": (ours, inputs), "cudnn": dense})
    else:
        with torch.no_grad():
            both = in_turns({"ours": partial(ours, q, k, v), "cudnn": partial(dense[0], *dense[1])})
        times = {who: {"forward_ms": ms} for who, ms in both.items()}
    with torch.no_grad():
        host = host_us(partial(ours, q, k, v))
    density = tile_choice(q, k, pattern, layout).float().mean().item()
    result = {"pattern": text, "layout": str(layout), "density": density, "parts_ms": parts, "host_us": host, **times}
    result["speedup"] = times["cudnn"]["forward_ms"] / times["ours"]["forward_ms"]
    result["choosing_share"] = parts["choosing_and_lists"] / times["ours"]["forward_ms"]
    result["peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
    print(name, json.dumps(result), flush=True)
    return result


def main() -> None:
    """Measure the cases and write what was found after each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="JSON file; what it has of other cases stays")
    parser.add_argument("--profile", action="store_true", help="say what the host does, and measure nothing")
    parser.add_argument("--only", default="", help="cases whose name contains this")
    parser.add_argument("--backward", action="store_true", help="time the backward too")
    given = parser.parse_args()
    found: dict[str, Any] = {"versions": versions(), "heads": HEADS, "head_dim": DIM, "dtype": "bfloat16", "cases": {}}
    if not given.profile:
        go_on(found, given.out)
    for name in CASES:
        if given.only in name and given.profile:
            profiled(name)
        elif given.only in name:
            torch.cuda.reset_peak_memory_stats()
            found["cases"][name] = measured(name, given.backward)
            print(name, json.dumps(found["cases"][name]), flush=True)
            if given.out is not None:
                write_json(given.out, found)


if __name__ == "__main__":
    main()
