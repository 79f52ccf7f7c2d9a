"""The pooled keys of one call of a dynamic pattern: means of blocks, and which of them each query block lists."""

from __future__ import annotations

from typing import NamedTuple

import torch

from visattn.kernels.triton.arguments import LOG2E, precision
from visattn.kernels.triton.choosing.choose import block_means, part_tokens
from visattn.kernels.triton.choosing.rest import add_rest, mark_blocks
from visattn.kernels.triton.config import block_dim
from visattn.kernels.triton.start import launch_like, on
from visattn.layout import Layout
from visattn.patterns import DynamicPattern, Routes
from visattn.patterns.choice.blocks import inner

# Entries of a list that are turned into bits together, and pooled keys of a step.
ENTRIES, COLUMNS = 64, 64


class Rest(NamedTuple):
    """What unlisted blocks give.

    Attributes:
        k: Mean keys [B, blocks, Hkv, D].
        v: Mean values.
        weight: Logarithm of the tokens of each block, -inf where none is valid: float32 [1 or B, blocks].
        bits: Which blocks each query block lists: int32 [owners, query blocks, words].
        tokens: Tokens of each query block in the sequence, -1 behind a border: int32 [query blocks, tokens].
        heads: Query heads of an owner of lists.
        tf32: Whether float32 products may round their factors to tf32.
    """

    k: torch.Tensor
    v: torch.Tensor
    weight: torch.Tensor
    bits: torch.Tensor
    tokens: torch.Tensor
    heads: int
    tf32: bool

    def add(self, q: torch.Tensor, out: torch.Tensor, lse: torch.Tensor, scale: float) -> None:
        """Go on with attention along lists: `out` [B, S, H, D] and `lse` [B, H, S] are replaced."""
        batch, length, heads, head_dim = q.shape
        (rows, slots), (columns, kv_heads), width = self.tokens.shape, self.k.shape[1:3], block_dim(head_dim)
        # Float32 rows take as many registers as there are channels.
        size = 64 if width <= 128 else 32
        size = size // (4 if width > 64 else 2) if q.dtype == torch.float32 else size
        size = max(16, min(size, 1 << (slots - 1).bit_length()))
        pieces = -(-slots // size)
        given = {
            "q": q, "pooled_k": self.k, "pooled_v": self.v, "weight": self.weight, "bits": self.bits,
            "tokens": self.tokens, "out": out, "lse": lse,
            "q_batch": q.stride(0), "q_token": q.stride(1), "q_head": q.stride(2),
            "weight_batch": columns if len(self.weight) > 1 else 0, "list_heads": self.heads, "scale": scale * LOG2E,
            "heads": heads, "group": heads // kv_heads, "length": length, "rows": rows, "columns": columns,
            "words": self.bits.shape[2], "slots": slots, "pieces": pieces,
            "HEAD_DIM": head_dim, "BLOCK_DIM": width, "ROWS": size,
            "COLUMNS": COLUMNS if q.dtype.itemsize == 2 and width <= 128 else 32,
            "PRECISION": precision(q.dtype, self.tf32),
        }  # fmt: skip
        with on(q.device):
            launch_like(add_rest, (rows * pieces, batch * heads), given, 4, 2)


def rest_of(
    pattern: DynamicPattern,
    routes: Routes,
    k: torch.Tensor,
    v: torch.Tensor,
    layout: Layout,
    key_mask: torch.Tensor | None,
    tf32: bool,
    heads: int,
) -> Rest:
    """The pooled keys of a call.

    Args:
        pattern: A pattern with `rest=mean`.
        routes: What it chose.
        k: Keys [B, S, Hkv, D].
        v: Values.
        layout: The tokens.
        key_mask: bool [B, S], or None.
        tf32: Whether float32 products may round their factors to tf32.
        heads: Query heads.
    """
    blocks, at = pattern.blocks(layout.grid), inner(layout)
    valid = None if key_mask is None else key_mask[:, at]
    with on(k.device):
        key, value = (block_means(x[:, at], blocks.grid, blocks.keys, valid) for x in (k, v))
        bits = _bits(routes, blocks.columns)
    own = part_tokens(blocks.grid, blocks.queries, 1, k.device)
    return Rest(
        key.mean.transpose(1, 2).to(k.dtype).contiguous(),
        value.mean.transpose(1, 2).to(v.dtype).contiguous(),
        key.count.float().log(),
        bits,
        torch.where(own < 0, own, own + layout.prefix) if layout.prefix else own,
        heads // routes.groups,
        tf32,
    )


def _bits(routes: Routes, blocks: int) -> torch.Tensor:
    """Which blocks each query block lists: int32 [owners, query blocks, words]."""
    tiles = routes.tiles.flatten(0, 1).to(torch.int32).contiguous()
    counts = None if routes.counts is None else routes.counts.flatten(0, 1).to(torch.int32).contiguous()
    owners, rows, number = tiles.shape
    words = -(-blocks // 32)
    bits = tiles.new_empty((owners, rows, words))
    given = {
        "tiles": tiles, "counts": tiles if counts is None else counts, "bits": bits,
        "rows": rows, "number": number, "words": words,
        "COUNTED": counts is not None, "STEP": ENTRIES, "WORDS": 1 << (words - 1).bit_length(),
    }  # fmt: skip
    launch_like(mark_blocks, (rows, owners), given, 4, None)
    return bits
