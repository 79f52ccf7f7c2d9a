"""The plug-in of SGLang's diffusion runtime: it calls `register` once in every process."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from visattn.served import environment

CLIENT = "SGLang"
# What has self-attention of the latents alone.
MODELS = ("Wan 2.1 and 2.2",)
BACKEND = "visattn.clients.sglang.backend.VisattnBackend"
_PLATFORMS = "sglang.multimodal_gen.runtime.platforms"
# Where the class of a layer's attention is chosen.
TARGETS = tuple(
    f"{_PLATFORMS}.{place}.get_attn_backend_cls_str"
    for place in ("cuda.CudaPlatformBase", "rocm.RocmPlatform", "cpu.CpuPlatform")
)


def register() -> None:
    """Ask to be asked which attention a layer gets; without a pattern in the environment nothing is changed."""
    if not environment.wanted():
        return
    from sglang.multimodal_gen.runtime.platforms.plugins import (  # pyright: ignore[reportMissingImports]
        HookType,
        plugin_hook,
    )

    for target in TARGETS:
        plugin_hook(target, HookType.AROUND)(choose)


def choose(original: Callable[..., str], *args: Any, **kwargs: Any) -> str:
    """Around `get_attn_backend_cls_str(cls, selected_backend, head_size, dtype)` of a platform.

    Raises:
        ValueError: If the environment asks for something that no layer can run.
    """
    selected = kwargs.get("selected_backend", args[1] if len(args) > 1 else None)
    if selected is not None and selected.name != "TORCH_SDPA":
        # Somebody asked for another one.
        return original(*args, **kwargs)
    from visattn.served import settings

    settings.request(CLIENT)
    return BACKEND
