"""Gradients of attention on pooled keys: of the queries of a block, and of pooled keys and values."""

# What a kernel takes and returns exists on the GPU only: Python types would say nothing.
# ruff: noqa: ANN001, ANN201, ANN202

# The language of Triton kernels is not quite Python.
# pyright: reportArgumentType=false, reportGeneralTypeIssues=false, reportAttributeAccessIssue=false, reportCallIssue=false, reportIndexIssue=false, reportOptionalMemberAccess=false, reportAssignmentType=false, reportOperatorIssue=false
from __future__ import annotations

import triton
import triton.language as tl

from visattn.kernels.triton.choosing.rest import added
from visattn.kernels.triton.parts import LOG2E


@triton.jit
def _rows(pointer, batch, token_step, head_step, sample, head, token, d):
    """Addresses of the rows of some tokens of one head: [tokens, channels]."""
    return pointer + sample * batch + head * head_step + token[:, None] * token_step + d[None, :]


@triton.jit
def _weights(query, key, more, row_lse, scale, PRECISION: tl.constexpr):
    """Attention weights [queries, pooled keys]; `more` is added to scores in base 2, -inf for what is listed."""
    scores = tl.dot(query, tl.trans(key), input_precision=PRECISION) * scale + more[None, :]
    return tl.exp2(scores - tl.where(row_lse == float("-inf"), float("inf"), row_lse * LOG2E)[:, None])


