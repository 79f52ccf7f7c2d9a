"""The attention that diffusers runs without visattn."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

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
        """Attention [B, S, H, D] as stock diffusers computes it; `call.own` is a backend for this call alone."""
        if not self.dispatched:
            q, k, v = call.swapped().tensors
            out = scaled_dot_product_attention(
                q, k, v, call.mask, call.dropout, call.causal, scale=call.scale, enable_gqa=call.grouped
            )
            return out.transpose(1, 2)
        from diffusers.models.attention_dispatch import AttentionBackendName, dispatch_attention_fn

        chosen = self.backend if call.own is None else call.own
        backend = None if chosen is None else AttentionBackendName(chosen)
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

    def unmasked(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float | None, grouped: bool
    ) -> torch.Tensor:
        """The same of a call without mask, dropout and parallelism; torch's SDPA directly where that is what runs."""
        registry, native = _dispatching()
        name = registry._active_backend if self.backend is None else self.backend
        if name != native or registry._checks_enabled:
            return self(AttentionCall(q, k, v, scale=scale, grouped=grouped))
        return registry._backends[native](q, k, v, scale=scale, enable_gqa=grouped)


@functools.lru_cache(maxsize=1)
def _dispatching() -> Any:
    """Diffusers' table of backends, and the one that is torch's SDPA."""
    from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry

    return _AttentionBackendRegistry, AttentionBackendName.NATIVE
