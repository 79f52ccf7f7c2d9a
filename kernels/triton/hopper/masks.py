"""Masks as the threads of the Hopper kernels read them."""

from __future__ import annotations

import torch

from visattn.keep import kept


@kept
def thread_masks(masks: torch.Tensor) -> torch.Tensor:
    """`by_threads` of the masks of a program, which are never changed: made once, and there for every stream."""
    return by_threads(masks) if masks.is_meta else by_threads(masks.cpu()).to(masks.device)


def by_threads(masks: torch.Tensor) -> torch.Tensor:
    """Masks [masks, rows, 2] of 64 columns with the bits of one thread side by side: int16 [masks, rows, 4].

    In a product, thread t of four has columns 8 * j + 2 * t + (0, 1) of a row (`parts.product_layout`), which become
    bits 2 * j + (0, 1) of its word.
    """
    number, rows, words = masks.shape
    assert words == 2, "column tiles of these kernels have 64 tokens"
    bits = masks[..., None] >> torch.arange(32, device=masks.device, dtype=torch.int32) & 1
    own = bits.view(number, rows, 8, 4, 2).transpose(2, 3).reshape(number, rows, 4, 16)
    return (own << torch.arange(16, device=masks.device, dtype=torch.int32)).sum(-1).to(torch.int16)
