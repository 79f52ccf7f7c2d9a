"""Pieces that the Hopper kernels share: their two groups of warps, layouts of registers, visibility bits."""

# What a kernel takes and returns exists on the GPU only: Python types would say nothing. Tuples are joined by +, which
# is what Triton knows.
# ruff: noqa: ANN001, ANN201, RUF005

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


@gluon.jit
def mask_words(masks, mask_ids, i, first_row, masked, layout: gl.constexpr, SIZES: gl.constexpr):
    """Visibility bits of the column tiles from list entry i, 32 columns a word: a [rows] for each word of the step.

    Nothing is loaded if not `masked`.
    """
    ROWS: gl.constexpr = SIZES[1]
    TILES: gl.constexpr = SIZES[3]
    WORDS: gl.constexpr = SIZES[2] // TILES // 32
    rows = first_row + gl.arange(0, GROUP_ROWS, gl.SliceLayout(1, layout))
    words = ()
    for tile in gl.static_range(0, TILES):
        mask = gl.load(mask_ids + i + tile, mask=masked, other=0).to(gl.int64)
        for w in gl.static_range(0, WORDS):
            words = words + (gl.load(masks + (mask * ROWS + rows) * WORDS + w, mask=masked, other=0),)
    return words


@gluon.jit
def hide_masked(scores, words, layout: gl.constexpr):
    """Scores with -inf where their bit in the words of `mask_words` is not set.

    Bits 1 and 2 of a column differ between the threads of a row, the others are known to the compiler: so split,
    each score takes one test of a constant bit.
    """
    column = gl.arange(0, scores.shape[1], gl.SliceLayout(0, layout))
    spread = gl.zeros([scores.shape[0], scores.shape[1]], gl.int32, layout)
    for w in gl.static_range(0, scores.shape[1] // 32):
        spread = gl.where((column // 32 == w)[None, :], words[w][:, None], spread)
    bits = (spread >> (column & 6)[None, :]) & (1 << (column & 25))[None, :]
    return gl.where(bits != 0, scores, float("-inf"))
