"""Choosing by kernels, where there are any for the device."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol, runtime_checkable

import torch

from visattn.patterns.choice.blocks import Blocks
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


def by_kernels(
    pattern: DynamicPattern,
    q: torch.Tensor,
    k: torch.Tensor,
    blocks: Blocks,
    valid: torch.Tensor | None,
    scale: float,
) -> Routes | None:
    """What the GPU backend's kernels choose, see `Chooser.choose`; None where torch's operators must."""
    if not q.is_cuda:
        return None
    # Only here: both import the patterns.
    from visattn.dispatch import load
    from visattn.ops import without_values, written_down

    if without_values(q) or written_down():
        return None
    backend = load("triton")
    return backend.choose(pattern, q, k, blocks, valid, scale) if isinstance(backend, Chooser) else None
