"""Video decoders whose own attention is neighborhood attention, run by the kernels of this package.

The decoder of LTX-2.5 (`LTX2VideoDiffusionDecoderModel`) attends in exact neighborhoods of 3 to 11 tokens per axis.
What it computes stays the same; it needs neither FlexAttention, whose mask of blocks grows with the square of the
tokens, nor NATTEN.
"""

from __future__ import annotations

from typing import Any

import torch

from visattn.attend import attention
from visattn.dispatch import load
from visattn.given import class_among, said
from visattn.layout import Layout
from visattn.patterns import Neighborhood

ATTENTION = "LTX2VideoVaeNeighborhoodAttention"


class NeighborhoodProcessor:
    """Attention processor of diffusers for the decoder of LTX-2.5; its windows are those of the module.

    Attributes:
        backend: "auto" or the name of a backend.
    """

    def __init__(self, backend: str = "auto") -> None:
        self.backend = backend

    def __call__(self, attn: Any, hidden_states: torch.Tensor, block_mask: Any = None) -> torch.Tensor:
        """Attend.

        Args:
            attn: The attention module, which projects, normalizes and rotates.
            hidden_states: Tokens [B, F, H, W, C].
            block_mask: What a FlexAttention processor takes; the window says the same.

        Returns:
            Tokens [B, F, H, W, C].
        """
        grid = tuple(hidden_states.shape[1:4])
        q, k, v = (x.flatten(1, 3) for x in attn.project_qkv(hidden_states))
        # The module has scaled the queries.
        out = attention(q, k, v, Neighborhood(attn.kernel_size), Layout(grid), scale=1.0, backend=self.backend)
        return attn.to_out[0](out.flatten(2).unflatten(1, grid))


class DecoderPatch:
    """The processors of a patched decoder; `remove()`, or a `with` block, puts back those that were there.

    Attributes:
        modules: Paths of the attention modules.
    """

    def __init__(self, model: torch.nn.Module, backend: str) -> None:
        found = {path: m for path, m in model.named_modules() if class_among(m, [ATTENTION])}
        if not found:
            raise ValueError(
                f"{type(model).__name__} has no {ATTENTION}: pass the decoder of LTX-2.5, an "
                "LTX2VideoDiffusionDecoderModel"
            )
        self.modules = tuple(found)
        self._processor = NeighborhoodProcessor(backend)
        self._before: list[tuple[Any, Any]] = []
        for module in found.values():
            own: Any = module
            self._before.append((own, own.processor))
            own.processor = self._processor

    def remove(self) -> None:
        """Put back the processors that were there; one that someone else has set since stays."""
        for module, processor in self._before:
            if module.processor is self._processor:
                module.processor = processor
        self._before.clear()

    def __enter__(self) -> DecoderPatch:
        return self

    def __exit__(self, *error: object) -> None:
        self.remove()


def patch_decoder(model: torch.nn.Module, backend: str = "auto") -> DecoderPatch:
    """Run the neighborhood attention of LTX-2.5's video decoder by our kernels: the same, not sparser.

    Source of the windows: the class's own `decoder_stage_kernels` and `decoder_stage5_kernel`.

    Args:
        model: An LTX2VideoDiffusionDecoderModel.
        backend: "auto" or the name of a backend.

    Returns:
        The patch, whose `remove()`, or `with` block, undoes it.

    Raises:
        ValueError: If the model has no such attention, or there is no such backend.
    """
    if not isinstance(backend, str) or backend != "auto":
        load(backend)
    if not isinstance(model, torch.nn.Module):
        raise ValueError(f"model={said(model)} must be the decoder of LTX-2.5, an LTX2VideoDiffusionDecoderModel")
    return DecoderPatch(model, backend)
