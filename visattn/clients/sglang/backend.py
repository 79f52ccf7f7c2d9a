"""The attention of SGLang's diffusion models; imported by it alone."""

from __future__ import annotations

import functools
from typing import Any

import torch
from sglang.multimodal_gen.runtime.layers.attention.backends.sdpa import (  # pyright: ignore[reportMissingImports]
    SDPABackend,
    SDPAImpl,
)
from sglang.multimodal_gen.runtime.layers.attention.selector import (  # pyright: ignore[reportMissingImports]
    get_component_attn_backend_name,
)
from sglang.multimodal_gen.runtime.managers.forward_context import (  # pyright: ignore[reportMissingImports]
    get_forward_context_or_none,
)
from sglang.multimodal_gen.runtime.server_args import get_global_server_args  # pyright: ignore[reportMissingImports]

from visattn.clients.sglang.plugin import CLIENT
from visattn.runtime.call import AttentionCall
from visattn.runtime.run import Step
from visattn.runtime.where import Where
from visattn.served import settings
from visattn.served.run import Builder, ServedRun

# Which part of a pipeline has tokens of a grid.
COMPONENT = "transformer"
_BUILDER = Builder()


class VisattnBackend(SDPABackend):
    """Stands for torch's own attention, so that no stage prepares anything for it."""

    @staticmethod
    def get_impl_cls() -> type[VisattnImpl]:
        """The attention of a layer."""
        return VisattnImpl


class VisattnImpl(SDPAImpl):
    """The attention of one layer; packed sequences and calls to other sequences are torch's."""

    def __init__(self, *args: Any, prefix: str = "", is_cross_attention: bool = False, **others: Any) -> None:
        super().__init__(*args, prefix=prefix, is_cross_attention=is_cross_attention, **others)
        name = get_component_attn_backend_name() or COMPONENT
        self.layer = None
        if name.startswith(COMPONENT) and not is_cross_attention and not self.causal and not self.dropout:
            path = prefix.removesuffix("impl").rstrip(".")
            self.layer = _BUILDER.layer(name, None, path, lambda: ServedRun(name, settings.request(CLIENT), _step))

    @torch.compiler.disable
    def forward(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attn_metadata: Any) -> torch.Tensor:
        """Attention [B, S, H, D] of q, k and v [B, S, H, D]."""
        own = functools.partial(super().forward, query, key, value, attn_metadata)
        if self.layer is None or query.ndim != 4 or query.shape[1] != key.shape[1]:
            return own()
        grouped = key.shape[2] != query.shape[2]
        call = AttentionCall(query, key, value, None, self.softmax_scale, grouped=grouped, own=own)
        return self.layer.attend(call, _where())


def _where() -> Where:
    """The latents of the request in patches; sequences of another length stay dense."""
    batch = getattr(get_forward_context_or_none(), "forward_batch", None)
    shape = getattr(batch, "raw_latent_shape", None)
    patch = getattr(get_global_server_args().pipeline_config.dit_config, "patch_size", None)
    if shape is None or len(shape) != 5 or patch is None:
        return Where((), why="its request has no latents [B, C, T, H, W] with a size of patches")
    sizes = tuple(patch) if isinstance(patch, list | tuple) else (1, patch, patch)
    return Where(tuple(int(n) // int(p) for n, p in zip(shape[2:], sizes, strict=True)))


def _step() -> Step:
    context = get_forward_context_or_none()
    total = getattr(getattr(context, "forward_batch", None), "num_inference_steps", None)
    return getattr(context, "current_timestep", None), total
