"""What compute-sanitizer's racecheck says of the smallest kernel whose warps hand memory over by mbarriers.

    python3 -m scripts.check.sanitize_control_gpu             # first: compiles, checks the sums
    compute-sanitizer --tool racecheck python3 -m scripts.check.sanitize_control_gpu

One warp fills a slot of shared memory again and again, four others add up what is in it; two mbarriers say when the
slot is full and when it is free, so the order is fixed. Hazards that racecheck reports here are not ones: it does not
follow these barriers, and its reports on kernels that use them, as the Hopper kernels do, prove nothing.
"""

# What a kernel takes and returns exists on the GPU only: Python types would say nothing.
# ruff: noqa: ANN001, ANN201, ANN202

# The language of Triton kernels is not quite Python.
# pyright: reportArgumentType=false, reportAssignmentType=false, reportGeneralTypeIssues=false, reportAttributeAccessIssue=false, reportCallIssue=false, reportIndexIssue=false
from __future__ import annotations

import argparse
import sys
from typing import Any

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier

TURNS = 10


@gluon.jit
def _fill(x, slot, full, free, turns):
    layout: gl.constexpr = gl.BlockedLayout([2], [32], [1], [0])
    for i in range(0, turns):
        row = gl.load(x + i * 64 + gl.arange(0, 64, layout))
        mbarrier.wait(free.index(0), (i & 1) ^ 1)
        slot.index(0).store(row)
        mbarrier.arrive(full.index(0), count=1)


@gluon.jit
def _add(out, slot, full, free, turns):
    layout: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    total = gl.zeros([64], gl.float32, layout)
    for i in range(0, turns):
        mbarrier.wait(full.index(0), i & 1)
        total += slot.index(0).load(layout)
        mbarrier.arrive(free.index(0), count=1)
    gl.store(out + gl.arange(0, 64, layout), total)


@gluon.jit
def add_rows(x, out, turns):
    """Sum of the rows of x [turns, 64]."""
    slot = gl.allocate_shared_memory(gl.float32, [1, 64], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    full = gl.allocate_shared_memory(gl.int64, [1, 1], mbarrier.MBarrierLayout())
    free = gl.allocate_shared_memory(gl.int64, [1, 1], mbarrier.MBarrierLayout())
    mbarrier.init(full.index(0), count=1)
    mbarrier.init(free.index(0), count=1)
    fence_async_shared()
    gl.warp_specialize([(_add, (out, slot, full, free, turns)), (_fill, (x, slot, full, free, turns))], [1], [24])


def main() -> int:
    """Run it once; exit status 1 if a sum is wrong."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    x, out = torch.arange(64.0 * TURNS, device="cuda").view(TURNS, 64), torch.zeros(64, device="cuda")
    kernel: Any = add_rows
    kernel[(1,)](x, out, TURNS, num_warps=4)
    right = torch.equal(out, x.sum(0))
    print("right" if right else f"wrong: {out}")
    return int(not right)


if __name__ == "__main__":
    sys.exit(main())
