"""Which blocks a row lists by its scores: the rules of `patterns.choice.picks`, a row in the registers of a program.

Nothing is sorted. A row is cut where the number, or the probability, of what lies above a bar fits; the bar is found
bit by bit among the 32-bit numbers that are in the order of the scores.
"""

# What a kernel takes and returns exists on the GPU only: Python types would say nothing.
# ruff: noqa: ANN001, ANN201, ANN202

# The language of Triton kernels is not quite Python.
# pyright: reportArgumentType=false, reportGeneralTypeIssues=false, reportAttributeAccessIssue=false, reportCallIssue=false, reportIndexIssue=false, reportOptionalMemberAccess=false, reportAssignmentType=false, reportOperatorIssue=false
from __future__ import annotations

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
RULE_NUMBER, RULE_MASS, RULE_ABOVE = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
# The 32 bits of a bar.
BITS = tl.constexpr(32)


@triton.jit
def _ordered(x, here):
    """Numbers in the order of float32 scores, uint32; 0 where there is none, which is below all of them."""
    # Of equal scores the index decides, also of zeros with different signs. What is no number comes first.
    x = tl.where(x == 0.0, 0.0, tl.where(x != x, float("inf"), x))
    bits = x.to(tl.int32, bitcast=True)
    # Negative scores are in reverse order, below the others.
    ordered = tl.where(bits < 0, ~bits, bits | (-2147483647 - 1))
    return tl.where(here, ordered.to(tl.uint32, bitcast=True), tl.zeros_like(bits).to(tl.uint32, bitcast=True))


@triton.jit
def _best(ordered, number):
    """Marks at the `number` largest, of equal ones the lower indices first."""
    bar = tl.full([], 0, tl.uint32)
    bit = tl.full([], 1, tl.uint32) << (BITS - 1)
    found = -1
    # Where as many lie above a bar as are wanted, its other bits make no difference.
    while (bit > 0) & (found != number):
        wanted = bar | bit
        reach = tl.sum((ordered >= wanted).to(tl.int32), 0)
        bar = tl.where(reach >= number, wanted, bar)
        found = tl.where(reach >= number, reach, found)
        bit = bit >> 1
    above, level = ordered > bar, ordered == bar
    room = number - tl.sum(above.to(tl.int32), 0)
    return above | (level & (tl.cumsum(level.to(tl.int32), 0) <= room))


@triton.jit
def _carrying(ordered, probability, here, mass, COVER: tl.constexpr):
    """Marks at the best that carry a share of the probability, with COVER also at the one that crosses it."""
    # The lowest bar above which no more than the share lies.
    bar = tl.zeros([1], tl.uint32)
    bit = tl.full([1], 1, tl.uint32) << (BITS - 1)
    for _ in range(BITS):
        wanted = bar | bit
        more = tl.sum(tl.where(ordered >= wanted, probability, 0.0), 0) > mass
        bar = tl.where(more, wanted, bar)
        bit = bit >> 1
    above, level = ordered > bar, ordered == bar
    before = tl.sum(tl.where(above, probability, 0.0), 0)
    among = tl.cumsum(level.to(tl.int32), 0)
    behind = before + probability * (among - 1 if COVER else among).to(tl.float32)
    return here & (above | (level & (behind <= mass)))


@triton.jit
def _standing_out(x, part, tau):
    """Marks at what lies `tau` standard deviations above the mean of its row, in base 2."""
    x = x * LOG2E
    count = tl.maximum(tl.sum(part.to(tl.int32), 0), 1).to(tl.float32)
    mean = tl.sum(tl.where(part, x, 0.0), 0) / count
    off = tl.where(part, x - mean, 0.0)
    variance = tl.sum(off * off, 0) / count
    return part & (x > mean + tau * tl.sqrt(variance + 1e-6))