@triton.jit
def rest_query_gradients(
    q, grad_out, pooled_k, pooled_v, weight, bits, tokens, lse, delta, grad_q,
    q_batch, q_token, q_head, grad_batch, grad_token, grad_head, weight_batch, list_heads, scale, heads, group, length,
    rows, columns, words, slots, pieces,
    HEAD_DIM: tl.constexpr, BLOCK_DIM: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Add the part of pooled keys to dQ of some queries of one block; arguments as in `rest.add_rest`.

    Args (besides those):
        grad_out: Gradient of the output [B, length, heads, HEAD_DIM].
        lse: Log-sum-exp over listed and pooled keys.
        delta: Sums of the output times its gradient: float32 [B, heads, length].
        grad_q: Gradient along the lists, then of both: [B, length, heads, HEAD_DIM], contiguous.
        scale: Factor on the products, natural.
    """
    row, piece, pair = tl.program_id(0) // pieces, tl.program_id(0) % pieces, tl.program_id(1)
    sample, head = (pair // heads).to(tl.int64), (pair % heads).to(tl.int64)
    slot, c, d = piece * ROWS + tl.arange(0, ROWS), tl.arange(0, COLUMNS), tl.arange(0, BLOCK_DIM)
    has_d = d < HEAD_DIM
    token = tl.load(tokens + row * slots + slot, mask=slot < slots, other=-1).to(tl.int64)
    is_token = token >= 0
    here = is_token[:, None] & has_d[None, :]
    query = tl.load(_rows(q, q_batch, q_token, q_head, sample, head, token, d), mask=here, other=0.0)
    grad = tl.load(_rows(grad_out, grad_batch, grad_token, grad_head, sample, head, token, d), mask=here, other=0.0)
    to = grad_q + ((sample * length + token) * heads + head)[:, None] * HEAD_DIM + d[None, :]
    at = (sample * heads + head) * length + token
    row_lse = tl.load(lse + at, mask=is_token, other=float("-inf"))
    row_delta = tl.load(delta + at, mask=is_token, other=0.0)
    acc = tl.zeros([ROWS, BLOCK_DIM], tl.float32)
    step = heads // group * HEAD_DIM
    first = (sample * columns * (heads // group) + head // group) * HEAD_DIM
    bits += ((pair // list_heads).to(tl.int64) * rows + row) * words
    weight += sample * weight_batch
    for start in range(0, columns, COLUMNS):
        column = start + c
        inside = column < columns
        place = first + column.to(tl.int64)[:, None] * step + d[None, :]
        has = inside[:, None] & has_d[None, :]
        key = tl.load(pooled_k + place, mask=has, other=0.0)
        p = _weights(query, key, added(weight, bits, column, inside), row_lse, scale * LOG2E, PRECISION)
        value = tl.load(pooled_v + place, mask=has, other=0.0)
        grad_weights = tl.dot(grad, tl.trans(value), input_precision=PRECISION)
        grad_scores = p * (grad_weights - row_delta[:, None])
        acc = tl.dot(grad_scores.to(key.dtype), key, acc, input_precision=PRECISION)
    along = tl.load(to, mask=here, other=0.0).to(tl.float32)
    tl.store(to, (along + acc * scale).to(grad_q.dtype.element_ty), mask=here)


@triton.jit
def rest_key_gradients(
    q, grad_out, pooled_k, pooled_v, weight, bits, tokens, lse, delta, grad_k, grad_v,
    q_batch, q_token, q_head, grad_batch, grad_token, grad_head, weight_batch, list_heads, scale, heads, group, length,
    rows, columns, words, slots, pieces,
    HEAD_DIM: tl.constexpr, BLOCK_DIM: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients of some pooled keys and values of one key head, over all grid queries that do not list their blocks.

    Args (besides those of `rest_query_gradients`):
        grad_k: Of the mean keys: [B, columns, key heads, HEAD_DIM], contiguous.
        grad_v: Of the mean values.
    """
    kv_heads = heads // group
    sample, kv_head = (tl.program_id(1) // kv_heads).to(tl.int64), (tl.program_id(1) % kv_heads).to(tl.int64)
    column, d = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS), tl.arange(0, BLOCK_DIM)
    inside, has_d = column < columns, d < HEAD_DIM
    place = ((sample * columns + column.to(tl.int64)) * kv_heads + kv_head)[:, None] * HEAD_DIM + d[None, :]
    has = inside[:, None] & has_d[None, :]
    key = tl.load(pooled_k + place, mask=has, other=0.0)
    value = tl.load(pooled_v + place, mask=has, other=0.0)
    acc_k = tl.zeros([COLUMNS, BLOCK_DIM], tl.float32)
    acc_v = tl.zeros([COLUMNS, BLOCK_DIM], tl.float32)
    weight += sample * weight_batch
    for i in range(0, group * rows * pieces):
        own = i // (rows * pieces)
        row = i // pieces % rows
        head = kv_head * group + own
        slot = i % pieces * ROWS + tl.arange(0, ROWS)
        token = tl.load(tokens + row * slots + slot, mask=slot < slots, other=-1).to(tl.int64)
        is_token = token >= 0
        here = is_token[:, None] & has_d[None, :]
        query = tl.load(_rows(q, q_batch, q_token, q_head, sample, head, token, d), mask=here, other=0.0)
        grad = tl.load(_rows(grad_out, grad_batch, grad_token, grad_head, sample, head, token, d), mask=here, other=0.0)
        at = (sample * heads + head) * length + token
        row_lse = tl.load(lse + at, mask=is_token, other=float("-inf"))
        row_delta = tl.load(delta + at, mask=is_token, other=0.0)
        row_bits = bits + (((sample * heads + head) // list_heads) * rows + row) * words
        p = _weights(query, key, added(weight, row_bits, column, inside), row_lse, scale * LOG2E, PRECISION)
        acc_v = tl.dot(tl.trans(p).to(grad.dtype), grad, acc_v, input_precision=PRECISION)
        grad_weights = tl.dot(grad, tl.trans(value), input_precision=PRECISION)
        grad_scores = p * (grad_weights - row_delta[:, None])
        acc_k = tl.dot(tl.trans(grad_scores).to(query.dtype), query, acc_k, input_precision=PRECISION)
    tl.store(grad_k + place, (acc_k * scale).to(grad_k.dtype.element_ty), mask=has)
    tl.store(grad_v + place, acc_v.to(grad_v.dtype.element_ty), mask=has)
