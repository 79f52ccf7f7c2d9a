"""Mask functions that FlashAttention-4 compiles into its kernels: which key slots a query slot sees, in partial blocks.

What they compute is `visattn.kernels.fa4.words` in the kernels' language; both read the same words.
"""

# Values exist on the GPU only: Python types would say nothing.
# ruff: noqa: ANN001, ANN202
# pyright: reportMissingImports=false
from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import cutlass
import cutlass.cute as cute
from cutlass import const_expr
from flash_attn.cute import utils

from visattn.kernels.fa4.words import COLUMNS, WORD


@lru_cache(maxsize=8)
def intervals_mod(guards: int, heads: bool) -> Callable[..., object]:
    """The mask function of `words.Packed`; closures of constants alone, for they are the key of compiled kernels."""

    @cute.jit
    def intervals(batch, head, q_idx, kv_idx, seqlen_info, aux_tensors):
        starts, ends, places = aux_tensors[0], aux_tensors[1], aux_tensors[2]
        row = q_idx[0]
        if const_expr(heads):
            row = row + aux_tensors[3][head[0]]
        place = places[kv_idx[0]]
        inside = (place - starts[row]) & (ends[row] - place) & guards
        hidden = (inside ^ guards) & ((place >> 31) ^ -1)
        return utils.scalar_to_ssa(hidden, cutlass.Int32) == utils.scalar_to_ssa(0, cutlass.Int32)

    return intervals


@lru_cache(maxsize=8)
def bits_mod(rows: int, heads: bool) -> Callable[..., object]:
    """The mask function of `words.Bits` in query tiles of so many rows."""

    @cute.jit
    def bits(batch, head, q_idx, kv_idx, seqlen_info, aux_tensors):
        pair, words = aux_tensors[0], aux_tensors[1]
        tile = q_idx[0] // rows
        if const_expr(heads):
            tile = tile + aux_tensors[2][head[0]]
        mask = pair[1 + tile * pair[0] + kv_idx[0] // COLUMNS]
        column = kv_idx[0] % COLUMNS
        word = words[(mask * rows + q_idx[0] % rows) * (COLUMNS // WORD) + column // WORD]
        seen = (word >> (column % WORD)) & 1
        return utils.scalar_to_ssa(seen, cutlass.Int32) == utils.scalar_to_ssa(1, cutlass.Int32)

    return bits