@triton.jit
def select(
    scores, forced, reach, count_q, count_k, tiles, counts, others, wide_others,
    heads, first_head, some, rows, columns, query_parts, key_parts, number, least, most, share,
    RULE: tl.constexpr, COVER: tl.constexpr, FORCED: tl.constexpr, VALID: tl.constexpr, CAUSAL: tl.constexpr,
    COLUMNS: tl.constexpr, MOST: tl.constexpr, LEAST: tl.constexpr, LIMITED: tl.constexpr,
    LISTS: tl.constexpr, OTHERS: tl.constexpr, WITHIN: tl.constexpr,
):  # fmt: skip
    """The list of one query block of one head.

    Args:
        scores: float32 [B, some, rows, columns].
        forced: Which blocks are listed whatever they score: uint8 [rows, columns], read with FORCED.
        reach: How many blocks, the first ones, a row may list: int32 [rows], read with CAUSAL.
        count_q: Valid tokens of the parts of query blocks: int32 [B, rows * query_parts], read with VALID.
        count_k: Valid tokens of the parts of key blocks: int32 [B, columns * key_parts], read with VALID.
        tiles: Gets the listed blocks in their order, zeros behind them: int32 [B, heads, rows, most]; with LISTS.
        counts: Gets how many are listed: int32 [B, heads, rows]; with LISTS.
        others: Gets 1 for each block that is not listed, else 0, with OTHERS: [B, heads, rows, columns].
        wide_others: Gets the same in float32.
        heads: Query heads.
        first_head: The first of `some` heads.
        some: Heads that the scores are of.
        rows: Query blocks.
        columns: Key blocks.
        query_parts: Parts of a query block.
        key_parts: Parts of a key block.
        number: How many RULE_NUMBER lists.
        least: How many RULE_MASS lists anyway, with LEAST.
        most: How many are listed at most, with LIMITED; lists have room for as many.
        share: Of the probability for RULE_MASS, standard deviations for RULE_ABOVE.
        RULE: Which rule.
        COVER: See `_carrying`.
        FORCED: Whether anything is forced.
        VALID: Whether some tokens take no part.
        CAUSAL: Whether rows may list some blocks only.
        COLUMNS: A power of two that is at least `columns`.
        MOST: A power of two that is at least `most`.
        LEAST: Whether `least` is above 0.
        LIMITED: Whether `most` is below `columns`.
        LISTS: Whether lists are written.
        OTHERS: Whether somebody reads what is not listed.
        WITHIN: Whether instead the listed ones of those blocks stay that were not listed before.
    """
    row, sample, own = tl.program_id(0), (tl.program_id(1) // some).to(tl.int64), tl.program_id(1) % some
    c = tl.arange(0, COLUMNS)
    here = c < columns
    if CAUSAL:
        within = tl.load(reach + row)
        here = c < within
        number, least = tl.minimum(number, within), tl.minimum(least, within)
    x = tl.load(scores + ((sample * some + own) * rows + row) * columns + c, mask=here, other=float("-inf"))
    must = c < 0
    if FORCED:
        must = tl.load(forced + row * columns + c, mask=here, other=0) != 0
    part = here
    if VALID:
        seen = tl.zeros([COLUMNS], tl.int32)
        for i in range(key_parts):
            seen += tl.load(count_k + (sample * columns + c) * key_parts + i, mask=here, other=0)
        part = seen > 0
        # Padding takes no place of what may be listed.
        must = must & part
        number_of_row = 0
        for i in range(query_parts):
            number_of_row += tl.load(count_q + (sample * rows + row) * query_parts + i)
        row_seen = number_of_row > 0
    hidden = tl.where(part, x, float("-inf"))
    if RULE == RULE_NUMBER:
        mark = _best(_ordered(tl.where(must, float("inf"), hidden), here), number)
    else:
        if RULE == RULE_MASS:
            top = tl.max(hidden, 0)
            weights = tl.exp(hidden - tl.where(top == float("-inf"), 0.0, top))
            total = tl.sum(weights, 0)
            probability = tl.where(total > 0.0, weights / total, 0.0)
            if VALID:
                probability = tl.where(row_seen, probability, 0.0)
            ordered = _ordered(hidden, here)
            mark = _carrying(ordered, probability, here, share, COVER)
            if LEAST:
                mark |= _best(ordered, least)
        else:
            mark = _standing_out(x, part, share)
        mark |= must
        if LIMITED:
            mark &= _best(_ordered(tl.where(must, float("inf"), hidden), mark), most)
    to = (sample * heads + first_head + own) * rows + row
    if LISTS:
        place = tl.cumsum(mark.to(tl.int32), 0) - 1
        count = tl.sum(mark.to(tl.int32), 0)
        tl.store(counts + to, count)
        tl.store(tiles + to * most + place, c, mask=mark)
        j = tl.arange(0, MOST)
        tl.store(tiles + to * most + j, tl.zeros_like(j), mask=(j >= count) & (j < most))
    if OTHERS:
        line = to * columns + c
        other = tl.where(mark, 0.0, 1.0)
        if WITHIN:
            other = tl.where(mark, tl.load(wide_others + line, mask=c < columns, other=0.0), 0.0)
        tl.store(others + line, other.to(others.dtype.element_ty), mask=c < columns)
        tl.store(wide_others + line, other, mask=c < columns)
