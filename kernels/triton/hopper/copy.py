"""The copying warp of the Hopper kernel: column tiles by the tensor memory accelerator into rings of shared memory."""

# What a kernel takes and returns exists on the GPU only: Python types would say nothing.
# ruff: noqa: ANN001, ANN201, ANN202

# The language of Triton kernels is not quite Python.
# pyright: reportArgumentType=false, reportGeneralTypeIssues=false, reportAttributeAccessIssue=false, reportCallIssue=false, reportIndexIssue=false, reportOptionalMemberAccess=false, reportAssignmentType=false
from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma

from visattn.kernels.triton.hopper.parts import dense_run, following, view

# Triton 3.6 knows it under another name.
_copy = getattr(tma, "async_load", tma.async_copy_global_to_shared)


@gluon.jit
def _fetch(source, boxes, ready, first, token, place, PIECES: gl.constexpr, TILES: gl.constexpr):
    """Copy the box of tokens that begins at a token of the grid, 64 channels a piece."""
    outer, column, side_y, side_x = place
    line = token // side_x
    x, y, t = token % side_x, line % side_y, line // side_y
    for piece in gl.static_range(0, PIECES):
        _copy(source, [outer, t, y, x, column + piece * 64], ready, boxes.index(first + piece * TILES))


@gluon.jit
def _fetch_tiles(
    source, ring, ready, free, slot, phase, token, second, place,
    BOX: gl.constexpr, PIECES: gl.constexpr, TILES: gl.constexpr, STAGES: gl.constexpr, WAITS: gl.constexpr,
):  # fmt: skip
    """Fill a slot of a ring with one or two column tiles, once it is free, which is known unless it WAITS.

    A slot has its pieces of 64 channels one behind the other, each with its tiles one behind the other.
    """
    shape: gl.constexpr = [STAGES * PIECES * TILES, 1, BOX[0], BOX[1], BOX[2], 64]
    boxes = view(ring, shape, gl.NVMMASharedLayout(128, 16, rank=5))
    if WAITS:
        mbarrier.wait(free.index(slot), phase)
    mbarrier.expect(ready.index(slot), TILES * BOX[0] * BOX[1] * BOX[2] * PIECES * 128)
    _fetch(source, boxes, ready.index(slot), slot * PIECES * TILES, token, place, PIECES, TILES)
    if TILES == 2:
        _fetch(source, boxes, ready.index(slot), slot * PIECES * TILES + 1, second, place, PIECES, TILES)


@gluon.jit
def _fetch_run(
    source, ring, ready, free, slot, phase, first, place,
    COLUMNS: gl.constexpr, PIECES: gl.constexpr, STAGES: gl.constexpr, WAITS: gl.constexpr,
):  # fmt: skip
    """Fill a slot of a ring with the tokens from `first`, once it is free, which is known unless it WAITS."""
    shape: gl.constexpr = [STAGES * PIECES, 1, 1, 1, COLUMNS, 64]
    boxes = view(ring, shape, gl.NVMMASharedLayout(128, 16, rank=5))
    if WAITS:
        mbarrier.wait(free.index(slot), phase)
    mbarrier.expect(ready.index(slot), COLUMNS * PIECES * 128)
    for piece in gl.static_range(0, PIECES):
        _copy(source, [place[0], 0, 0, first, place[1] + piece * 64], ready.index(slot),
              boxes.index(slot * PIECES + piece))  # fmt: skip


@gluon.jit
def produce(
    k_grid, v_grid, k_runs, v_runs, rings, bases, where, place, runs, slot, phase, v_slot, v_phase,
    BOX: gl.constexpr, COLUMNS: gl.constexpr, TILES: gl.constexpr, HEAD_DIM: gl.constexpr, STAGES: gl.constexpr,
    VALUE_STAGES: gl.constexpr, VALUES_WAIT: gl.constexpr,
):  # fmt: skip
    """Copy keys and values of the listed column tiles, then of the runs of dense tokens, from slots of the rings on.

    Unless VALUES_WAIT a slot of values is free once that of the keys beside them is.

    Returns:
        The slots of both rings after the last ones that were filled, and their phases.
    """
    keys, values, k_ready, k_free, v_ready, v_free = rings
    start, stop, dense = where
    prefix_tiles, suffix_tiles, prefix, suffix_start, suffix, extra = runs
    PIECES: gl.constexpr = HEAD_DIM // 64
    # Indices are read a step ahead, while the warp waits for a free slot anyway.
    has_any = start < stop
    token = gl.load(bases + start, mask=has_any, other=0) - prefix
    second = gl.load(bases + start + TILES - 1, mask=has_any, other=0) - prefix
    for i in range(start, stop, TILES):
        ahead = gl.minimum(i + TILES, stop - TILES)
        next_token = gl.load(bases + ahead) - prefix
        next_second = gl.load(bases + ahead + TILES - 1) - prefix
        _fetch_tiles(k_grid, keys, k_ready, k_free, slot, phase, token, second, place, BOX, PIECES, TILES, STAGES,
                     True)  # fmt: skip
        _fetch_tiles(v_grid, values, v_ready, v_free, v_slot, v_phase, token, second, place, BOX, PIECES, TILES,
                     VALUE_STAGES, VALUES_WAIT)  # fmt: skip
        token = next_token
        second = next_second
        slot, phase = following(slot, phase, STAGES)
        v_slot, v_phase = following(v_slot, v_phase, VALUE_STAGES)
    for i in range(0, dense):
        first, _ = dense_run(i, prefix_tiles, suffix_tiles, prefix, suffix_start, suffix, extra, COLUMNS)
        _fetch_run(k_runs, keys, k_ready, k_free, slot, phase, first, place, COLUMNS, PIECES, STAGES, True)
        _fetch_run(v_runs, values, v_ready, v_free, v_slot, v_phase, first, place, COLUMNS, PIECES, VALUE_STAGES,
                   VALUES_WAIT)  # fmt: skip
        slot, phase = following(slot, phase, STAGES)
        v_slot, v_phase = following(v_slot, v_phase, VALUE_STAGES)
    return slot, phase, v_slot, v_phase
