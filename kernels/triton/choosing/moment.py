"""How values change with keys around the means of their blocks, for what `rest=slope` adds."""

# What a kernel takes and returns exists on the GPU only: Python types would say nothing.
# ruff: noqa: ANN001, ANN201

# The language of Triton kernels is not quite Python.
# pyright: reportArgumentType=false, reportGeneralTypeIssues=false, reportAttributeAccessIssue=false, reportCallIssue=false, reportIndexIssue=false, reportOptionalMemberAccess=false, reportAssignmentType=false, reportOperatorIssue=false
from __future__ import annotations

import torch
import triton
import triton.language as tl

from visattn.kernels.triton.arguments import precision
from visattn.kernels.triton.choosing.choose import Means
from visattn.kernels.triton.config import block_dim
from visattn.kernels.triton.splits import splits_of
from visattn.kernels.triton.start import launch_like

# Bytes of the keys of a step, numbers that a program adds up, and programs that a multiprocessor runs at once.
KEYS, NUMBERS, RESIDENT = 2**14, 2**14, 2


@triton.jit
def key_moments(
    k, v, mean, tokens, valid, moments,
    k_batch, k_token, k_head, v_batch, v_token, v_head, valid_batch, kv_heads, columns, slots, places, split,
    HEAD_DIM: tl.constexpr, BLOCK_DIM: tl.constexpr, CHANNELS: tl.constexpr, TOKENS: tl.constexpr,
    VALID: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Sum of (k - mean of its block) v^T over the tokens of some blocks of a key head.

    Args:
        k: Grid keys [B, tokens, key heads, HEAD_DIM]; channels are contiguous.
        v: Grid values likewise.
        mean: Means of the blocks, float32 [B, key heads, columns, HEAD_DIM].
        tokens: Tokens of each block, -1 behind a border: int32 [columns, slots].
        valid: Which tokens take part: uint8 [B, tokens]; all without VALID.
        moments: Result, float32 [splits, B, key heads, HEAD_DIM of v, HEAD_DIM of k].
        k_batch: Distance of two samples; the others of tokens, heads and masks likewise.
        k_token: See k_batch.
        k_head: See k_batch.
        v_batch: See k_batch.
        v_token: See k_batch.
        v_head: See k_batch.
        valid_batch: See k_batch.
        kv_heads: Key heads.
        columns: Blocks.
        slots: Tokens of a block at most.
        places: Entries of `tokens`.
        split: Entries that a program adds up.
        HEAD_DIM: Channels.
        BLOCK_DIM: A power of two that is at least HEAD_DIM.
        CHANNELS: Value channels of a program.
        TOKENS: Entries that are read at once.
        VALID: Whether some tokens take no part.
        PRECISION: Of the products.
    """
    part, pair = tl.program_id(0), tl.program_id(1).to(tl.int64)
    sample, head = pair // kv_heads, pair % kv_heads
    k += sample * k_batch + head * k_head
    v += sample * v_batch + head * v_head
    d, c = tl.arange(0, BLOCK_DIM), tl.program_id(2) * CHANNELS + tl.arange(0, CHANNELS)
    has_d, has_c = d < HEAD_DIM, c < HEAD_DIM
    # Values lie as the product takes them on its left.
    found = tl.zeros([CHANNELS, BLOCK_DIM], tl.float32)
    for start in range(part * split, tl.minimum((part + 1) * split, places), TOKENS):
        place = start + tl.arange(0, TOKENS)
        # A split may end within a step.
        token = tl.load(tokens + place, mask=place < tl.minimum((part + 1) * split, places), other=-1)
        here = token >= 0
        if VALID:
            here &= tl.load(valid + sample * valid_batch + token, mask=here, other=0) != 0
        wide = token.to(tl.int64)[:, None]
        key = tl.load(k + wide * k_token + d[None, :], mask=here[:, None] & has_d[None, :], other=0.0)
        value = tl.load(v + wide * v_token + c[None, :], mask=here[:, None] & has_c[None, :], other=0.0)
        own = (pair * columns + place // slots)[:, None] * HEAD_DIM + d[None, :]
        off = key.to(tl.float32) - tl.load(mean + own, mask=here[:, None] & has_d[None, :], other=0.0)
        found = tl.dot(tl.trans(value), off.to(value.dtype), found, input_precision=PRECISION)
    at = (part * tl.num_programs(1) + pair) * HEAD_DIM * HEAD_DIM
    tl.store(moments + at + c[:, None] * HEAD_DIM + d[None, :], found, mask=has_c[:, None] & has_d[None, :])


def moments_of(
    k: torch.Tensor, v: torch.Tensor, means: Means, tokens: torch.Tensor, valid: torch.Tensor | None, tf32: bool
) -> torch.Tensor:
    """What the mean of the values of pooled keys changes by, per unit of the products of keys: [B, Hkv, D, D].

    Sums over all valid tokens by their number, in the dtype of k; rows are channels of keys.

    Args:
        k: Grid keys [B, tokens, Hkv, D]; channels are contiguous.
        v: Grid values likewise.
        means: Means of the blocks of keys.
        tokens: Tokens of each block, as `part_tokens` has them.
        valid: uint8 [B, tokens], or None.
        tf32: Whether float32 products may round their factors to tf32.
    """
    (batch, _, kv_heads, head_dim), (columns, slots) = k.shape, tokens.shape
    width, places, pairs = block_dim(head_dim), tokens.numel(), batch * kv_heads
    channels, step = min(width, NUMBERS // width), min(64, KEYS // (width * k.element_size()))
    pieces = -(-head_dim // channels)
    split, splits = splits_of(places, pairs * pieces, step, RESIDENT, k.device)
    moments = k.new_empty((splits, batch, kv_heads, head_dim, head_dim), dtype=torch.float32)
    given = {
        "k": k, "v": v, "mean": means.mean, "tokens": tokens, "valid": tokens if valid is None else valid,
        "moments": moments,
        "k_batch": k.stride(0), "k_token": k.stride(1), "k_head": k.stride(2),
        "v_batch": v.stride(0), "v_token": v.stride(1), "v_head": v.stride(2),
        "valid_batch": 0 if valid is None else valid.stride(0),
        "kv_heads": kv_heads, "columns": columns, "slots": slots, "places": places, "split": split,
        "HEAD_DIM": head_dim, "BLOCK_DIM": width, "CHANNELS": channels, "TOKENS": step, "VALID": valid is not None,
        "PRECISION": precision(k.dtype, tf32),
    }  # fmt: skip
    launch_like(key_moments, (splits, pairs, pieces), given, 8, 2)
    number = means.count.sum(1).clamp(min=1)[:, None, None, None]
    return (moments.sum(0) / number).transpose(2, 3).to(k.dtype).contiguous()
