"""Which launch of the kernels that read every token once is the fastest on a GPU, and how far it is from a copy.

    python -m scripts.bench.branch_gpu --jobs 8 --out docs/results/h200-branch.json

The kernels beside the attention of a call of `sla`: means of blocks (which choose), states of keys and values, and
their reading for every query. 24 heads of 128, bf16, 256x256 tokens behind 512 of text, values as a part of a wider
projection as models have them. `tb_s` counts what has to be read and written once; `copy` is torch's copy of a tensor
of the size of q. Names have the warps of a program, the stages of its loop, tokens of a step, and programs of a
multiprocessor (states) or steps of a program (reading). Whole calls, without text, and cuDNN's take turns of their own.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.nn.attention import SDPBackend

from scripts.bench.gpu import dense_by, in_turns
from scripts.bench.hybrid_gpu import random_parameters
from scripts.gpu_common import compile_first, go_on, versions
from visattn import Layout, attention, parse
from visattn.files import written_whole
from visattn.kernels.triton.choosing.choose import part_tokens
from visattn.kernels.triton.choosing.means import part_means
from visattn.kernels.triton.hybrid import linear as hybrid
from visattn.kernels.triton.hybrid.join import join_states
from visattn.kernels.triton.hybrid.states import group_states
from visattn.kernels.triton.start import launch
from visattn.patterns import HybridPattern

HEADS, DIM = 24, 128
LAYOUT = Layout((256, 256), prefix=512)
BOX = (8, 8)
# What values lie among: q, k, v and the MLP of a single block of FLUX.
PARTS = 7
# Warps, stages, tokens of a step, programs of a multiprocessor.
STATES = [
    (8, 2, 64, 1), (8, 3, 64, 1), (8, 4, 64, 1), (8, 2, 32, 2), (8, 3, 32, 2), (8, 4, 32, 2), (8, 3, 32, 4),
    (4, 3, 16, 2),
]  # fmt: skip
# Warps, stages, queries of a step, steps of a program.
READING = [
    (8, 1, 32, 4), (8, 2, 32, 16), (8, 3, 32, 4), (8, 3, 32, 16), (8, 4, 32, 16), (8, 3, 32, 32), (8, 3, 64, 16),
    (4, 1, 16, 8), (4, 2, 16, 16), (4, 3, 16, 16), (4, 4, 16, 32), (4, 2, 32, 16), (4, 3, 32, 16),
]  # fmt: skip
# Warps.
MEANS = [1, 2, 4]


def inputs() -> tuple[torch.Tensor, ...]:
    """Grid tokens of q, k, v and the softmax branch's output."""
    made = torch.Generator("cuda").manual_seed(0)
    shape = (1, LAYOUT.length, HEADS, DIM)
    q, k, out = (torch.randn(shape, generator=made, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    wide = torch.randn(1, LAYOUT.length, PARTS, HEADS, DIM, generator=made, device="cuda", dtype=torch.bfloat16)
    return tuple(x[:, LAYOUT.prefix :] for x in (q, k, wide[:, :, 2], out))


def states(k: torch.Tensor, v: torch.Tensor, warps: int, stages: int, rows: int, resident: int) -> Callable[[], Any]:
    """A launch of `group_states`."""
    units = torch.cuda.get_device_properties(k.device).multi_processor_count
    slots = -(-k.shape[1] // max(1, resident * units // HEADS))
    slots = -(-slots // rows) * rows
    groups = -(-k.shape[1] // slots)
    given = hybrid.states_arguments(k, v, None, (groups, slots), None, "softmax") | {"ROWS": rows}
    return partial(launch, group_states, (groups, HEADS, 1), given, warps, stages)


def reading(q: torch.Tensor, out: torch.Tensor, warps: int, stages: int, rows: int, steps: int) -> Callable[[], Any]:
    """A launch of `join_states`."""
    state = torch.zeros(1, HEADS, 1, DIM, DIM, device="cuda", dtype=torch.bfloat16)
    sums = torch.ones(1, HEADS, 1, DIM, device="cuda")
    given = hybrid.join_arguments(q, out, state, sums, None, torch.zeros(DIM, device="cuda"), None, "softmax")
    groups = -(-q.shape[1] // (rows * steps))
    given |= {"ROWS": rows, "slots": rows * steps, "groups": groups, "STAGES": stages}
    return partial(launch, join_states, (groups, HEADS, 1), given, warps, stages)


def means(x: torch.Tensor, warps: int) -> Callable[[], Any]:
    """A launch of `part_means`."""
    tokens = part_tokens(LAYOUT.grid, BOX, 1, x.device)
    parts, slots = tokens.shape
    given = {
        "x": x, "out": torch.empty(1, HEADS, parts, DIM, device="cuda"), "rounded": tokens,
        "tokens": tokens, "valid": tokens,
        "counts": torch.empty(1, parts, dtype=torch.int32, device="cuda"),
        "x_batch": x.stride(0), "x_token": x.stride(1), "x_head": x.stride(2), "valid_batch": 0,
        "scale": 1.0, "heads": HEADS, "parts": parts, "slots": slots,
        "HEAD_DIM": DIM, "BLOCK_DIM": DIM, "VALID": False, "SLOTS": slots, "ROUNDED": False,
    }  # fmt: skip
    return partial(launch, part_means, (parts, HEADS, 1), given, warps, None)


def contenders() -> dict[str, tuple[Callable[[], Any], int]]:
    """All launches by name, and how many tensors of the size of q each reads and writes."""
    q, k, v, out = inputs()
    target = torch.empty_like(q)
    found: dict[str, tuple[Callable[[], Any], int]] = {"copy": (lambda: target.copy_(q), 2)}
    found |= {f"means {n}": (means(k, n), 1) for n in MEANS}
    found |= {f"states {'x'.join(map(str, how))}": (states(k, v, *how), 2) for how in STATES}
    # Its sums go on from call to call, and stay finite.
    found |= {f"reading {'x'.join(map(str, how))}": (reading(q, out, *how), 3) for how in READING}
    return found


def calls() -> dict[str, Callable[[], Any]]:
    """Whole calls, and dense attention."""
    layout, pattern = Layout(LAYOUT.grid), parse("sla(keep=0.05, block=8x16, key_block=8x8)")
    assert isinstance(pattern, HybridPattern)
    made = torch.Generator("cuda").manual_seed(0)
    shape = (3, 1, layout.length, HEADS, DIM)
    inputs = list(torch.randn(shape, generator=made, device="cuda", dtype=torch.bfloat16))
    ours = partial(attention, *inputs, pattern, layout, parameters=random_parameters(pattern, layout))
    front = partial(attention, *inputs, pattern.front, layout)
    dense, given = dense_by(SDPBackend.CUDNN_ATTENTION, inputs)
    found: dict[str, Callable[[], Any]] = {"cudnn": partial(dense, *given)}
    for precision in (None, "fp8", "int8"):
        name = precision or "bf16"
        found |= {name: partial(ours, precision=precision), f"front {name}": partial(front, precision=precision)}
    return found


def main() -> int:
    """Compile, then time in turns."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=1, help="processes that compile first")
    parser.add_argument("--out", type=Path, help="JSON file, which is gone on with")
    parser.add_argument("--compile", default="", help=argparse.SUPPRESS)
    given = parser.parse_args()
    report: dict[str, Any] = {
        "versions": versions(), "heads": HEADS, "head_dim": DIM, "dtype": "bfloat16", "cases": {},
    }  # fmt: skip
    if given.compile:
        index, of = map(int, given.compile.split("/"))
        every = [run for run, _ in contenders().values()]
        with torch.inference_mode():
            for run in itertools.islice([*every, *calls().values()], index, None, of):
                run()
        return 0
    go_on(report, given.out)
    if given.jobs > 1:
        compile_first(given.jobs)
    begin = time.perf_counter()
    found = contenders()
    each = LAYOUT.tokens * HEADS * DIM * 2
    for name, ms in in_turns({name: run for name, (run, _) in found.items()}).items():
        report["cases"][name] = {"ms": ms, "tb_s": found[name][1] * each / ms / 1e9}
        print(f"{name:24} {ms:8.4f} ms {report['cases'][name]['tb_s']:6.2f} TB/s")
    # What they hold is no longer needed.
    del found
    torch.cuda.empty_cache()
    with torch.inference_mode():
        for name, ms in in_turns(calls()).items():
            report["cases"][f"call {name}"] = {"ms": ms}
            print(f"call {name:19} {ms:8.4f} ms")
    print(json.dumps({"seconds": time.perf_counter() - begin} | report["versions"]), flush=True)
    if given.out is not None:
        given.out.parent.mkdir(parents=True, exist_ok=True)
        with written_whole(given.out) as path:
            path.write_text(json.dumps(report, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
