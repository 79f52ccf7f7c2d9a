"""Pieces that the Hopper kernels share: their two groups of warps, layouts of registers, visibility bits."""

# What a kernel takes and returns exists on the GPU only: Python types would say nothing.
# ruff: noqa: ANN001, ANN201

# The language of Triton kernels is not quite Python.
# pyright: reportArgumentType=false, reportGeneralTypeIssues=false, reportAttributeAccessIssue=false, reportCallIssue=false, reportIndexIssue=false, reportOptionalMemberAccess=false, reportAssignmentType=false
from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from visattn.kernels.triton import parts

LN2 = gl.constexpr(0.6931471805599453)
# Rows of one group of four warps, and groups.
GROUP_ROWS = gl.constexpr(64)
GROUPS = gl.constexpr(2)
# Triton up to 3.8 knows the view of shared memory under another name.
RENAMED = gl.constexpr(hasattr(gl.shared_memory_descriptor, "reinterpret"))
# Triton 3.6 knows it under another name.
wait_for_threads = getattr(gl, "barrier", None) or gl.thread_barrier


@gluon.constexpr_function
def product_layout(columns: int) -> gl.NVMMADistributedLayout:
    """Where four warps keep a product [64, columns]."""
    return gl.NVMMADistributedLayout([3, 0], [4, 1], [16, int(columns), 16])


