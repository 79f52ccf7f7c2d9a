"""What the blocks that a query block does not list add to attention along its lists: one pooled key and value each."""

# What a kernel takes and returns exists on the GPU only: Python types would say nothing.
# ruff: noqa: ANN001, ANN201

# The language of Triton kernels is not quite Python.
# pyright: reportArgumentType=false, reportGeneralTypeIssues=false, reportAttributeAccessIssue=false, reportCallIssue=false, reportIndexIssue=false, reportOptionalMemberAccess=false, reportAssignmentType=false, reportOperatorIssue=false
from __future__ import annotations

import triton
import triton.language as tl

from visattn.kernels.triton.lists.forward import LN2, absorb
from visattn.kernels.triton.parts import LOG2E


@triton.jit
def added(weight, bits, column, inside):
    """What is added to the scores of pooled keys, in base 2."""
    more = tl.load(weight + column, mask=inside, other=float("-inf")) * LOG2E
    listed = (tl.load(bits + column // 32, mask=inside, other=0) >> (column % 32)) & 1
    return tl.where(listed != 0, float("-inf"), more)


@triton.jit
def mark_blocks(
    tiles, counts, bits, rows, number, words,
    COUNTED: tl.constexpr, STEP: tl.constexpr, WORDS: tl.constexpr,
):  # fmt: skip
    """Which key blocks a query block lists, a bit each.

    Args:
        tiles: Key blocks of each query block, without duplicates: int32 [owners, rows, number].
        counts: How many of them count: int32 [owners, rows]; all without COUNTED.
        bits: Bit j of word w is block 32 * w + j: int32 [owners, rows, words].
        rows: Query blocks.
        number: Entries of a list.
        words: Words of a row.
        COUNTED: Whether lists have counts.
        STEP: Entries that are looked at together.
        WORDS: A power of two that is at least `words`.
    """
    at = tl.program_id(1).to(tl.int64) * rows + tl.program_id(0)
    count = tl.load(counts + at) if COUNTED else number
    w = tl.arange(0, WORDS)
    found = tl.zeros([WORDS], tl.int32)
    for start in range(0, count, STEP):
        i = start + tl.arange(0, STEP)
        block = tl.load(tiles + at * number + i, mask=i < count, other=-1)
        own = (block >= 0)[:, None] & ((block // 32)[:, None] == w[None, :])
        # No block is listed twice: the sum of their bits has them all.
        found += tl.sum(tl.where(own, (tl.full([STEP], 1, tl.int32) << (block % 32))[:, None], 0), 0)
    tl.store(bits + at * words + w, found, mask=w < words)


@triton.jit
def add_rest(
    q, pooled_k, pooled_v, weight, bits, tokens, moment, out, lse,
    q_batch, q_token, q_head, weight_batch, list_heads, scale, heads, group, length,
    rows, columns, words, slots, pieces,
    HEAD_DIM: tl.constexpr, BLOCK_DIM: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    PRECISION: tl.constexpr, SLOPE: tl.constexpr, SLICE: tl.constexpr,
):  # fmt: skip
    """Go on with the softmax of some queries of one block over the pooled keys; output and log-sum-exp are replaced.

    With SLOPE the weight that falls on pooled keys also gets how their values change with the query, see
    `patterns.choice.tail.slope`.

    Args:
        q: Queries [B, length, heads, HEAD_DIM].
        pooled_k: Mean keys [B, columns, key heads, HEAD_DIM], contiguous.
        pooled_v: Mean values likewise.
        weight: Logarithm of the tokens of each block, -inf for none: float32 [1 or B, columns].
        bits: See `mark_blocks`.
        tokens: Tokens of each query block, -1 behind a border: int32 [rows, slots].
        moment: How values change with keys: [B, key heads, HEAD_DIM, HEAD_DIM], contiguous; not read without SLOPE.
        out: Attention along the lists, then with the pooled keys: [B, length, heads, HEAD_DIM], contiguous.
        lse: Its log-sum-exp, then that of both: float32 [B, heads, length].
        q_batch: Distance of two samples of q; q_token of two tokens, q_head of two heads.
        q_token: See q_batch.
        q_head: See q_batch.
        weight_batch: Distance of two samples of `weight`, 0 where all have one.
        list_heads: Query heads of an owner of lists.
        scale: Factor on the products, for scores in base 2.
        heads: Query heads.
        group: Query heads of a key head.
        length: Tokens of the sequence.
        rows: Query blocks.
        columns: Key blocks.
        words: Words of a row of bits.
        slots: Tokens of a query block at most.
        pieces: Programs of a block.
        HEAD_DIM: Channels.
        BLOCK_DIM: A power of two that is at least HEAD_DIM.
        ROWS: Queries of a program.
        COLUMNS: Pooled keys of a step.
        PRECISION: Of the products.
        SLOPE: Whether values change with keys.
        SLICE: Channels of keys whose changes are multiplied at once.
    """
    row, piece, pair = tl.program_id(0) // pieces, tl.program_id(0) % pieces, tl.program_id(1)
    sample, head = (pair // heads).to(tl.int64), (pair % heads).to(tl.int64)
    slot, c, d = piece * ROWS + tl.arange(0, ROWS), tl.arange(0, COLUMNS), tl.arange(0, BLOCK_DIM)
    has_d = d < HEAD_DIM
    token = tl.load(tokens + row * slots + slot, mask=slot < slots, other=-1).to(tl.int64)
    is_token = token >= 0
    here = is_token[:, None] & has_d[None, :]
    query = tl.load(q + sample * q_batch + head * q_head + token[:, None] * q_token + d[None, :], mask=here, other=0.0)
    out_at = out + ((sample * length + token) * heads + head)[:, None] * HEAD_DIM + d[None, :]
    lse_at = lse + (sample * heads + head) * length + token
    acc = tl.load(out_at, mask=here, other=0.0).to(tl.float32)
    before = tl.load(lse_at, mask=is_token, other=float("-inf")) * LOG2E
    top, total = before, tl.where(before == float("-inf"), 0.0, 1.0)
    step = heads // group * HEAD_DIM
    first = (sample * columns * (heads // group) + head // group) * HEAD_DIM
    bits += ((pair // list_heads).to(tl.int64) * rows + row) * words
    weight += sample * weight_batch
    for start in range(0, columns, COLUMNS):
        column = start + c
        inside = column < columns
        at = first + column.to(tl.int64)[:, None] * step + d[None, :]
        key = tl.load(pooled_k + at, mask=inside[:, None] & has_d[None, :], other=0.0)
        more = added(weight, bits, column, inside)
        scores = tl.dot(query, tl.trans(key), input_precision=PRECISION) * scale + more[None, :]
        value = tl.load(pooled_v + at, mask=inside[:, None] & has_d[None, :], other=0.0)
        acc, total, top = absorb(acc, total, top, scores, value, PRECISION, True)
    acc = acc / tl.where(total == 0.0, 1.0, total)[:, None]
    if SLOPE:
        # What of the whole softmax is not on listed keys.
        share = tl.where(total == 0.0, 0.0, 1.0 - tl.exp2(before - tl.where(total == 0.0, 0.0, top)) / total)
        change = tl.zeros([ROWS, BLOCK_DIM], tl.float32)
        moment += (sample * (heads // group) + head // group) * HEAD_DIM * HEAD_DIM
        q += sample * q_batch + head * q_head
        for start in range(0, BLOCK_DIM, SLICE):
            f = start + tl.arange(0, SLICE)
            has_f = f < HEAD_DIM
            part = tl.load(
                q + token[:, None] * q_token + f[None, :], mask=is_token[:, None] & has_f[None, :], other=0.0
            )
            some = tl.load(moment + f[:, None] * HEAD_DIM + d[None, :], mask=has_f[:, None] & has_d[None, :], other=0.0)
            change = tl.dot(part, some, change, input_precision=PRECISION)
        # The factor on the products is one for scores in base 2.
        acc += change * (share * (scale / LOG2E))[:, None]
    tl.store(out_at, acc.to(out.dtype.element_ty), mask=here)
    tl.store(lse_at, (top + tl.log2(total)) * LN2, mask=is_token)
