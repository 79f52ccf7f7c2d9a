"""The attention that diffusers runs without visattn."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch.nn.functional import scaled_dot_product_attention

from visattn.runtime.call import AttentionCall


class Stock(NamedTuple):
    """The attention that a processor would run without visattn.

    Attributes:
        dispatched: Whether through diffusers' `dispatch_attention_fn` rather than torch's SDPA.
        backend: Name of the diffusers backend that the user chose, or None.
    """

    dispatched: bool
    backend: str | None = None

    def __call__(self, call: AttentionCall) -> torch.Tensor:
        """Attention [B, S, H, D] as stock diffusers computes it."""
        if not self.dispatched:
            q, k, v = call.swapped().tensors
            out = scaled_dot_product_attention(
                q, k, v, call.mask, call.dropout, call.causal, scale=call.scale, enable_gqa=call.grouped
            )
            return out.transpose(1, 2)
        from diffusers.models.attention_dispatch import AttentionBackendName, dispatch_attention_fn

        backend = None if self.backend is None else AttentionBackendName(self.backend)
        return dispatch_attention_fn(
            *call.tensors,
            call.mask,
            call.dropout,
            call.causal,
            call.scale,
            call.grouped,
            backend=backend,
            parallel_config=call.parallel,
        )
