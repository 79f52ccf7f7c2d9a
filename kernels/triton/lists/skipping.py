"""Forward kernel along lists of blocks that passes over those that hardly count, by a test in its loop (BLASST)."""

# What a kernel takes and returns exists on the GPU only: Python types would say nothing.
# ruff: noqa: ANN001, ANN201

# The language of Triton kernels is not quite Python.
# pyright: reportArgumentType=false, reportGeneralTypeIssues=false, reportOptionalMemberAccess=false, reportCallIssue=false, reportOperatorIssue=false
from __future__ import annotations

import triton
import triton.language as tl

from visattn.kernels.triton.lists.forward import LN2, absorb
from visattn.kernels.triton.parts import RUNTIME_SIZES

RUNTIME = (*RUNTIME_SIZES, "blocks", "columns", "number", "dense_tiles")


@triton.jit(do_not_specialize=RUNTIME)
def attend_or_skip(
    q, k, v, out, lse, key_mask, query_tokens, key_tokens, dense_tokens, choice, counts, met,
    q_batch, q_token, q_head, k_batch, k_token, k_head, v_batch, v_token, v_head,
    scale, below, heads, group, list_heads, length, blocks, columns, number, dense_tiles,
    HEAD_DIM: tl.constexpr, BLOCK_DIM: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    COUNTED: tl.constexpr, KEY_MASK: tl.constexpr, LSE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Attention of one block of queries along its list: dense keys first, then the listed blocks as they come.

    A block of keys is passed over, its values unread, if for every valid query its largest score is more than `below`
    under the largest so far, its own included. Programs behind those of the blocks have dense queries, which pass
    over nothing and see everything.

    Args:
        q: Queries [B, length, heads, HEAD_DIM]; strides in elements, channels next to each other.
        k: Keys [B, length, key heads, HEAD_DIM].
        v: Values likewise.
        out: Output [B, length, heads, HEAD_DIM], contiguous.
        lse: Log-sum-exp, float32 [B, heads, length].
        key_mask: Which tokens are valid: uint8 [B, length].
        query_tokens: Tokens of each block of queries, -1 for none: int32 [blocks, ROWS].
        key_tokens: Tokens of each block of keys: int32 [columns, COLUMNS].
        dense_tokens: Dense tokens: int32 [dense_tiles, COLUMNS].
        choice: Key blocks of each query block: int32 [owners, blocks, number].
        counts: How many of them count: int32 [owners, blocks]; all without COUNTED.
        met: Whether an entry was added: uint8 [B * heads, blocks, number].
        q_batch: Distance of two samples of q; likewise the other strides.
        q_token: See q_batch.
        q_head: See q_batch.
        k_batch: See q_batch.
        k_token: See q_batch.
        k_head: See q_batch.
        v_batch: See q_batch.
        v_token: See q_batch.
        v_head: See q_batch.
        scale: Factor on the products, for scores in base 2.
        below: Logarithm in base 2 of the weight below which blocks are passed over.
        heads: Query heads.
        group: Query heads of a key head.
        list_heads: Query heads of an owner of lists.
        length: Tokens.
        blocks: Blocks of queries.
        columns: Blocks of keys.
        number: Entries of a list.
        dense_tiles: Tiles of dense tokens.
        HEAD_DIM: Channels.
        BLOCK_DIM: A power of two that is at least HEAD_DIM.
        ROWS: Places of a block of queries.
        COLUMNS: Places of a block of keys, and of a tile of dense tokens.
        COUNTED: Whether lists have counts.
        KEY_MASK: Whether there is a key mask.
        LSE: Whether the log-sum-exp is wanted.
        PRECISION: How factors of products are rounded.
    """
    program, pair = tl.program_id(0), tl.program_id(1)
    sample, head = (pair // heads).to(tl.int64), (pair % heads).to(tl.int64)
    q += sample * q_batch + head * q_head
    k += sample * k_batch + head // group * k_head
    v += sample * v_batch + head // group * v_head
    key_mask += sample * length
    row_slots, column_slots, d = tl.arange(0, ROWS), tl.arange(0, COLUMNS), tl.arange(0, BLOCK_DIM)
    has_d = d < HEAD_DIM
    listed = program < blocks
    if listed:
        token = tl.load(query_tokens + program * ROWS + row_slots)
    else:
        at = (program - blocks) * ROWS + row_slots
        token = tl.load(dense_tokens + at, mask=at < dense_tiles * COLUMNS, other=-1)
    is_token = token >= 0
    here = is_token[:, None] & has_d[None, :]
    query = tl.load(q + token.to(tl.int64)[:, None] * q_token + d[None, :], mask=here, other=0.0)
    asks = is_token
    if KEY_MASK:
        asks &= tl.load(key_mask + token, mask=is_token, other=0) != 0

    top = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, BLOCK_DIM], tl.float32)
    list_at = (pair // list_heads).to(tl.int64) * blocks + program
    count = columns
    if listed:
        count = tl.load(counts + list_at) if COUNTED else number
    for i in range(0, dense_tiles + count):
        dense = i < dense_tiles
        # Triton reads ahead of the loop, and behind its end: what it reads there must exist, so nothing of it is read
        # inside of a branch.
        entry = tl.maximum(tl.minimum(i - dense_tiles, count - 1), 0)
        block = tl.load(choice + list_at * number + entry, mask=listed, other=0)
        block = tl.where(listed, block, entry)
        run = tl.maximum(tl.minimum(i, dense_tiles - 1), 0)
        column = tl.load(tl.where(dense, dense_tokens + run * COLUMNS, key_tokens + block * COLUMNS) + column_slots)
        visible = column >= 0
        there = visible[:, None] & has_d[None, :]
        place = column.to(tl.int64)[:, None]
        key = tl.load(k + place * k_token + d[None, :], mask=there, other=0.0)
        if KEY_MASK:
            visible &= tl.load(key_mask + column, mask=visible, other=0) != 0
        scores = tl.dot(query, tl.trans(key), input_precision=PRECISION) * scale
        scores = tl.where(visible[None, :], scores, float("-inf"))
        high = tl.max(scores, 1)
        # Where nothing was met both sides are -inf, and nothing is passed over.
        small = (high < tl.maximum(top, high) + below) | ~asks
        needed = dense | ~listed | (tl.min(small.to(tl.int32), 0) == 0)
        if needed:
            value = tl.load(v + place * v_token + d[None, :], mask=there, other=0.0)
            acc, total, top = absorb(acc, total, top, scores, value, PRECISION, True)
        if listed & ~dense:
            tl.store(met + (pair.to(tl.int64) * blocks + program) * number + entry, needed.to(tl.uint8))

    acc = acc / tl.where(total == 0.0, 1.0, total)[:, None]
    row_of = (sample * length + token) * heads + head
    tl.store(out + row_of[:, None] * HEAD_DIM + d[None, :], acc.to(out.dtype.element_ty), mask=here)
    if LSE:
        tl.store(lse + (sample * heads + head) * length + token, (top + tl.log2(total)) * LN2, mask=is_token)
