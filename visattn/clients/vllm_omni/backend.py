"""The backend of vLLM-Omni's diffusion attention; imported by it alone."""

from __future__ import annotations

import functools
from typing import Any

import torch
from vllm.utils.import_utils import resolve_obj_by_qualname  # pyright: ignore[reportMissingImports]
from vllm_omni.diffusion.attention.backends.abstract import (  # pyright: ignore[reportMissingImports]
    AttentionBackend,
    AttentionImpl,
)
from vllm_omni.diffusion.attention.backends.sdpa import SDPABackend  # pyright: ignore[reportMissingImports]
from vllm_omni.diffusion.config import get_current_diffusion_config_or_none  # pyright: ignore[reportMissingImports]
from vllm_omni.diffusion.forward_context import (  # pyright: ignore[reportMissingImports]
    get_forward_context,
    is_forward_context_available,
)
from vllm_omni.platforms import current_omni_platform  # pyright: ignore[reportMissingImports]

from visattn.clients.vllm_omni.grids import where
from visattn.clients.vllm_omni.plugin import NAME
from visattn.runtime.call import AttentionCall
from visattn.runtime.run import Step
from visattn.served import settings
from visattn.served.run import Builder, ServedRun

CLIENT = "vLLM-Omni"
_BUILDER = Builder()


class VisattnBackend(AttentionBackend):
    """What `--diffusion-attention-backend VISATTN` selects."""

    @staticmethod
    def get_name() -> str:
        """The name of the backend."""
        return NAME

    @staticmethod
    def get_impl_cls() -> type[VisattnImpl]:
        """The attention of a layer."""
        return VisattnImpl

    @staticmethod
    def get_metadata_cls() -> Any:
        """Nothing of its own."""

    @staticmethod
    def get_builder_cls() -> Any:
        """Nothing of its own."""

    @staticmethod
    def get_supported_head_sizes() -> list[int]:
        """Any."""
        return []

    @classmethod
    def supports_attention_mask(cls, attention_spec: object | None = None) -> bool:
        """Masks of keys stay in force; other masks keep a call dense."""
        return True

    @classmethod
    def validate_available(cls) -> None:
        """Before a model is built: is what the environment asks for possible?

        Raises:
            ValueError: If not.
        """
        settings.request(CLIENT)


class VisattnImpl(AttentionImpl):
    """The attention of one layer: see vLLM-Omni's `AttentionImpl`.

    Raises:
        ValueError: If the layer is to share its keys in a way that never reaches it.
    """

    def __init__(
        self,
        num_heads: int,
        head_size: int,
        softmax_scale: float,
        causal: bool = False,
        num_kv_heads: int | None = None,
        prefix: str = "",
        qkv_layout: str | None = None,
        backend_kwargs: dict[str, Any] | None = None,
        **extra_impl_args: Any,
    ) -> None:
        config = get_current_diffusion_config_or_none()
        _check_parallel(getattr(config, "parallel_config", None))
        self.causal, self.softmax_scale = causal, softmax_scale
        options = {
            "num_heads": num_heads,
            "head_size": head_size,
            "softmax_scale": softmax_scale,
            "causal": causal,
            "num_kv_heads": num_kv_heads,
            "prefix": prefix,
            "qkv_layout": qkv_layout,
        }
        self.stock = _stock(head_size, options)
        crosses = extra_impl_args.get("role") == "cross"
        if crosses or causal or (qkv_layout or "BSND").upper() != "BSND":
            self.layer = None
            return
        name = getattr(config, "model_class_name", None) or "the model"
        self.layer = _BUILDER.layer(
            name, config, prefix, lambda: ServedRun(name, settings.request(CLIENT), _step, config)
        )

    @torch.compiler.disable
    def forward(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attn_metadata: Any = None
    ) -> torch.Tensor:
        """Attention [B, S, H, D] of q, k and v [B, S, H, D]; between graphs where vLLM-Omni compiles."""
        own = functools.partial(self.stock, query, key, value, attn_metadata)
        if self.layer is None or query.ndim != 4 or query.shape[1] != key.shape[1]:
            # Attention to another sequence, as to the text.
            return own()
        mask = getattr(attn_metadata, "attn_mask", None)
        if isinstance(mask, torch.Tensor) and mask.shape == key.shape[:2]:
            # Of keys, as vLLM-Omni reads it, never of queries and keys.
            mask = mask.to(torch.bool)[:, None, None]
        grouped = key.shape[2] != query.shape[2]
        call = AttentionCall(query, key, value, mask, self.softmax_scale, grouped=grouped, own=own)
        return self.layer.attend(call, where(attn_metadata))


def _check_parallel(parallel: Any) -> None:
    """Raise a ValueError where a layer never sees the keys of its whole sequence."""
    for name, what in (("ring_degree", "ring attention"), ("allgather_degree", "all-gathered keys")):
        if getattr(parallel, name, 1) > 1:
            raise ValueError(
                f"{name}={getattr(parallel, name)}: {what} passes its backend by, so no pattern would run: use "
                f"ulysses_degree, or another backend than {NAME}"
            )


def _stock(head_size: int, options: dict[str, Any]) -> Any:
    """What the platform runs without visattn, as a function of q, k, v and metadata."""
    platform = current_omni_platform
    path = platform.get_diffusion_attn_backend_cls(
        selected_backend=None, head_size=head_size, allow_trtllm_default=False
    )
    backend = resolve_obj_by_qualname(path)
    if not backend.supports_attention_mask():
        backend = SDPABackend
    impl = backend.get_impl_cls()(**options)
    known = (platform.is_cuda, platform.is_rocm, platform.is_npu, platform.is_xpu, platform.is_musa)
    if backend is SDPABackend and not any(is_it() for is_it in known):
        # No platform to dispatch to: what runs torch's own attention anywhere.
        return impl.forward_cuda
    return impl.forward


def _step() -> Step:
    if not is_forward_context_available():
        return None, None
    context = get_forward_context()
    return context.denoise_step_idx, context.total_denoise_steps