@gluon.constexpr_function
def row_layout(head_dim: int) -> gl.BlockedLayout:
    """Four warps over [64, head dim] so that each row is read in whole lines."""
    return gl.BlockedLayout([1, 8], [256 // int(head_dim), int(head_dim) // 8], [4, 1], [1, 0])


@gluon.jit
def rows_inside(token, d, HEAD_DIM: gl.constexpr, BLOCK_DIM: gl.constexpr):
    """Which elements of rows of tokens are in memory: token -1 is none, and so are channels from HEAD_DIM on."""
    inside = (token >= 0)[:, None]
    if HEAD_DIM != BLOCK_DIM:
        inside = inside & (d < HEAD_DIM)[None, :]
    return inside


@gluon.jit
def view(ring, shape: gl.constexpr, layout: gl.constexpr):
    """Shared memory with another shape and layout."""
    if RENAMED:
        return ring.reinterpret(ring.dtype, shape, layout)
    else:
        return ring._reinterpret(ring.dtype, shape, layout)


place = gluon.jit(parts.place.fn)
dense_run = gluon.jit(parts.dense_run.fn)


@gluon.jit
def following(slot, phase, STAGES: gl.constexpr):
    """The slot of a ring after this one; the phase flips when the ring starts again."""
    last = slot + 1 == STAGES
    return gl.where(last, 0, slot + 1), gl.where(last, phase ^ 1, phase)


@gluon.jit
def half_of_row(halves, row, split, GROUP: gl.constexpr):
    """Where visits need masks for a half of a row tile, the first one that one half sees, and how many each half does.

    The latter come in turns. Those that are full for the second half only keep their masks, which spares its group
    another loop.
    """
    if GROUP == 0:
        split = gl.load(halves + row * 4)
    alone = gl.load(halves + row * 4 + 1)
    turns = (gl.load(halves + row * 4 + 2) - alone) // 2
    return split, alone, turns


@gluon.jit
def visit_of_half(index, alone, turns, GROUP: gl.constexpr):
    """The visit that is the index-th of a half, which leaves every other one out of those that come in turns."""
    return index + gl.minimum(gl.maximum(index - alone + GROUP, 0), turns)


@gluon.jit
def next_left_out(index, alone, turns, GROUP: gl.constexpr):
    """Whether a half leaves out the visit behind its index-th one."""
    number = index - alone + GROUP
    return (number >= 0) & (number < turns)


@gluon.jit
def leave_out(ready, free, at, STAGES: gl.constexpr):
    """Give the slot of a column tile back of which these rows see nothing, once both of its tensors are there.

    `at` is the ring's slot and phase; those that follow are returned.
    """
    slot, phase = at
    mbarrier.wait(ready[0].index(slot), phase)
    mbarrier.wait(ready[1].index(slot), phase)
    # No warp may miss a phase: all have waited before another can begin.
    wait_for_threads()
    mbarrier.arrive(free.index(slot), count=1)
    return following(slot, phase, STAGES)


@gluon.constexpr_function
def bit_layout(columns: int) -> gl.DistributedLinearLayout:
    """`product_layout` of as many columns with these as [8 columns, pair in them, column of a pair]."""
    eights = [[0, 1 << e, 0, 0] for e in range((int(columns) // 8).bit_length() - 1)]
    lanes = [[0, 0, 1, 0], [0, 0, 2, 0], [1, 0, 0, 0], [2, 0, 0, 0], [4, 0, 0, 0]]
    warps = [[16, 0, 0, 0], [32, 0, 0, 0]]
    return gl.DistributedLinearLayout(
        [[0, 0, 0, 1], [8, 0, 0, 0], *eights], lanes, warps, [], [64, int(columns) // 8, 4, 2]
    )


@gluon.jit
def mask_bits(masks, mask, second, first_row, masked, COLUMNS: gl.constexpr, ROWS: gl.constexpr, TILES: gl.constexpr):
    """Visibility bits of a step under the masks of its one or two column tiles: [rows, 4], a word for each thread.

    The bits of a thread of a row lie side by side (`launch.by_threads`). Nothing is loaded if not `masked`.
    """
    layout: gl.constexpr = gl.SliceLayout(1, gl.SliceLayout(3, bit_layout(COLUMNS)))
    rows = first_row + gl.arange(0, GROUP_ROWS, gl.SliceLayout(1, layout))
    own = rows[:, None] * 4 + gl.arange(0, 4, gl.SliceLayout(0, layout))[None, :]
    bits = gl.load(masks + mask.to(gl.int64) * (ROWS * 4) + own, mask=masked, other=0).to(gl.int32)
    if TILES == 2:
        # By an instruction of its own: seen through, it is tested half by half with twice the instructions.
        more = gl.load(masks + second.to(gl.int64) * (ROWS * 4) + own, mask=masked, other=0).to(gl.int32)
        bits = gl.inline_asm_elementwise(
            "prmt.b32 $0, $1, $2, 0x5410;", "=r,r,r", [bits, more], dtype=gl.int32, is_pure=True, pack=1
        )
    return bits


@gluon.jit
def hide_masked(scores, bits, layout: gl.constexpr):
    """Scores with -inf where their bit of `mask_bits` is not set: one test of a constant bit a score."""
    columns: gl.constexpr = scores.shape[1]
    wide: gl.constexpr = bit_layout(columns)
    eight = gl.arange(0, columns // 8, gl.SliceLayout(0, gl.SliceLayout(2, gl.SliceLayout(3, wide))))
    side = gl.arange(0, 2, gl.SliceLayout(0, gl.SliceLayout(1, gl.SliceLayout(2, wide))))
    tested = 1 << (eight[None, :, None, None] * 2 + side[None, None, None, :])
    seen = (bits[:, None, :, None] & tested) != 0
    seen = gl.convert_layout(seen.reshape(scores.shape[0], columns), layout, assert_trivial=True)
    return gl.where(seen, scores, float("-inf"))


@gluon.jit
def hide_behind(scores, run, runs, layout: gl.constexpr):
    """Scores of a step with -inf behind the end of the run-th run of dense tokens; steps before 0 are none."""
    prefix_tiles, suffix_tiles, prefix, suffix_start, suffix, extra = runs
    columns: gl.constexpr = scores.shape[1]
    first, end = dense_run(run, prefix_tiles, suffix_tiles, prefix, suffix_start, suffix, extra, columns)
    if (run >= 0) & (first + columns > end):
        # Split as in `hide_masked`: one number a thread against constants.
        column = gl.arange(0, columns, gl.SliceLayout(0, layout))
        inside = end - first - (column & 6) > (column & 121)
        scores = gl.where(inside[None, :], scores, float("-inf"))
    return scores
