"""Choosing by kernels, where there are any for the device."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol, runtime_checkable

import torch

from visattn.patterns.choice.blocks import Blocks
from visattn.patterns.choice.scores import block_means
from visattn.patterns.routes import Routes

if TYPE_CHECKING:
    from visattn.patterns.dynamic import DynamicPattern


@runtime_checkable
class Chooser(Protocol):
    """A backend with kernels that choose; whichever backend runs the attention, lists come from there."""

    def choose(
        self,
        pattern: DynamicPattern,
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
    """The GPU backend, for tensors that have values there."""
    if not x.is_cuda:
        return None
    # Only here: both import the patterns.
    from visattn.dispatch import load
    from visattn.ops import without_values, written_down

    backend = None if without_values(x) or written_down() else load("triton")
    return backend if isinstance(backend, Chooser) else None


def by_kernels(
    pattern: DynamicPattern,
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
