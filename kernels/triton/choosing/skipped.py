"""Calls of dynamic patterns with `skip`: the test in the loop of a kernel, and who is told what it passed over."""

from __future__ import annotations

import math

import numpy as np
import torch

from visattn.keep import kept
from visattn.kernels.triton.arguments import LOG2E, precision, strides
from visattn.kernels.triton.choosing.choose import part_tokens
from visattn.kernels.triton.config import block_dim
from visattn.kernels.triton.lists.skipping import attend_or_skip
from visattn.kernels.triton.start import launch_like, on
from visattn.layout import Layout
from visattn.patterns import DynamicPattern, Pattern, Routes
from visattn.patterns.choice.blocks import Blocks
from visattn.patterns.choice.listening import tell_met

# Tokens of a block, and bytes of a padded row of channels, that a program holds.
MOST, WIDEST = 128, 256
# Warps of a program, and stages of its loop.
WARPS, STAGES = 4, 2


def skips_in_loop(pattern: Pattern, layout: Layout, q: torch.Tensor) -> bool:
    """Whether the kernel runs a call: a pattern with `skip` whose blocks fit in a program."""
    if not isinstance(pattern, DynamicPattern) or not pattern.skip or layout.key_layout is not None:
        return False
    blocks = pattern.blocks(layout.grid)
    fits = block_dim(q.shape[3]) * q.element_size() <= WIDEST
    return fits and max(math.prod(blocks.queries), math.prod(blocks.keys)) <= MOST


@kept
def _tokens(blocks: Blocks, box: tuple[int, ...], first: int, device: torch.device) -> torch.Tensor:
    """Tokens of each block in the sequence, in a power of two of places, -1 for none: int32 [blocks, places]."""
    own = part_tokens(blocks.grid, box, 1, device)
    places = max(16, 1 << (own.shape[1] - 1).bit_length())
    padded = torch.nn.functional.pad(own, (0, places - own.shape[1]), value=-1)
    return torch.where(padded < 0, padded, padded + first)


@kept
def _dense_tokens(layout: Layout, places: int, device: torch.device) -> torch.Tensor:
    """Text in front and behind, in tiles of so many: int32 [tiles, places]."""
    behind = layout.prefix + layout.tokens
    found = np.concatenate([np.arange(layout.prefix), np.arange(behind, layout.length)])
    padded = np.pad(found, (0, -len(found) % places), constant_values=-1).astype(np.int32)
    return torch.from_numpy(padded.reshape(-1, places)).to(device)


class SkippingLists:
    """What one call lists, before its kernel passes over some of it.

    Args:
        pattern: The pattern.
        routes: Key blocks of each query block, ascending.
        layout: The tokens.
        tf32: Whether float32 products may round their factors to tf32.
    """

    def __init__(self, pattern: DynamicPattern, routes: Routes, layout: Layout, tf32: bool) -> None:
        self._pattern, self._routes, self._layout, self._tf32 = pattern, routes, layout, tf32

    def run(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        key_mask: torch.Tensor | None,
        out: torch.Tensor,
        lse: torch.Tensor | None,
        scale: float,
    ) -> None:
        """Fill `out` [B, S, H, D] and `lse` [B, H, S], if it is wanted, and tell who listens what was passed over.

        Args:
            q: Queries [B, S, H, D].
            k: Keys [B, S, Hkv, D].
            v: Values.
            key_mask: bool [B, S], contiguous, or None.
            out: Contiguous.
            lse: Contiguous.
            scale: Factor on the logits, not negative.
        """
        blocks = self._pattern.blocks(self._layout.grid)
        first, device = self._layout.prefix, q.device
        tiles = self._routes.tiles.flatten(0, 1).to(torch.int32).contiguous()
        counts = self._routes.counts
        counts = None if counts is None else counts.flatten(0, 1).to(torch.int32).contiguous()
        query_tokens, key_tokens = (_tokens(blocks, box, first, device) for box in (blocks.queries, blocks.keys))
        rows, columns = query_tokens.shape[1], key_tokens.shape[1]
        dense = _dense_tokens(self._layout, columns, device)
        (batch, length, heads, head_dim), number = q.shape, tiles.shape[2]
        met = torch.ones((batch, heads, blocks.rows, number), dtype=torch.uint8, device=device)
        given = {
            "q": q, "k": k, "v": v, "out": out, "lse": out if lse is None else lse,
            "key_mask": tiles if key_mask is None else key_mask.view(torch.uint8),
            "query_tokens": query_tokens, "key_tokens": key_tokens, "dense_tokens": dense if len(dense) else key_tokens,
            "choice": tiles, "counts": tiles if counts is None else counts, "met": met,
            **strides("q", q, 1), **strides("k", k, 1), **strides("v", v, 1),
            "scale": scale * LOG2E, "below": math.log2(self._pattern.skip),
            "heads": heads, "group": heads // k.shape[2], "list_heads": heads // self._routes.groups, "length": length,
            "blocks": blocks.rows, "columns": blocks.columns, "number": number, "dense_tiles": len(dense),
            "HEAD_DIM": head_dim, "BLOCK_DIM": block_dim(head_dim), "ROWS": rows, "COLUMNS": columns,
            "COUNTED": counts is not None, "KEY_MASK": key_mask is not None, "LSE": lse is not None,
            "PRECISION": precision(q.dtype, self._tf32),
        }  # fmt: skip
        programs = blocks.rows + -(-dense.numel() // rows)
        with on(device):
            launch_like(attend_or_skip, (programs, batch * heads), given, WARPS, STAGES)
        tell_met(self._routes, met.bool(), blocks)
