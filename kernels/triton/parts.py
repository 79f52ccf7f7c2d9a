"""Pieces that several kernels share: where a program works, visibility bits, addresses.

Every kernel handles one *row tile* per program and walks the *column tiles* of its list: query tiles by key
tiles in the forward and dQ kernels, key tiles by query tiles in the dK/dV kernel.
"""

# What a kernel takes and returns exists on the GPU only: Python types would say nothing.
# ruff: noqa: ANN001, ANN201

# The language of Triton kernels is not quite Python.
# pyright: reportArgumentType=false, reportGeneralTypeIssues=false
from __future__ import annotations

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)

# Sizes that differ from call to call: kernels are not compiled again for their values.
RUNTIME_SIZES = (
    "dense_rows",
    "grid_rows",
    "pairs",
    "prefix_tiles",
    "suffix_tiles",
    "prefix",
    "suffix_start",
    "suffix",
    "extra",
    "length",
    "key_length",
    "centre",
    "rpb_entries",
    "list_batch",
    "bounds_batch",
    "list_heads",
)


@triton.jit
def place(pid, dense_rows, grid_rows, pairs):
    """Row tile and (sample, head) pair of a program.

    Rows of dense tokens visit everything, so those of all pairs start first; then the grid rows, pair by pair,
    so that the programs in flight share their columns in the L2 cache.
    """
    rest = pid - dense_rows * pairs
    is_dense = rest < 0
    row = tl.where(is_dense, pid // pairs, dense_rows + rest % grid_rows)
    pair = tl.where(is_dense, pid % pairs, rest // grid_rows)
    return row, pair


@triton.jit
def bases_at(bases, i, column_slots, COLUMNS: tl.constexpr, TILES: tl.constexpr):
    """First tokens of the TILES listed column tiles from entry i: int64, a scalar for one, else per column slot."""
    base = tl.load(bases + i).to(tl.int64)
    for t in tl.static_range(1, TILES):
        base = tl.where(column_slots // (COLUMNS // TILES) == t, tl.load(bases + i + t).to(tl.int64), base)
    return base


@triton.jit
def rows_at(pointer, base, stride, box, TILES: tl.constexpr):
    """Addresses of the columns at `base`, which is what `bases_at` gives; `box` are offsets [columns, head dim]."""
    if TILES == 1:
        return pointer + base * stride + box
    else:
        return pointer + (base * stride)[:, None] + box


@triton.jit
def list_of(bounds, bases, mask_ids, bounds_batch, list_batch, owner, row):
    """A row tile's list: the entries start to split are full, those from there to stop partial, then `dense` runs.

    Args:
        bounds: See `program.Program`, as bases and mask_ids.
        bases: First token of each entry.
        mask_ids: Mask of each entry.
        bounds_batch: Distance of the bounds of two owners.
        list_batch: Distance of the lists of two owners.
        owner: Whose list: a group of heads of a sample.
        row: The row tile.

    Returns:
        start, split, stop, dense, and the first tokens and the masks of the owner's entries.
    """
    owner = owner.to(tl.int64)
    bound = bounds + owner * bounds_batch + row * 4
    start, split, stop, dense = tl.load(bound), tl.load(bound + 1), tl.load(bound + 2), tl.load(bound + 3)
    return start, split, stop, dense, bases + owner * list_batch, mask_ids + owner * list_batch


@triton.jit
def boxes_of(slots, first_step, second_step, d, WIDE: tl.constexpr, ALIKE: tl.constexpr):
    """Offsets [columns, head dim] of column slots (their distances in tokens) in the two tensors that are walked.

    One set of offsets less to keep in registers where both lie alike, as they nearly always do.
    """
    reach = slots.to(tl.int64) if WIDE else slots
    box = reach[:, None] * first_step + d[None, :]
    if ALIKE:
        return box, box
    else:
        return box, reach[:, None] * second_step + d[None, :]


@triton.jit
def scores_of(rows, columns, scale, base, placed, RPB: tl.constexpr, BY_KEYS: tl.constexpr, PRECISION: tl.constexpr):
    """Scores in base 2 of a row tile and the listed column tiles at `base`, with their relative position bias if RPB.

    Rows are queries, or keys if BY_KEYS. `placed` is what the bias takes: the bias of the head, positions of tokens,
    of the slots of a box and of the rows, centre and number of entries.
    """
    scores = tl.dot(rows, tl.trans(columns), input_precision=PRECISION) * scale
    if RPB:
        rpb, positions, box_position, row_position, centre, entries = placed
        position = tl.load(positions + base) + box_position
        if BY_KEYS:
            bias = bias_of(rpb, row_position[:, None], position[None, :], centre, entries)
        else:
            bias = bias_of(rpb, position[None, :], row_position[:, None], centre, entries)
        scores += bias * LOG2E
    return scores


@triton.jit
def see(masks, mask_ids, i, row_slots, column_slots, ROWS: tl.constexpr, COLUMNS: tl.constexpr, TILES: tl.constexpr):
    """Visibility bits of the TILES column tiles from entry i as a bool [row slots, column slots].

    A row of a mask is a bit per slot of one column tile, in words of 32.
    """
    SLOTS: tl.constexpr = COLUMNS // TILES
    WORDS: tl.constexpr = (SLOTS + 31) // 32
    slot = column_slots[None, :] % SLOTS
    word = column_slots[None, :] // SLOTS * WORDS + slot // 32
    words = tl.zeros_like(row_slots)[:, None]
    for t in tl.static_range(0, TILES):
        word_of = masks + (tl.load(mask_ids + i + t).to(tl.int64) * ROWS + row_slots) * WORDS
        for w in tl.static_range(0, WORDS):
            # Which word a column is in is known when the kernel is compiled, so these selects cost little.
            words = tl.where(word == t * WORDS + w, tl.load(word_of + w)[:, None], words)
    return ((words >> (slot % 32)) & 1) != 0


@triton.jit
def listed_by(words, i, bits):
    """Which query slots list entry i, for tiles of several query blocks: a bit of its word each, see `bits`."""
    return ((tl.load(words + i) >> bits.to(tl.int64)) & 1) != 0


@triton.jit
def dense_run(i, prefix_tiles, suffix_tiles, prefix, suffix_start, suffix, extra, COLUMNS: tl.constexpr):
    """First token and end of the i-th column tile of dense tokens: prefix runs, suffix runs, extra runs."""
    in_prefix = i < prefix_tiles
    in_suffix = i < prefix_tiles + suffix_tiles
    suffix_end = suffix_start + suffix
    late = tl.where(
        in_suffix,
        suffix_start + (i - prefix_tiles) * COLUMNS,
        suffix_end + (i - prefix_tiles - suffix_tiles) * COLUMNS,
    )
    start = tl.where(in_prefix, i * COLUMNS, late)
    end = tl.where(in_prefix, prefix, tl.where(in_suffix, suffix_end, suffix_end + extra))
    return start, end


@triton.jit
def bias_of(rpb, key_position, query_position, centre, entries):
    """Relative position bias of [., .] positions, 0 where a token has no place in the grid."""
    index = key_position - query_position + centre
    return tl.load(rpb + index, mask=(index >= 0) & (index < entries), other=0.0)
