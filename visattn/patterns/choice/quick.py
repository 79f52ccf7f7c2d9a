"""Choosing by kernels, where there are any for the device."""

from __future__ import annotations

from typing import Any, Protocol, runtime_checkable

import torch

from visattn.entries import resolve
from visattn.patterns.base import Pattern
from visattn.patterns.choice.blocks import Blocks
from visattn.patterns.choice.scores import block_means
from visattn.patterns.routes import Routes

# Says whose kernels choose for a tensor; by name, since backends import the patterns.
CHOOSER = "visattn.choosers:chooser"


@runtime_checkable
class Chooser(Protocol):
    """A backend with kernels that choose; whichever backend runs the attention, lists come from there."""

    def choose(
        self,
        pattern: Pattern,
        q: torch.Tensor,
        k: torch.Tensor,
        blocks: Blocks,
        valid: torch.Tensor | None,
        scale: float,
    ) -> Routes | None:
        """The key blocks that a dynamic pattern chooses; None where it has no kernel for it.

        Args:
            pattern: The pattern.
            q: Grid queries [B, tokens, H, D].
            k: Grid keys [B, tokens, Hkv, D].
            blocks: Its blocks.
            valid: Tokens that take part, bool [B, tokens], or None for all.
            scale: Factor on the logits.

        Returns:
            Lists of key blocks [B, H, query blocks, n], counted from the first block.
        """
        ...

    def means(
        self, x: torch.Tensor, grid: tuple[int, ...], box: tuple[int, ...], valid: torch.Tensor | None
    ) -> torch.Tensor | None:
        """Means over the valid tokens of each block, float32 [B, blocks, H, D]; None where it has no kernel for it.

        Args:
            x: Grid tokens [B, tokens, H, D].
            grid: Tokens per axis.
            box: Sides of a block.
            valid: Tokens that take part, bool [B, tokens], or None for all.
        """
        ...


def _chooser(x: torch.Tensor) -> Chooser | None:
    """Whose kernels choose for a tensor, if anybody's."""
    if not x.is_cuda:
        return None
    find: Any = resolve(CHOOSER)
    return find(x)


def by_kernels(
    pattern: Pattern,
    q: torch.Tensor,
    k: torch.Tensor,
    blocks: Blocks,
    valid: torch.Tensor | None,
    scale: float,
) -> Routes | None:
    """What the GPU backend's kernels choose, see `Chooser.choose`; None where torch's operators must."""
    chooser = _chooser(q)
    return None if chooser is None else chooser.choose(pattern, q, k, blocks, valid, scale)


def quick_means(
    x: torch.Tensor, grid: tuple[int, ...], box: tuple[int, ...], valid: torch.Tensor | None
) -> torch.Tensor:
    """Means over the valid tokens of each block of tokens [B, tokens, H, D], zero where there are none."""
    chooser = _chooser(x)
    found = None if chooser is None else chooser.means(x, grid, box, valid)
    return block_means(x, grid, box, valid) if found is None else found
