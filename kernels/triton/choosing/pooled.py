"""The pooled keys of one call of a dynamic pattern: means of blocks, and which of them each query block lists."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from visattn.kernels.triton.arguments import LOG2E, precision
from visattn.kernels.triton.choosing.choose import Means, block_means, mask_bytes, part_tokens
from visattn.kernels.triton.choosing.moment import moments_of
from visattn.kernels.triton.choosing.rest import add_rest, mark_blocks
from visattn.kernels.triton.choosing.rest_grad import rest_key_gradients, rest_query_gradients
from visattn.kernels.triton.config import block_dim
from visattn.kernels.triton.start import launch_like, on
from visattn.layout import Layout
from visattn.operands import in_rows
from visattn.patterns import DynamicPattern, Routes
from visattn.patterns.choice.blocks import Blocks, inner, token_blocks

# Entries of a list that are turned into bits together.
ENTRIES = 64
# Channels whose changes are multiplied at once, by the bytes of a number.
SLICES = {2: 64, 4: 16}


class Rest(NamedTuple):
    """What unlisted blocks give.

    Attributes:
        k: Mean keys [B, blocks, Hkv, D].
        v: Mean values.
        weight: Logarithm of the tokens of each block, -inf where none is valid: float32 [1 or B, blocks].
        bits: Which blocks each query block lists: int32 [owners, query blocks, words].
        count: Valid tokens of each block: int32 [B, blocks].
        valid: Which grid tokens are valid, bool [B, tokens], None for all.
        blocks: The blocks.
        layout: The tokens.
        tokens: Tokens of each query block in the sequence, -1 behind a border: int32 [query blocks, tokens].
        heads: Query heads of an owner of lists.
        tf32: Whether float32 products may round their factors to tf32.
        moment: How values change with keys around the means, see `moments_of`; None for `rest=mean`.
    """

    k: torch.Tensor
    v: torch.Tensor
    weight: torch.Tensor
    bits: torch.Tensor
    count: torch.Tensor
    valid: torch.Tensor | None
    blocks: Blocks
    layout: Layout
    tokens: torch.Tensor
    heads: int
    tf32: bool
    moment: torch.Tensor | None

    def add(self, q: torch.Tensor, out: torch.Tensor, lse: torch.Tensor, scale: float) -> None:
        """Go on with attention along lists: `out` [B, S, H, D] and `lse` [B, H, S] are replaced."""
        given = {"q": q, "out": out, "lse": lse, **self._given(q, 64)}
        given |= {"scale": scale * LOG2E, "q_batch": q.stride(0), "q_token": q.stride(1), "q_head": q.stride(2)}
        given |= {"moment": self.k if self.moment is None else self.moment, "SLOPE": self.moment is not None}
        given |= {"SLICE": min(given["BLOCK_DIM"], SLICES[q.element_size()])}
        with on(q.device):
            launch_like(add_rest, self._programs(q, given), given, 4, 2)

    def query_gradients(
        self, q: torch.Tensor, grad_out: torch.Tensor, lse: torch.Tensor, delta: torch.Tensor, scale: float, to: Any
    ) -> None:
        """Add the part of the pooled keys to the gradient of q, `to` [B, S, H, D]."""
        given = self._backward(q, grad_out, lse, delta, scale) | {"grad_q": to}
        with on(q.device):
            launch_like(rest_query_gradients, self._programs(q, given), given, 4, 2)

    def key_gradients(
        self,
        q: torch.Tensor,
        grad_out: torch.Tensor,
        lse: torch.Tensor,
        delta: torch.Tensor,
        scale: float,
        to_k: torch.Tensor,
        to_v: torch.Tensor,
    ) -> None:
        """Add the part of the pooled keys and values to the gradients of k and v [B, S, Hkv, D]."""
        batch, columns, kv_heads, _ = self.k.shape
        shape = self.k.shape
        grad_k, grad_v = (torch.empty(shape, dtype=torch.float32, device=q.device) for _ in range(2))
        given = self._backward(q, grad_out, lse, delta, scale) | {"grad_k": grad_k, "grad_v": grad_v}
        with on(q.device):
            grid = -(-columns // int(given["COLUMNS"])), batch * kv_heads
            launch_like(rest_key_gradients, grid, given, 4, 1)
        block, at = token_blocks(self.blocks.grid, self.blocks.keys, q.device), inner(self.layout)
        for found, to in ((grad_k, to_k), (grad_v, to_v)):
            # A token is one of as many as its block has.
            each = (found / self.count.clamp(min=1)[..., None, None]).to(to.dtype)[:, block]
            to[:, at] += each if self.valid is None else each.masked_fill(~self.valid[..., None, None], 0)

    def _backward(
        self, q: torch.Tensor, grad_out: torch.Tensor, lse: torch.Tensor, delta: torch.Tensor, scale: float
    ) -> dict[str, Any]:
        """What both kernels of the backward take."""
        own = {"q": q, "grad_out": grad_out, "lse": lse, "delta": delta, **self._given(q, 32)}
        for name, x in (("q", q), ("grad", grad_out)):
            own |= {f"{name}_batch": x.stride(0), f"{name}_token": x.stride(1), f"{name}_head": x.stride(2)}
        return own | {"scale": scale}

    def _given(self, q: torch.Tensor, most: int) -> dict[str, Any]:
        """What all kernels take; `most` queries or pooled keys at a time."""
        length, heads, head_dim = q.shape[1:]
        (rows, slots), (columns, kv_heads), width = self.tokens.shape, self.k.shape[1:3], block_dim(head_dim)
        # The wider the rows, the fewer are in registers.
        size = most if width <= 128 else most // 2
        size = size // (4 if width > 64 else 2) if q.dtype == torch.float32 else size
        size = max(16, min(size, 1 << (slots - 1).bit_length()))
        return {
            "pooled_k": self.k, "pooled_v": self.v, "weight": self.weight, "bits": self.bits, "tokens": self.tokens,
            "weight_batch": columns if len(self.weight) > 1 else 0, "list_heads": self.heads,
            "heads": heads, "group": heads // kv_heads, "length": length, "rows": rows, "columns": columns,
            "words": self.bits.shape[2], "slots": slots, "pieces": -(-slots // size),
            "HEAD_DIM": head_dim, "BLOCK_DIM": width, "ROWS": size,
            "COLUMNS": most if q.dtype.itemsize == 2 and width <= 128 else max(16, most // 2),
            "PRECISION": precision(q.dtype, self.tf32),
        }  # fmt: skip

    def _programs(self, q: torch.Tensor, given: dict[str, Any]) -> tuple[int, int]:
        """A program for each piece of a query block, head and sample."""
        return given["rows"] * given["pieces"], q.shape[0] * q.shape[2]


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
        pattern: A pattern with `rest=mean` or `slope`.
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
    key, value = (block_means(x[:, at], blocks.grid, blocks.keys, valid) for x in (k, v))
    with on(k.device):
        bits = _bits(routes, blocks.columns)
        moment = _moment(k[:, at], v[:, at], key, blocks, valid, tf32) if pattern.rest == "slope" else None
    own = part_tokens(blocks.grid, blocks.queries, 1, k.device)
    return Rest(
        key.mean.transpose(1, 2).to(k.dtype).contiguous(),
        value.mean.transpose(1, 2).to(v.dtype).contiguous(),
        key.count.float().log(),
        bits,
        key.count,
        valid,
        blocks,
        layout,
        torch.where(own < 0, own, own + layout.prefix) if layout.prefix else own,
        heads // routes.groups,
        tf32,
        moment,
    )


def _moment(
    k: torch.Tensor, v: torch.Tensor, key: Means, blocks: Blocks, valid: torch.Tensor | None, tf32: bool
) -> torch.Tensor:
    """`moments_of` for the blocks of keys."""
    tokens = part_tokens(blocks.grid, blocks.keys, 1, k.device)
    return moments_of(in_rows(k), in_rows(v), key, tokens, None if valid is None else mask_bytes(valid), tf32)


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
