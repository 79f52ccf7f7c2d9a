"""Correctness of the FlashAttention-4 backend on a real GPU.

    python3 -m scripts.check.fa4_gpu [--jobs 8] [--only TEXT ...] [--budget 200]

Forward, log-sum-exp and gradients against the float64 reference: every form of masks, lists by head, grouped heads,
text, keys on another grid, head dims 32 to 128. Prints a line a case and what compiling took; what is left of the cases
when the budget of seconds is spent is not begun. Exit status 1 if anything is off.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time

import torch

from scripts.check.lists_gpu import Case, check
from scripts.gpu_common import itself, versions
from visattn import Layout
from visattn.dispatch import load
from visattn.kernels.fa4 import package

JOINT, CLIP = Layout((30, 37), prefix=7, suffix=77), Layout((7, 20, 13), suffix=50)
CASES = [
    # Strided windows whose tiles see whole tiles, sliding ones, others: the forms of masks, where most is decided.
    Case("na(window=16x16,stride=8x8)", Layout((64, 56), 70), dim=128),
    Case("na(window=13x13)", JOINT, dim=128, kv_heads=2),
    Case("clear(radius=9,pool=4)", Layout((38, 41), suffix=300), dim=128),
    Case("na(window=5x9x9)", CLIP, dim=128),
    Case("dense", Layout(1500, prefix=5), dim=128),
    Case("na(window=13x13)", JOINT, dim=64),
    Case("topk(keep=0.2,block=8x16)", Layout((48, 64), prefix=7, suffix=130), dim=128, kv_heads=2),
    Case("perhead(heads={0: na(window=25x25), 2: dense}, rest=na(window=9x9))", JOINT, dim=128),
    Case("radial(decay=0.5)", Layout((8, 16, 16)), dim=128),
    Case("na(window=300)", Layout(1333, suffix=70), dim=128),
    Case("clear(radius=12)", JOINT, "fp16", dim=64, kv_heads=1),
    Case("na(window=9x9)", Layout((36, 40), 1, 0, Layout((18, 20), 0, 77)), dim=128),
    Case("na(window=13x13)", JOINT, dim=32),
    Case("na(window=13x13)", JOINT, "fp16", dim=128, heads_first=True),
    Case("na(window=5x9x9,causal=true)", CLIP, dim=96, kv_heads=2),
    Case("halo(block=7x7,halo=3)", Layout((35, 42), 5), dim=64),
    Case("na(window=7x7,dilation=2)", Layout((40, 33), prefix=1), dim=96),
    Case("na(window=13x13,circular=0x1)", Layout((36, 72), 3), dim=64),
    Case("perhead(heads={1: clear(radius=5)}, rest=na(window=9x9))", JOINT, dim=64),
    Case("radial(decay=0.2)", Layout((6, 15, 20), prefix=20), dim=64),
    Case("topp(p=0.5,block=128)", Layout((32, 40), suffix=130), dim=64),
]


def main() -> int:
    """Check all cases, in several processes if asked: most of the time goes into compiling."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--only", nargs="+", default=[""], help="cases whose text contains one of these")
    parser.add_argument("--budget", type=float, default=200, help="seconds after which no case is begun")
    parser.add_argument("--shard", default="0/1", help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    end = time.perf_counter() + chosen.budget
    if chosen.jobs > 1:
        command = itself("--only", *chosen.only, "--budget", str(chosen.budget), "--shard")
        running = [subprocess.Popen([*command, f"{i}/{chosen.jobs}"]) for i in range(chosen.jobs)]
        return max(abs(p.wait()) for p in running)
    index, of = map(int, chosen.shard.split("/"))
    support = load("fa4").available()
    if index == 0:
        print(versions(), package.version(), support, flush=True)
    if not support.ok:
        return 1
    torch.backends.cuda.matmul.allow_tf32 = False
    picked = [case for case in CASES if any(text in str(case) for text in chosen.only)][index::of]
    right = begun = 0
    for case in picked:
        if time.perf_counter() > end:
            break
        begun, began = begun + 1, time.perf_counter()
        try:
            right += not check(case, "fa4", repeats=False)
        except Exception as error:
            print(f"FAILED {case}: {type(error).__name__}: {str(error)[:1000]}", flush=True)
        print(f"    {time.perf_counter() - began:.1f} s with compiling", flush=True)
    print(f"shard {index}/{of}: {right} of {begun} right, {len(picked) - begun} not begun", flush=True)
    if index == 0:
        print(load("fa4").compiled(), flush=True)
    return int(right < begun)


if __name__ == "__main__":
    sys.exit(main())
